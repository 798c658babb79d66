"""Several results of one job, each written on its own: one that cannot be written takes none of the others with it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dsmr.console.errors import UserError
from dsmr.console.files import describe
from dsmr.console.words import one_line

T = TypeVar("T")


class Results:
    """Which files have been written, and why each of the others has not."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.missing: list[tuple[Path, str]] = []
        self.cause: Exception | None = None  # the first of what nobody foresaw, for whoever wants the traceback

    def write(self, path: str | os.PathLike[str], work: Callable[[], T]) -> T | None:
        """What `work`, which writes `path`, returns; None if it could not, which is noted."""
        try:
            done = work()
        except UserError as error:
            self.fail(path, str(error))
        except OSError as error:
            self.fail(path, f"cannot write {os.fspath(path)}: {describe(error)}")
        except MemoryError:
            self.fail(path, f"cannot write {os.fspath(path)}: not enough memory")
        except Exception as error:  # a drawing library raises what it likes, and must not take the music with it
            self.cause = self.cause or error
            self.fail(path, f"cannot write {os.fspath(path)}: {type(error).__name__}: {one_line(error)}")
        else:
            self.written.append(Path(path))
            return done
        return None

    def fail(self, path: str | os.PathLike[str], why: str) -> None:
        """Note that `path` is not written."""
        self.missing.append((Path(path), why))

    @property
    def sentence(self) -> str:
        """Why what is missing could not be written, and what is there all the same; empty if nothing is missing."""
        if not self.missing:
            return ""
        reasons = "; ".join(dict.fromkeys(why for _, why in self.missing))
        absent = ", ".join(str(path) for path, _ in self.missing)
        written = ", ".join(map(str, self.written)) or "nothing"
        return f"{reasons}; not written: {absent}; written: {written}"

    def check(self) -> None:
        """`UserError` with the sentence, if anything is missing."""
        if self.missing:
            raise UserError(self.sentence) from self.cause
