"""Small scores and MIDI files made of random notes, for the tests of `dsmr.music` and `dsmr.corpus`."""

from pathlib import Path
from typing import Any

import numpy as np
import symusic


def random_score(seed: int = 0, n: int = 120, pedals: bool = True, tpq: int = 480) -> Any:
    """One piano track at 120 qpm with chords, repeated notes, overlaps and pauses."""
    rng = np.random.default_rng(seed)
    score = symusic.Score(tpq)
    score.tempos.append(symusic.Tempo(0, 120))
    track = symusic.Track(program=0, is_drum=False, name="piano")
    time = int(rng.integers(0, 2 * tpq))
    for _ in range(n):
        length = int(rng.integers(1, 3 * tpq))
        track.notes.append(symusic.Note(time, length, int(rng.integers(21, 109)), int(rng.integers(1, 128))))
        time += int(rng.choice([0, 0, 1, 7, tpq // 4, tpq // 2, tpq, 9 * tpq]))
    if pedals:
        for start in range(0, time, 3 * tpq):
            track.controls.append(symusic.ControlChange(start, 64, 127))
            track.controls.append(symusic.ControlChange(start + 2 * tpq, 64, 0))
    score.tracks.append(track)
    return score


def score_of(notes: list[tuple[float, float, int]], **track: Any) -> Any:
    """A score at 120 qpm of (onset in seconds, duration in seconds, pitch), on a grid of a millisecond."""
    score = symusic.Score(500)
    score.tempos.append(symusic.Tempo(0, 120))
    made = symusic.Track(**{"program": 0, "is_drum": False, **track})
    for onset, duration, pitch in notes:
        made.notes.append(symusic.Note(round(onset * 1000), round(duration * 1000), pitch, 64))
    score.tracks.append(made)
    return score


def write_folder(folder: Path, count: int, n: int = 40) -> Path:
    """A folder with `count` MIDI files, some of them one level down."""
    for i in range(count):
        path = folder / ("deeper" if i % 3 == 0 else ".") / f"piece-{i:02d}.{'midi' if i % 2 else 'mid'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_score(i, n).dump_midi(str(path))
    return folder


def onsets_and_pitches(score: Any) -> list[tuple[float, int]]:
    """(seconds, pitch) of every note, in order; for scores at a constant 120 qpm."""
    found = ((note.time / score.ticks_per_quarter / 2, note.pitch) for track in score.tracks for note in track.notes)
    return sorted(found)
