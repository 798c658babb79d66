"""The one exception that the programs show to their user: a sentence, without a traceback."""


class UserError(RuntimeError):
    """Something that the user can mend: the message is one sentence that names the thing and what is wrong with it."""
