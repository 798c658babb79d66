"""A MIDI file as a score, read twice: by symusic, and from its bytes by our own reader (`dsmr.music.midi_bytes`).

Where both find the same notes and tempos, symusic's score stands, with our pedals where one is never let up (symusic
forgets it). Where they differ (symusic forgets notes that nothing ends, reads no more tracks than the header names,
cannot read frames a second) the score is made of the bytes. So every note-on of a file is in the score, or counted as
left out, or the file is refused with the reason.
"""

import importlib
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.console.files import describe
from dsmr.music.midi_bytes import LARGEST, MidiBytes, MidiBytesError, pair, read_bytes

NO_END = "without an end (ended by the next of their pitch, or with the piece)"
MOST_NOTES = 250_000  # of one file, some seven hours of playing; they take 200 MB while they are tokenised


@dataclass(frozen=True)
class MidiFile:
    """A file's score, and what became of its notes on the way."""

    score: Any  # symusic.Score
    n_begun: int  # note-ons in the bytes
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> note-ons that are not in the score
    changed: dict[str, int] = field(default_factory=dict)  # what the score tells otherwise -> number of notes


def require(module: str) -> Any:
    """Import a module that reading or writing MIDI needs; `UserError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading or writing MIDI needs {module}, which is not installed: {error}") from error


def read_file(path: str | os.PathLike[str]) -> MidiFile:
    """Read a MIDI file; `UserError` naming the file and the reason if it cannot be read right, or is too large."""
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)  # never more, whatever lies there; what is too much is refused
    except OSError as error:
        raise UserError(f"cannot read {os.fspath(path)}: {describe(error)}") from error
    try:
        return read_data(data)
    except MidiBytesError as error:
        raise UserError(f"{os.fspath(path)} is {error}") from error


def read_data(data: bytes) -> MidiFile:
    """Read the bytes of a MIDI file; `MidiBytesError` with the reason if they cannot be read right."""
    symusic = require("symusic")
    midi = read_bytes(data, ends=False)
    n_strikes = int(midi.is_strike.sum())
    if n_strikes > MOST_NOTES:
        raise MidiBytesError(f"too large for one piece: it holds {n_strikes:,} notes, more than {MOST_NOTES:,}")
    _check_tempos(midi)
    dropped = {"behind the end of their track": midi.behind_the_end} if midi.behind_the_end else {}
    n_begun = n_strikes + midi.behind_the_end
    if midi.per_second is None:
        try:
            score = symusic.Score.from_midi(data)
        except Exception:  # it reads less than we do; what neither can read has been refused
            score = None
        if score is not None and _agree(score, midi):
            if midi.pedal_stays_down:  # symusic knows the pedals that are let up
                _put_pedals(score, pair(read_bytes(data)).pedals)
            _check_pedals(sum(len(track.pedals) for track in score.tracks))
            return MidiFile(score, n_begun, dropped)
    midi = read_bytes(data)
    sounding = pair(midi)
    _check_pedals(len(sounding.pedals))
    changed = {NO_END: sounding.never_ended} if sounding.never_ended else {}
    return MidiFile(_score_of(midi, sounding.notes, sounding.pedals), n_begun, dropped, changed)


def count_begun(path: str | os.PathLike[str]) -> int:
    """The note-ons of a file that was refused, 0 where its bytes cannot be read."""
    try:
        with open(path, "rb") as file:
            midi = read_bytes(file.read(LARGEST), ends=False)
        return int(midi.is_strike.sum()) + midi.behind_the_end
    except Exception:
        return 0


def _check_tempos(midi: MidiBytes) -> None:
    """`MidiBytesError` if time stands still: a tempo of 0 microseconds a quarter note, followed by anything."""
    if midi.per_second is not None or not len(midi.tempos):
        return
    tempos = midi.tempos[np.argsort(midi.tempos[:, 0], kind="stable")]
    following = np.append(tempos[1:, 0], midi.last_tick)
    still = (tempos[:, 1] == 0) & (following > tempos[:, 0])
    if still.any():
        tick = int(tempos[still.argmax(), 0])
        raise MidiBytesError(f"without a measure of time: from tick {tick:,} on its tempo is 0")


def _check_pedals(count: int) -> None:
    if count > MOST_NOTES:
        raise MidiBytesError(f"too large for one piece: it holds the pedal {count:,} times, more than {MOST_NOTES:,}")


def _agree(score: Any, midi: MidiBytes) -> bool:
    """Whether symusic found exactly the note-ons and tempos that stand in the bytes."""
    if score.ticks_per_quarter != midi.ticks_per_quarter:
        return False
    tempos = score.tempos.numpy()
    if not np.array_equal(_sorted(tempos["time"], tempos["mspq"]), _sorted(*midi.tempos.T)):
        return False
    found = []
    for track in score.tracks:
        notes = track.notes.numpy()
        drum = np.full(len(track.notes), track.is_drum)
        found.append(_packed(notes["time"], notes["pitch"], notes["velocity"], drum))
    theirs = np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)
    return np.array_equal(theirs, np.sort(_packed(*midi.strikes().T)))


def _put_pedals(score: Any, pedals: npt.NDArray[np.int64]) -> None:
    """Give the score's first track of the piano these pedals, and the others none."""
    for track in score.tracks:
        if not track.is_drum:
            track.pedals = _as_pedals(pedals)
            pedals = pedals[:0]


def _as_pedals(pedals: npt.NDArray[np.int64]) -> Any:
    time, duration = pedals.T.astype(np.int32)
    return require("symusic").Pedal.from_numpy(time=time, duration=duration)


def _sorted(ticks: npt.NDArray[Any], tempos: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Changes of tempo in the order of time, those of one tick in the order in which they came."""
    return np.stack([ticks, tempos]).astype(np.int64)[:, np.argsort(ticks, kind="stable")]


def _packed(*columns: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Tick, pitch, velocity and percussion of every strike as one number, for sorting."""
    tick, pitch, velocity, drum = (column.astype(np.int64) for column in columns)
    return tick << 15 | pitch << 8 | velocity << 1 | drum


def _score_of(midi: MidiBytes, notes: npt.NDArray[np.int64], pedals: npt.NDArray[np.int64]) -> Any:
    """A `symusic.Score` of what stands in the bytes: a track of the piano, and of percussion where there is any."""
    symusic = require("symusic")
    if midi.per_second is None:
        score = symusic.Score(midi.ticks_per_quarter)
        tempos = midi.tempos
    else:  # a quarter note of nearly a second, so that its ticks are whole
        quarter = round(midi.per_second)
        score = symusic.Score(quarter)
        tempos = np.array([[0, round(quarter * 1_000_000 / midi.per_second)]])
    score.tempos = symusic.Tempo.from_numpy(time=tempos[:, 0].astype(np.int32), mspq=tempos[:, 1].astype(np.int32))
    for is_drum in (False, True):
        these = notes[(notes[:, 4] != 0) == is_drum]
        if is_drum and not len(these):
            continue
        track = symusic.Track(program=0, is_drum=is_drum)
        if len(these):
            tick, length, pitch, velocity = these[:, :4].T
            track.notes = symusic.Note.from_numpy(
                time=tick.astype(np.int32),
                duration=length.astype(np.int32),
                pitch=pitch.astype(np.int8),
                velocity=velocity.astype(np.int8),
            )
        if len(pedals) and not is_drum:
            track.pedals = _as_pedals(pedals)
        score.tracks.append(track)
    return score
