"""A MIDI file that grows with the music and is valid at any moment, whenever the program is stopped or killed."""

from __future__ import annotations

import errno
import heapq
import os
import struct
import time
from collections.abc import Iterable

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, describe
from dsmr.music.sounding import OFF, ON, Event

TICKS_A_SECOND = 1000
TICKS_PER_QUARTER = TICKS_A_SECOND // 2  # at 120 quarter notes a minute, MIDI's own default tempo
END_OF_TRACK = b"\x00\xff\x2f\x00"
CHUNK = 1 << 13  # bytes of events in a track, about a minute of them
MOST_OPEN = 8  # tracks in progress
MOST_TRACKS = 0xFFFF
COUNT_AT = 10  # where the number of tracks stands in a file
SYNCED = 30.0  # seconds after which what was written must also survive a power cut


def variable_length(value: int) -> bytes:
    """A number as MIDI files write delta times: seven bits a byte, all but the last marked."""
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(reversed(groups))


class _Track:
    """Events one after another, each with the ticks since the one before it, and what sounds at their end."""

    def __init__(self) -> None:
        self.events = bytearray()
        self.last = 0  # tick of the last event
        self.sounding: list[int] = []

    def copy(self) -> _Track:
        other = _Track()
        other.events, other.last, other.sounding = self.events[:], self.last, self.sounding[:]
        return other

    def put(self, event: Event) -> None:
        tick = max(round(event.at * TICKS_A_SECOND), self.last)
        status = {ON: 0x90, OFF: 0x80}.get(event.kind, 0xB0)
        self.events += variable_length(tick - self.last) + bytes((status, event.pitch, event.velocity))
        self.last = tick
        if event.kind == ON:
            self.sounding.append(event.pitch)
        elif event.kind == OFF and event.pitch in self.sounding:
            self.sounding.remove(event.pitch)

    def silence(self, at: float) -> None:
        """End what sounds, and so the track."""
        for pitch in list(self.sounding):
            self.put(Event(at, OFF, pitch))

    def chunk(self) -> bytes:
        """As a file has it."""
        return b"MTrk" + struct.pack(">I", len(self.events) + len(END_OF_TRACK)) + self.events + END_OF_TRACK


def _put(tracks: list[_Track], event: Event) -> None:
    """A note ends in the track that it began in: readers match the two within a track. All else goes to the newest."""
    ends = event.kind == OFF
    next((track for track in tracks if ends and event.pitch in track.sounding), tracks[-1]).put(event)


class Recorder:
    """Takes events in the order of the tokens and keeps a file of them up to date.

    The file is a MIDI file of format 1, and each of its tracks holds what begins in a stretch of the music. A track
    whose notes have ended is never written again: a writing costs the same after an hour as after a minute, and memory
    does not grow. The tracks in progress are written, to the file's end, by one call, for which room was made before; a
    new track is written before the header counts it.

    Args:
        every: seconds between two writings, so that a long piece is not written for every note.
        chunk: bytes of events after which a new track is begun.
    """

    def __init__(self, path: str | os.PathLike[str], every: float = 1.0, chunk: int = CHUNK) -> None:
        self.path, self.every, self.chunk = path, every, chunk
        self._open = [_Track()]  # the tracks in progress, of which the last one grows
        self._done: list[bytes] = []  # tracks that were finished since the last writing
        self._tracks = 1
        self._ahead: list[Event] = []
        self._saved_at = self._synced_at = -float("inf")
        self._begin = 14  # of the tracks in progress, in the file
        self._length = self._counted = 0  # of the file, and how many tracks its header counts

    def add(self, events: Iterable[Event], now: float) -> None:
        """Take in events; none that comes later will lie before `now`, in seconds of the piece."""
        for event in events:
            heapq.heappush(self._ahead, event)
        while self._ahead and self._ahead[0].at < now:
            _put(self._open, heapq.heappop(self._ahead))
        if len(self._open[-1].events) >= self.chunk and self._tracks < MOST_TRACKS:
            self._open.append(_Track())
            self._tracks += 1
            if len(self._open) > MOST_OPEN:  # a note that does not end must not keep all that follows
                self._open[0].silence(now)
        while len(self._open) > 1 and not self._open[0].sounding:
            self._done.append(self._open.pop(0).chunk())

    def _provisional(self) -> bytes:
        """The tracks in progress as if the music ended with the last event known: what still sounds then ends."""
        tracks = [track.copy() for track in self._open]
        for event in sorted(self._ahead):
            _put(tracks, event)
        end = max(track.last for track in tracks) / TICKS_A_SECOND
        for track in tracks:
            track.silence(end)
        return b"".join(track.chunk() for track in tracks)

    def save(self, force: bool = False) -> None:
        """Write the file if it is time to; notes that still sound in it end when the last event does.

        Raises `UserError` if it cannot be written, or if another program has put another file in its place or taken it
        away; what was written before stays.
        """
        now = time.monotonic()
        if not force and now - self._saved_at < self.every:
            return
        done = b"".join(self._done)
        tail = done + self._provisional()
        try:
            if self._length == 0:
                head = b"MThd" + struct.pack(">IHHH", 6, 1, self._tracks, TICKS_PER_QUARTER)
                with atomic_path(self.path) as temporary:  # whatever was there before stays until this is whole
                    temporary.write_bytes(head + tail)
                self._file = os.stat(self.path)
            else:
                self._patch(tail, force or now - self._synced_at >= SYNCED)
        except OSError as error:
            raise UserError(f"cannot write {os.fspath(self.path)}: {describe(error)}") from error
        if self._length == 0 or force or now - self._synced_at >= SYNCED:
            self._synced_at = now
        self._length = self._begin + len(tail)
        self._begin += len(done)
        self._done.clear()
        self._counted = self._tracks
        self._saved_at = time.monotonic()

    def _patch(self, tail: bytes, sync: bool) -> None:
        with open(self.path, "rb+", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not os.path.samestat(found, self._file) or found.st_size != self._length:
                raise UserError(f"{os.fspath(self.path)} was changed by another program while it was written")
            _take_room(file.fileno(), self._length, self._begin + len(tail))
            file.seek(self._begin)
            file.write(tail)
            if self._begin + len(tail) < self._length:
                file.truncate(self._begin + len(tail))
            if self._tracks != self._counted:
                file.seek(COUNT_AT)
                file.write(struct.pack(">H", self._tracks))
            if sync:
                os.fsync(file.fileno())


def _take_room(handle: int, length: int, wanted: int) -> None:
    """Make a file as long as it is going to be, or raise `OSError` and leave it as it was: nothing that is there may be
    written over before there is room for all that comes in its place."""
    if wanted <= length:
        return
    try:
        written = os.pwrite(handle, bytes(wanted - length), length)
    except OSError:
        os.ftruncate(handle, length)
        raise
    if written < wanted - length:
        os.ftruncate(handle, length)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
