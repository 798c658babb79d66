"""What a test lets take its course, within bounds: so much memory beyond what the process has, and so much time.

Memory is bounded as Linux does it, for the whole process; time by a signal, and so in the main thread.
"""

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch._dynamo  # now: what is interrupted while it is imported stays half a module  # noqa: F401

AGAIN = 1.0
"""Seconds after which `late` is raised once more: what is raised in a callback of the garbage collector is lost."""


@contextlib.contextmanager
def bounded(room: int, seconds: float, late: BaseException, *, computing: bool = False) -> Iterator[None]:
    """No more than `room` bytes, beyond which is a MemoryError; after `seconds`, waiting included unless `computing`,
    `late` is raised."""

    inside = True

    def leave(*_: Any) -> None:
        if inside:
            raise late

    timer, number = signal.ITIMER_REAL, signal.SIGALRM
    if computing:
        timer, number = signal.ITIMER_PROF, signal.SIGPROF
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    former = signal.signal(number, leave)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (held + room, limits[1]))
        signal.setitimer(timer, seconds, AGAIN)
        try:
            yield
        finally:  # of its own, so that whatever is raised in it the bounds are taken away
            inside = False
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, former)
        resource.setrlimit(resource.RLIMIT_AS, limits)
