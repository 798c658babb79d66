"""How the programs end: results on stdout, one sentence on stderr for what the user can mend, and an exit code.

0 is success, 1 an error said in a sentence, 2 wrong usage (typer's), 128 + a signal's number where one ended the job:
130 Ctrl-C, 143 SIGTERM, 129 SIGHUP, and 141 where nobody reads the results any more (SIGPIPE). `DSMR_DEBUG=1` in the
environment shows the traceback instead of the sentence. Where stdout or stderr cannot be written, the code is the same.
"""

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

from dsmr.console.errors import UserError
from dsmr.console.shown import shown
from dsmr.console.stopping import signal_of

if TYPE_CHECKING:
    from rich.console import Console


P = ParamSpec("P")
R = TypeVar("R")


def fail(sentence: str, code: int = 1) -> NoReturn:
    """Say one sentence on stderr and leave."""
    try:
        print(f"dsmr: {shown(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # a terminal that was closed, a full disk behind `2>`
        _let_go(sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):  # else Python would try once more at its end, and leave with 120
        _let_go(sys.stdout)
    raise SystemExit(code)


def _let_go(stream: object) -> None:
    """Have what nobody can read go nowhere from now on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def interrupted(number: int, what: str = "") -> NoReturn:
    """Leave as the signal `number` asked, and say `what` has become of the work."""
    fail("interrupted" + (f"; {what}" if what else ""), 128 + number)


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch says, by a `RuntimeError` of any kind, that it could not get the memory that it needs."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Make a command end in a sentence and an exit code where it fails for a reason that the user can mend."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            done = function(*args, **kwargs)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where what goes wrong is still a sentence and a code
            return done
        except ModuleNotFoundError as error:
            if error.name != "torch" or os.environ.get("DSMR_DEBUG", "0") not in ("", "0"):
                raise
            fail("this command needs PyTorch, which is not installed: pip install torch")
        except (UserError, ValueError, OSError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
            if os.environ.get("DSMR_DEBUG", "0") not in ("", "0"):
                raise
            if isinstance(error, MemoryError) or (not isinstance(error, UserError) and out_of_memory(error)):
                fail("not enough memory: a smaller batch, model, segment or memory schedule needs less")
            if isinstance(error, RuntimeError) and not isinstance(error, UserError):
                raise
            if isinstance(error, KeyboardInterrupt):
                interrupted(signal_of(error))
            if isinstance(error, BrokenPipeError):
                _let_go(sys.stdout)
                raise SystemExit(141) from None
            if isinstance(error, OSError) and error.filename is not None:
                fail(f"{error.filename}: {(error.strerror or str(error)).lower()}")
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO):
                fail(f"cannot write the output: {(error.strerror or str(error)).lower()}")
            fail(str(error) or type(error).__name__)

    return guarded


def console() -> "Console":
    """Where results go: stdout, wide enough for the tables also when it is not a terminal."""
    from dsmr.console.screen import Screen

    return Screen(width=None if sys.stdout is not None and sys.stdout.isatty() else 120)
