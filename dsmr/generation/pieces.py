"""What playing on writes: the whole, the continuation alone, and the picture, before they are files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.results import Results
from dsmr.console.shown import shown
from dsmr.music.pianoroll import draw_pianoroll, score_notes
from dsmr.music.sounding import ON, Sounding
from dsmr.music.tokenizer import decode, write_midi
from dsmr.music.vocabulary import Vocabulary

Note = tuple[int, int, int, int]  # time in ticks, pitch, velocity, duration in ticks (0 = not known yet)
RING_ON = 2.0  # seconds for which notes that are still held when the playing breaks off ring on


class Pieces:
    """The whole, the continuation alone, and the picture, before they are written."""

    def __init__(self, prompt: np.ndarray, made: np.ndarray, vocabulary: Vocabulary) -> None:
        self.whole = decode(np.concatenate([prompt, made]), vocabulary)
        self.join = float(vocabulary.clock(prompt)[-1])
        self.given = notes_of(prompt, vocabulary)
        self.prompt_notes = len(self.given)
        if "NoteOff" in vocabulary.type_names:
            let_go(self.whole, float(vocabulary.clock(np.concatenate([prompt, made]))[-1]) + RING_ON)

    def write_music(self, out: Path, results: Results) -> None:
        """The whole and the continuation alone, as MIDI."""
        whole, alone, _ = output_paths(out)
        cut = without(self.whole, self.given, round(self.join * self.whole.ticks_per_quarter * 2))
        results.write(whole, partial(write_midi, whole, self.whole))
        results.write(alone, partial(write_midi, alone, cut))

    def draw(self, out: Path) -> None:
        """The piano roll."""
        everything, rate = score_notes(self.whole), self.whole.ticks_per_quarter * 2
        rows = everything[["onset", "pitch", "velocity", "duration"]].tolist()
        notes = [(round(at * rate), pitch, velocity, round(lasts * rate)) for at, pitch, velocity, lasts in rows]
        is_prompt = np.array(of_prompt(notes, self.given), dtype=bool)
        draw_pianoroll(
            output_paths(out)[2],
            everything[is_prompt],
            continuation=everything[~is_prompt],
            continuation_from=self.join,
            title=f"{shown(out.stem)}: the prompt, continued",
        )


def let_go(score: Any, seconds: float) -> None:
    """End every note at `seconds` at the latest: where notes end by tokens, breaking off leaves some of them open."""
    end = round(seconds * score.ticks_per_quarter * 2)
    for track in score.tracks:
        for note in track.notes:
            note.duration = max(1, min(note.duration, end - note.time))


def output_paths(out: Path) -> tuple[Path, Path, Path]:
    """Where the whole, the continuation and the picture of `out` go."""
    return out, out.with_name(f"{out.stem}-continuation.mid"), out.with_suffix(".png")


def notes_of(tokens: np.ndarray, vocabulary: Vocabulary) -> list[Note]:
    """The notes that tokens begin, in their order. One that breaks off within its tokens is none; one that sounds on at
    their end is one (MIDILike), which `decode` has only beside notes that have ended.
    """
    sounding, rate = Sounding(vocabulary), vocabulary.ticks_per_second
    events = [event for token in tokens.tolist() for event in sounding.push(token) if event.kind == ON]
    return [(round(e.at * rate), e.pitch, e.velocity, round((e.seconds or 0) * rate)) for e in events]


def of_prompt(notes: Sequence[Note], given: Sequence[Note]) -> list[bool]:
    """Which of the whole's `notes` are the prompt's, of which there are as many as it has: `given`.

    Durations are asked last: with MIDILike a note of the prompt may end in the continuation. A note of the model's at
    the join, on a pitch that the prompt has struck there, stays its own.
    """
    found, waiting = [False] * len(notes), list(given)
    for alike in (4, 3):
        left = Counter(note[:alike] for note in waiting)
        for place, note in enumerate(notes):
            if not found[place] and left[note[:alike]]:
                left[note[:alike]] -= 1
                found[place] = True
        missed, waiting = waiting, []
        for note in missed:
            if left[note[:alike]]:
                left[note[:alike]] -= 1
                waiting.append(note)
    return found


def without(whole: Any, given: Sequence[Note], join: int) -> Any:
    """The notes of `whole` but those of the prompt, `given`, and its pedal from tick `join` on, which becomes 0.

    A pedal that is down there is down from the first moment, for as long as it is still held.
    """
    alone = whole.copy()
    notes = [(note.time, note.pitch, note.velocity, note.duration) for track in alone.tracks for note in track.notes]
    had = iter(of_prompt(notes, given))
    for track in alone.tracks:
        kept = [note for note in track.notes if not next(had)]
        pedals = [pedal for pedal in track.pedals if pedal.time + pedal.duration > join]
        for pedal in pedals:
            pedal.duration -= max(0, join - pedal.time)
        for event in (*kept, *pedals):
            event.time = max(0, event.time - join)
        track.notes = type(track.notes)(kept)
        track.pedals = type(track.pedals)(pedals)
    return alone
