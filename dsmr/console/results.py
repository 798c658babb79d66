"""Several results of one job, each written on its own: one that cannot be written takes none of the others with it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dsmr.console.errors import UserError
from dsmr.console.files import describe

T = TypeVar("T")


class Results:
    """Which files have been written, and why each of the others has not."""

    def __init__(self) -> None:
        self.written: list[Path] = []
        self.missing: list[tuple[Path, str]] = []

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
            raise UserError(self.sentence)
