"""One process at a time: lock files that the system lets go of when their holder ends, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # where the system has no such locks, nothing is locked
    fcntl = None  # type: ignore[assignment]

from dsmr.console.errors import UserError
from dsmr.console.files import describe

NAME = ".lock"


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` for this process alone; it is gone afterwards.

    Yields whether it is held, which it always is with `wait`. The holder's process id stands in the file. A file that a
    killed process left is nobody's lock and is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+", encoding="ascii") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks
                pass
            if not _is(path, file.fileno()):  # its holder took it away a moment ago: another may hold a new one
                continue
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            try:
                yield True
            finally:
                with contextlib.suppress(OSError):  # a system that keeps open files: the next one takes it over
                    path.unlink(missing_ok=True)
            return


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def holder(path: Path) -> str:
    """Who holds the lock file `path`, in words."""
    try:
        process = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        process = ""
    return f"process {process}" if process else "another process"


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Work in `folder` as the only process of its kind: `what` says what the other one does where there is one.

    A folder that was made for it and stays empty is taken away again. Raises `UserError` if another process works
    there, or if the folder cannot be written.
    """
    path, new = folder / NAME, not folder.exists()
    lock = locked(path, wait=False)
    try:
        alone = lock.__enter__()
    except OSError as error:
        raise UserError(f"cannot write {path}: {describe(error)}") from error
    try:
        with contextlib.ExitStack() as stack:
            stack.push(lock.__exit__)
            if not alone:
                raise UserError(f"{what} in {folder} ({holder(path)}): wait for it, or choose another folder")
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # what was put there stays
                folder.rmdir()
