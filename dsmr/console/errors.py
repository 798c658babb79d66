"""The one exception that the programs show to their user: a sentence, without a traceback."""

from dsmr.console.shown import shown


class UserError(RuntimeError):
    """Something that the user can mend: the message is one sentence that names the thing and what is wrong with it.

    What it quotes from files and names stays on one line: control characters become escapes.
    """

    def __init__(self, sentence: object) -> None:
        super().__init__(shown(sentence))
