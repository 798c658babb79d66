"""MIDI files written byte by byte, as no library would write them, for the tests of what is read from bad ones."""

import struct

QUARTER = 480  # ticks; at 120 quarters a minute half a second


def number(value: int) -> bytes:
    """A number of variable length."""
    out = bytes([value & 0x7F])
    while value := value >> 7:
        out = bytes([value & 0x7F | 0x80]) + out
    return out


def on(pitch: int, velocity: int = 64, channel: int = 0) -> bytes:
    return bytes([0x90 | channel, pitch, velocity])


def off(pitch: int, channel: int = 0) -> bytes:
    return bytes([0x80 | channel, pitch, 0])


def tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


def track(*events: tuple[int, bytes], end: bool = True) -> bytes:
    """A chunk of (ticks since the last event, the event's bytes)."""
    body = b"".join(number(delta) + event for delta, event in events) + (b"\0\xff\x2f\0" if end else b"")
    return b"MTrk" + struct.pack(">I", len(body)) + body


def midi(*tracks: bytes, kind: int = 1, count: int | None = None, division: int = QUARTER) -> bytes:
    """A file; `count` is how many tracks its header claims."""
    return b"MThd" + struct.pack(">IHHH", 6, kind, len(tracks) if count is None else count, division) + b"".join(tracks)


def melody(*pitches: int, beat: int = QUARTER, rest: int = 0) -> list[tuple[int, bytes]]:
    """The events of notes one after another, each `beat` ticks long."""
    return [event for pitch in pitches for event in ((rest, on(pitch)), (beat, off(pitch)))]
