"""The terminal (rich) as every program of ours uses it: what a user named is text, never markup nor an escape sequence.

Imported when something is printed, because rich takes its time.
"""

from collections.abc import Iterable
from typing import IO, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import TextColumn
from rich.segment import Segment
from rich.table import Table

from dsmr.console.shown import shown


class Screen(Console):
    """A rich console without markup, emoji codes or highlighting; control characters in text are written as escapes."""

    def __init__(self, *, stderr: bool = False, width: int | None = None, file: IO[str] | None = None) -> None:
        super().__init__(stderr=stderr, width=width, file=file, markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> NoReturn:
        """Called where nobody reads any more. Rich would end the program with code 1, in the middle of its work."""
        del self._buffer[:]
        raise  # the BrokenPipeError that rich is handling

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it, but a table's cell that is too narrow goes on in the next line, where rich cuts off digits;
        what rich itself writes to move the cursor stands in segments of their own."""
        if isinstance(renderable, Table):
            for column in renderable.columns:
                if column.overflow == "ellipsis" and not column.no_wrap:  # rich's default
                    column.overflow = "fold"
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else shown(segment.text, keep="\n")
            yield segment if text == segment.text else Segment(text, segment.style)


def described() -> TextColumn:
    """The column of a progress bar that says what is being done."""
    return TextColumn("{task.description}", markup=False)
