"""How a long job tells what it is doing: one live line on a terminal, now and then a plain line elsewhere.

A line that cannot be written (a terminal that was closed, a pipe that nobody reads) ends no job: it is not shown.
"""

import contextlib
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live


class ProgressLine:
    """A context manager that shows the latest `update` in place on a terminal, or every `every` seconds in a log.

    A narrow terminal shows it over several lines, no figure cut.
    """

    def __init__(self, console: "Console | None" = None, *, every: float = 10.0) -> None:
        from dsmr.console.screen import Screen

        self.console = console or Screen(stderr=True)
        self.every = every
        self._live: Live | None = None
        self._said_at = -float("inf")

    def __enter__(self) -> "ProgressLine":
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.__exit__(kind, error, trace)
            self._live = None

    def update(self, line: str) -> None:
        """Replace the live line, or print it if the last one was printed long enough ago."""
        if self._live is not None:
            from rich.text import Text

            with contextlib.suppress(OSError):
                self._live.update(Text(line, overflow="fold"))
        elif time.monotonic() - self._said_at >= self.every:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._said_at = time.monotonic()
        with contextlib.suppress(OSError):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds for a reader: "1:02:03" or "4:05"."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
