"""A MIDI file that grows with the music and is valid at any moment, whenever the program is stopped or killed."""

from __future__ import annotations

import heapq
import os
import struct
import time
from collections.abc import Iterable

from dsmr.console.files import atomic_path
from dsmr.music.sounding import OFF, ON, Event

TICKS_A_SECOND = 1000
TICKS_PER_QUARTER = TICKS_A_SECOND // 2  # at 120 quarter notes a minute, MIDI's own default tempo
END_OF_TRACK = b"\x00\xff\x2f\x00"


def variable_length(value: int) -> bytes:
    """A number as MIDI files write delta times: seven bits a byte, all but the last marked."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


class Recorder:
    """Takes events in the order of the tokens and rewrites the file whole (see `dsmr.console.files.atomic_path`).

    Args:
        every: seconds between two writings, so that a long piece is not written for every note.
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 1.0) -> None:
        self.path, self.every = path, every
        self._written = bytearray()
        self._last = 0  # the tick of the last event written
        self._ahead: list[Event] = []
        self._sounding: list[int] = []
        self._saved_at = -float("inf")

    def add(self, events: Iterable[Event], now: float) -> None:
        """Take in events; none that comes later will lie before `now`, in seconds of the piece."""
        for event in events:
            heapq.heappush(self._ahead, event)
        while self._ahead and self._ahead[0].at < now:
            self._append(self._written, heapq.heappop(self._ahead))

    def _append(self, track: bytearray, event: Event) -> None:
        tick = max(round(event.at * TICKS_A_SECOND), self._last)
        status = {ON: 0x90, OFF: 0x80}.get(event.kind, 0xB0)
        track += variable_length(tick - self._last) + bytes((status, event.pitch, event.velocity))
        self._last = tick
        if event.kind == ON:
            self._sounding.append(event.pitch)
        elif event.kind == OFF and event.pitch in self._sounding:
            self._sounding.remove(event.pitch)

    def save(self, force: bool = False) -> None:
        """Write the file if it is time to; notes that still sound in it end when the last event does."""
        if not force and time.monotonic() - self._saved_at < self.every:
            return
        last, sounding = self._last, list(self._sounding)
        rest = bytearray()
        for event in sorted(self._ahead):
            self._append(rest, event)
        for pitch in list(self._sounding):
            self._append(rest, Event(self._last / TICKS_A_SECOND, OFF, pitch))
        self._last, self._sounding = last, sounding
        track = bytes(self._written + rest) + END_OF_TRACK
        head = b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS_PER_QUARTER)
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(head + b"MTrk" + struct.pack(">I", len(track)) + track)
        self._saved_at = time.monotonic()
