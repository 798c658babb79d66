"""What stands in the bytes of a MIDI file: every note-on counted, without any library's help.

Written from the Standard MIDI File format 1.0 and knowing nothing of the reader that makes scores (symusic), so that
the two can be held against each other (`dsmr.music.midi_file`). All tracks are read, whatever the header counts;
running status goes on behind system-exclusive and meta events, as files that real programs wrote need it to; strikes
that nothing ends are ended by a stated rule rather than forgotten.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

LAST_TICK = 2**31 - 1  # what 32 bits hold: readers, ours among them, count ticks in them
MOST_TRACKS = 2**16 - 1  # what the header can count
DRUMS = 9  # the channel that General MIDI gives to percussion, counted from 0
PEDAL = 64  # the controller of the sustain pedal
SILENCE = (120, 123, 124, 125, 126, 127)  # "all sound off", "all notes off", and the modes that imply it
FRAME_RATES = {24: Fraction(24), 25: Fraction(25), 29: Fraction(30000, 1001), 30: Fraction(30)}
_DATA = {0xF1: 1, 0xF2: 2, 0xF3: 1}  # bytes behind a system message that has no business in a file


LARGEST = 1 << 23
"""Bytes that are read of one file: a hundred times a piece's usual, and places in it fit into 24 bits."""


class MidiBytesError(ValueError):
    """Bytes that cannot be read as one piece; the message says why, in words that follow the file's name and "is"."""


@dataclass(frozen=True)
class MidiBytes:
    """The events that decide what sounds, in the order of the file.

    `events` is (n, 5) int64: tick, track, status, and the two data bytes, of note-ons and, where they were asked for,
    note-offs and those controllers that end notes or move the pedal. A note-on of velocity 0 is a note-off.
    """

    kind: int  # the header's type: 0, 1 or 2
    tracks: int
    ticks_per_quarter: int  # where `per_second` is None
    per_second: Fraction | None  # ticks a second where the header counts in frames (SMPTE), which no tempo changes
    events: npt.NDArray[np.int64]
    tempos: npt.NDArray[np.int64]  # (m, 2): tick, microseconds a quarter note
    last_tick: int  # of the last event of any kind, the ends of the tracks among them
    behind_the_end: int  # note-ons that stand behind the end of their track, where nobody plays them
    pedal_stays_down: bool  # somewhere it is pushed and never let up

    @property
    def is_strike(self) -> npt.NDArray[np.bool_]:
        """Which events begin a note."""
        return (self.events[:, 2] >> 4 == 9) & (self.events[:, 4] > 0)

    def strikes(self) -> npt.NDArray[np.int64]:
        """(n, 4): tick, pitch, velocity, and whether it is percussion, in the order of the file."""
        found = self.events[self.is_strike]
        return np.stack([found[:, 0], found[:, 3], found[:, 4], found[:, 2] & 15 == DRUMS], axis=1)


@dataclass(frozen=True)
class Sounding:
    """Every strike with its end."""

    notes: npt.NDArray[np.int64]  # (n, 5): tick, ticks it lasts, pitch, velocity, whether it is percussion
    pedals: npt.NDArray[np.int64]  # (m, 2): tick, ticks it is held
    never_ended: int  # notes that nothing in the file ends


def read_bytes(data: bytes, *, ends: bool = True) -> MidiBytes:
    """The events of a MIDI file; without `ends` no more than note-ons and tempos, in less time.

    `MidiBytesError` for what is no MIDI file, is damaged, or is not one piece.
    """
    if len(data) > LARGEST:
        raise MidiBytesError(f"too large for one piece: more than {LARGEST >> 20} MiB")
    if len(data) < 14 or data[:4] != b"MThd":
        raise MidiBytesError("not a readable MIDI file: it does not begin with a MIDI header")
    length = int.from_bytes(data[4:8], "big")
    if length < 6 or 8 + length > len(data):
        raise MidiBytesError(f"not a readable MIDI file: its header claims {length:,} bytes")
    kind, division = int.from_bytes(data[8:10], "big"), int.from_bytes(data[12:14], "big")
    if kind > 2:
        raise MidiBytesError(f"not a readable MIDI file: it is of type {kind}, and there are types 0, 1 and 2")
    tracks: list[npt.NDArray[np.int64]] = []
    tempos: list[tuple[int, int]] = []
    last, behind, whole, down = 0, 0, True, False
    chunks, left_over = _tracks(data, 8 + length)
    for number, track in enumerate(chunks):
        events, tick, lost, whole, stays = _read_track(track, number, tempos, ends)
        tracks.append(events)
        last, behind, down = max(last, tick), behind + lost, down or stays
    if left_over and not whole:
        raise MidiBytesError(_wrong_length(len(chunks)))
    per_second = _frames(division) if division & 0x8000 else None
    if division == 0:
        raise MidiBytesError("without a measure of time: its header gives 0 ticks to a quarter note")
    if kind == 2 and sum(len(events) > 0 for events in tracks) > 1:
        raise MidiBytesError(
            f"not one piece: it is of type 2, {len(tracks)} sequences that do not belong together in time "
            "(save each as a file of type 0 or 1)"
        )
    found = np.concatenate(tracks) if tracks else np.zeros((0, 5), dtype=np.int64)
    if (found[:, 3:] > 127).any():
        raise MidiBytesError("damaged: a status byte stands where a pitch, velocity or value should")
    changes = np.array(tempos, dtype=np.int64).reshape(-1, 2)
    return MidiBytes(kind, len(tracks), division, per_second, found, changes, last, behind, down)


def _frames(division: int) -> Fraction:
    """Ticks a second of a header that counts in frames."""
    rate, ticks = 256 - (division >> 8), division & 0xFF
    if rate not in FRAME_RATES or ticks == 0:
        raise MidiBytesError(f"without a measure of time: its header claims {rate} frames a second of {ticks} ticks")
    return FRAME_RATES[rate] * ticks


def _wrong_length(number: int) -> str:
    return f"damaged: its track {number} does not end where its length says"


def _tracks(data: bytes, at: int) -> tuple[list[bytes], bool]:
    """The contents of every track chunk, as many as there are, and whether bytes stand behind the last chunk; chunks of
    other kinds are passed over."""
    found: list[bytes] = []
    whole = True  # whether the last track may have ended with the event that says so
    while at < len(data):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "big")
        is_chunk = at + 8 + length <= len(data) and all(32 <= letter < 127 for letter in name)
        if name == b"MTrk" and not is_chunk:
            raise MidiBytesError(f"not a readable MIDI file: its track {len(found) + 1} is cut short")
        if not is_chunk:
            # A few bytes behind the last track do no harm, unless they are music that a wrong length hides.
            if found and (not whole or b"MTrk" in data[at:]):
                raise MidiBytesError(_wrong_length(len(found)))
            return found, True
        if len(found) == MOST_TRACKS:
            raise MidiBytesError(f"damaged: it holds more than {MOST_TRACKS:,} tracks")
        if name == b"MTrk":
            found.append(data[at + 8 : at + 8 + length])
            whole = found[-1][-3:] == b"\xff\x2f\x00"
        at += 8 + length
    return found, False


def _read_track(
    data: bytes, number: int, tempos: list[tuple[int, int]], ends: bool
) -> tuple[npt.NDArray[np.int64], int, int, bool, bool]:
    """A track's events, the tick at which it ends, how many note-ons stand behind its end, whether its last event is
    that end, and whether the pedal of a channel is down there; tempos are appended."""
    # Lean on purpose, also where that is not pretty: this is run for every event of a corpus.
    found: list[int] = []  # tick, status, and the place of the first data byte, packed into one integer
    pedal: dict[int, int] = {}  # of each channel's status, where it was last
    ended: tuple[int, int] | None = None  # at which tick, and how many events were found until then
    whole = False
    append, size = found.append, len(data)
    at = tick = status = 0
    try:
        while at < size:
            byte = data[at]
            at += 1
            if byte < 0x80:
                tick += byte
            elif (low := data[at]) < 0x80:
                tick += (byte & 0x7F) << 7 | low
                at += 1
            else:
                delta, at = _number(data, at - 1)
                tick += delta
            byte = data[at]
            if byte >= 0x80:
                at += 1
                if byte >= 0xF0:
                    event = at
                    at = _pass_system(data, at, byte, tick, tempos if ended is None else [])
                    if byte == 0xFF and data[event:at] == b"\x2f\x00":
                        whole = at == size
                        ended = ended or (tick, len(found))
                    continue
                status = byte
            if status < 0xA0:
                if status >= 0x90 or (ends and status):
                    append(tick << 32 | status << 24 | at)
                elif status == 0:
                    raise MidiBytesError(f"damaged: its track {number + 1} holds data where an event should begin")
                at += 2
            elif 0xB0 <= status < 0xC0:
                if (byte := data[at]) == PEDAL and ended is None:
                    pedal[status] = data[at + 1]
                if ends and (byte == PEDAL or byte >= 120):
                    append(tick << 32 | status << 24 | at)
                at += 2
            else:
                at += 1 if 0xC0 <= status < 0xE0 else 2
        if at > size:
            raise IndexError
    except (IndexError, MidiBytesError) as error:
        # What stands behind the end of a track need not be music.
        if ended is None:
            cut = f"not a readable MIDI file: its track {number + 1} is cut short"
            raise MidiBytesError(cut if isinstance(error, IndexError) else str(error)) from error
    last, count = ended or (tick, len(found))
    if last > LAST_TICK:
        raise MidiBytesError(f"too long: it runs to tick {last:,}, and a MIDI reader counts to {LAST_TICK:,}")
    lost = sum(event >> 28 & 0xF == 9 and data[(event & 0xFFFFFF) + 1 :][:1] > b"\0" for event in found[count:])
    packed, values = np.array(found[:count], dtype=np.int64), np.frombuffer(data, dtype=np.uint8)
    events = np.empty((count, 5), dtype=np.int64)
    events[:, 0], events[:, 1], events[:, 2] = packed >> 32, number, packed >> 24 & 0xFF
    place = packed & 0xFFFFFF
    events[:, 3], events[:, 4] = values[place], values[place + 1]
    pedal.pop(0xB0 | DRUMS, None)
    return events, last, lost, whole, any(value >= 64 for value in pedal.values())


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends."""
    value = 0
    for place in range(at, at + 4):
        value = value << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return value, place + 1
    raise MidiBytesError("damaged: it holds a number of more than the four bytes that are allowed")


def _pass_system(data: bytes, at: int, status: int, tick: int, tempos: list[tuple[int, int]]) -> int:
    """Pass over a system-exclusive, meta or other system event whose status byte lies before `at`; keep a tempo. Where
    it ends may lie beyond the data."""
    if status not in (0xF0, 0xF7, 0xFF):
        return at + _DATA.get(status, 0)
    kind = None
    if status == 0xFF:
        kind = data[at]
        at += 1
    length, at = _number(data, at)
    if kind == 0x51:
        if length < 3:
            raise MidiBytesError("damaged: a change of tempo in it is cut short")
        tempos.append((tick, int.from_bytes(data[at : at + 3], "big")))
    return at + length


# Where notes end.

Voice = list[tuple[int, int | None]]
"""The strikes and ends of one pitch since it was last silent: tick, and the number of the strike, None for an end."""


def pair(midi: MidiBytes) -> Sounding:
    """Every strike with its end, the first struck of a pitch ending first.

    Strikes that are not all ended (fewer ends than strikes since the pitch was last silent) end at the next strike of
    their pitch, or at its end where that comes first, or at the end of the piece.
    """
    voices: dict[tuple[int, int, int], Voice] = {}  # by track, channel and pitch, of those that sound
    depth: dict[tuple[int, int, int], int] = {}  # strikes less ends, since the pitch was last silent
    sounding: dict[tuple[int, int], set[int]] = {}  # so that a million "all notes off" do not visit every pitch
    notes: list[list[int]] = []  # tick, tick of the end once that is known, pitch, velocity, whether it is percussion
    pedals: list[tuple[int, int]] = []
    held: dict[tuple[int, int], int] = {}
    for tick, track, status, one, two in _rows(midi.events):
        channel = status & 15
        if status < 0xB0:
            key = (track, channel, one)
            if status >= 0x90 and two:
                voices.setdefault(key, []).append((tick, len(notes)))
                notes.append([tick, tick, one, two, channel == DRUMS])
                depth[key] = depth.get(key, 0) + 1
                sounding.setdefault((track, channel), set()).add(one)
            elif key in voices:
                voices[key].append((tick, None))
                depth[key] -= 1
                if depth[key] == 0:
                    _end_in_order(voices.pop(key), notes)
        elif one == PEDAL:
            if channel == DRUMS:
                continue  # it is the piano's that is asked for
            if two >= 64:
                held.setdefault((track, channel), tick)
            elif (start := held.pop((track, channel), None)) is not None:
                pedals.append((start, tick - start))
        elif one in SILENCE:
            for pitch in sounding.pop((track, channel), ()):
                if (key := (track, channel, pitch)) in voices:
                    _end_by(tick, voices.pop(key), notes)
                    del depth[key]
    pedals += [(start, midi.last_tick - start) for start in held.values() if start < midi.last_tick]
    for voice in voices.values():
        _end_by(midi.last_tick, voice, notes)
    never = sum(depth.values())
    table = np.array(notes, dtype=np.int64).reshape(-1, 5)
    table[:, 1] -= table[:, 0]
    return Sounding(table, np.array(pedals, dtype=np.int64).reshape(-1, 2), never)


def _rows(events: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """The rows as lists; not all at once, which would take twenty times the array's memory."""
    for start in range(0, len(events), 1 << 16):
        yield from events[start : start + (1 << 16)].tolist()


def _end_in_order(voice: Voice, notes: list[list[int]]) -> None:
    """Each strike of a pitch has its end, the first the first."""
    begun = [strike for _, strike in voice if strike is not None]
    for strike, end in zip(begun, (tick for tick, strike in voice if strike is None), strict=True):
        notes[strike][1] = end


def _end_by(last: int, voice: Voice, notes: list[list[int]]) -> None:
    """Of a pitch's strikes some have no end: each ends with what comes next of its pitch, at the latest at `last`."""
    following = [*(tick for tick, _ in voice[1:]), last]
    for (_, strike), end in zip(voice, following, strict=True):
        if strike is not None:
            notes[strike][1] = end
