"""Ctrl-C, SIGTERM and the closing of a terminal as a wish to stop, which a long job grants between two steps.

A program that a signal ended leaves with 128 + the signal's number, whatever it was doing: 130 after Ctrl-C, 143 after
SIGTERM, 129 after SIGHUP.
"""

import os
import signal as signals
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

WISHES = tuple(getattr(signals, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signals, name))
"""What ends a job early: the last is what a terminal that is closed sends; Windows has none."""


class Stop:
    """Which signal asked the job to end, if any."""

    signal: int | None = None

    @property
    def name(self) -> str:
        """The signal's name, such as "SIGINT"; "nothing" if none came."""
        return "nothing" if self.signal is None else signals.Signals(self.signal).name


class Interruption(KeyboardInterrupt):
    """A signal ended the job: Ctrl-C's exception, which knows what other signal it was."""

    def __init__(self, number: int) -> None:
        super().__init__(signals.Signals(number).name)
        self.signal = number


def signal_of(error: KeyboardInterrupt) -> int:
    """The number of the signal behind `error`; Python's own exception is SIGINT's."""
    return error.signal if isinstance(error, Interruption) else int(signals.SIGINT)


def raise_when_signalled() -> None:
    """From now on every one of `WISHES` raises in the main thread, as Ctrl-C does, so that files begun are put away.

    What is ignored stays so, and so does SIGINT, for which Python does this itself. A forked child dies of the signal.
    """
    parent = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:
            signals.signal(number, signals.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Interruption(number)

    for number in WISHES:
        if signals.getsignal(number) is signals.SIG_DFL:
            signals.signal(number, leave)


class StoppedError(Exception):
    """Leaves a part of a job that a signal asked to end."""


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Note the first of `WISHES` instead of dying of it; the second has its usual effect.

    What is ignored stays so: a job under `nohup` goes on when its terminal is closed. Outside the main thread, where
    Python lets nobody handle signals, it notes nothing.
    """
    stop = Stop()
    former: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        restore()

    def restore() -> None:
        while former:
            signals.signal(*former.popitem())

    if threading.current_thread() is threading.main_thread():
        for number in WISHES:
            if signals.getsignal(number) is not signals.SIG_IGN:
                former[number] = signals.signal(number, note)
    try:
        yield stop
    finally:
        restore()
