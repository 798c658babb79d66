"""How the programs of this package write a file: whole or not at all, and nothing of a killed one stays."""

import contextlib
import hashlib
import os
import re
import socket
import sys
import tempfile
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in one step, making its folder where it is missing.

    What a killed process of this machine had not finished writing there is deleted on the way.

    Raises:
        OSError: if it cannot be written; what was there before is then still there.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    begin = f".{target.stem}-{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-"
    _sweep(target.parent, begin)
    prefix = f"{begin}{os.getpid()}-"
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=prefix, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(file.name, 0o666 & ~umask)
            os.replace(file.name, target)
        except OSError:
            os.unlink(file.name)
            raise


def _sweep(folder: Path, begin: str) -> None:
    if sys.platform == "win32":  # no harmless way to ask whether a process lives
        return
    ours = re.compile(rf"{re.escape(begin)}(\d+)-[a-z0-9_]{{8}}")
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if found := ours.fullmatch(name):
                try:
                    os.kill(int(found[1]), 0)
                except ProcessLookupError:
                    (folder / name).unlink(missing_ok=True)
                except (OSError, OverflowError):  # another user's process
                    pass
