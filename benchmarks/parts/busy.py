"""A busy machine, made: one program that spins on one core, as a laptop's other programs do."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

SPINNING = "one single-threaded program spinning beside"


@contextlib.contextmanager
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    """Run a single-threaded program that never rests, on whatever core the system gives it, and end it."""
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield program
    finally:
        program.kill()
        program.wait()
