"""Expressive performance: from notes on paper to onsets, durations and velocities as a pianist would play them.

Time is counted in hundredths of a second and velocity in steps of four, exactly what the default tokeniser can tell
apart, so that a repeated passage repeats token by token. Only sums, products and divisions are used, so the same
numbers come out on every machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dsmr.composer.dice import Dice
from dsmr.composer.figures import Written
from dsmr.composer.harmony import Chord, Passage

LONG = 100  # hundredths; the tokeniser counts longer durations in steps of COARSE
COARSE = 5
_PHRASE = 4  # bars
_SOFTEST, _LOUDEST = 4, 29  # velocity bins of 4 k + 3


class Played(NamedTuple):
    """A note as performed, times in hundredths of a second from the section's beginning."""

    onset: int
    length: int
    pitch: int
    velocity: int


@dataclass(frozen=True)
class Touch:
    """How a passage is played: `beat` in hundredths of a second, how freely the tempo moves, how loud, how bound."""

    beat: float
    rubato: float
    unrest: float
    loudness: float
    swell: float
    legato: float
    ritard: float

    @classmethod
    def drawn(cls, dice: Dice, beat: float, loudness: float) -> "Touch":
        """A touch of its own around a tempo and a loudness."""
        return cls(
            beat=beat,
            rubato=dice.between(0.05, 0.18),
            unrest=dice.between(0.01, 0.04),
            loudness=loudness,
            swell=dice.between(-8.0, 14.0),
            legato=dice.between(0.6, 1.02),
            ritard=dice.between(0.1, 0.4),
        )


class Clock:
    """The tempo curve of one performed passage: slower at both ends of a phrase, unsteady, broadening at the close."""

    def __init__(self, dice: Dice, passage: Passage, touch: Touch) -> None:
        self._tick = passage.metre.beat
        beats = passage.bars * passage.metre.beats
        phrase = _PHRASE * passage.metre.beats
        drift, self._times = 0.0, [3.0]  # room for notes that come early
        for beat in range(beats):
            place = 2.0 * ((beat % phrase) + 0.5) / phrase - 1.0
            drift = 0.7 * drift + touch.unrest * dice.bell()
            broaden = touch.ritard * max(0.0, 1.0 - (beats - beat) / (passage.metre.beats + 1.0))
            factor = 1.0 + touch.rubato * (place * place - 0.33) + drift + broaden
            self._times.append(self._times[-1] + touch.beat * factor)
        self.end = self._times[-1]

    def at(self, tick: int) -> float:
        """Hundredths of a second at a tick of the passage."""
        beat, rest = divmod(tick, self._tick)
        if beat >= len(self._times) - 1:
            return self.end
        return self._times[beat] + (self._times[beat + 1] - self._times[beat]) * rest / self._tick


def velocity(loudness: float) -> int:
    """The nearest velocity that the tokeniser's 32 levels hold, between very soft and very loud."""
    level = int((loudness - 3.0) / 4.0 + 0.5)
    return 4 * min(max(level, _SOFTEST), _LOUDEST) + 3


def play(dice: Dice, notes: Sequence[Written], passage: Passage, clock: Clock, touch: Touch) -> list[Played]:
    """Perform the notes of one hand."""
    metre, phrase = passage.metre, _PHRASE * passage.metre.bar
    played = []
    for tick, length, pitch, weight in notes:
        start = clock.at(tick)
        lead = 1.0 if weight == 3 else 0.0
        onset = int(start - lead + 1.7 * dice.bell() + 0.5)
        held = (clock.at(tick + length) - start) * touch.legato * (1.0 + 0.12 * dice.bell())
        place = 2.0 * (tick % phrase) / phrase - 1.0
        accent = 4.0 if tick % metre.bar == 0 else (0.0 if tick % metre.beat == 0 else -3.0)
        loud = touch.loudness + touch.swell * (0.5 - place * place) + 5.0 * weight + accent + 6.0 * dice.bell()
        played.append(Played(max(0, onset), max(4, int(held + 0.5)), pitch, velocity(loud)))
    return played


def settled(notes: Sequence[Played], end: int) -> list[Played]:
    """The notes in the order of their onsets, none sounding past `end` or into the next note of the same pitch.

    A note that would restart a pitch within 50 ms is dropped (both hands on one key), and durations above a second
    are cut to the tokeniser's coarser grid.
    """
    kept: list[Played] = []
    latest: dict[int, int] = {}
    for note in sorted(notes, key=lambda n: (n.onset, n.pitch, -n.length)):
        before = latest.get(note.pitch)
        if before is not None:
            gap = note.onset - kept[before].onset
            if gap < 5:
                continue
            if kept[before].length >= gap:
                kept[before] = kept[before]._replace(length=gap - 1)
        latest[note.pitch] = len(kept)
        kept.append(note)
    return [note._replace(length=_on_grid(min(note.length, end - 1 - note.onset))) for note in kept]


def _on_grid(length: int) -> int:
    """A duration that the tokeniser holds exactly."""
    return length if length <= LONG else length // COARSE * COARSE


def pedalled(dice: Dice, chords: Sequence[Chord], clock: Clock) -> list[tuple[int, int]]:
    """Onsets and lengths of the sustain pedal: down just after each chord begins, up just before the next."""
    pedals = []
    for chord in chords:
        down = int(clock.at(chord.tick)) + 4 + dice.below(5)
        up = int(clock.at(chord.tick + chord.length)) - 1 - dice.below(4)
        if up - down >= 10:
            pedals.append((down, up - down))
    return pedals


def held(notes: Sequence[Played], since: int, end: int) -> list[Played]:
    """The notes, those that begin at `since` or later ringing on to `end`, as under the last fermata of a piece."""
    return [note._replace(length=end - 1 - note.onset) if note.onset >= since else note for note in notes]


def ornamented(dice: Dice, melody: Sequence[Played], passage: Passage) -> list[Played]:
    """A performed melody with mordents, turns and grace notes on some of its longer notes, the others untouched."""
    scale = {passage.key.pitch(step) % 12 for step in range(7)}
    notes: list[Played] = []
    for note in melody:
        kind = dice.pick(("mordent", "turn", "grace")) if note.length >= 30 and dice.chance(0.5) else "plain"
        upper = next(note.pitch + up for up in (1, 2, 3) if (note.pitch + up) % 12 in scale)
        lower = next(note.pitch - down for down in (1, 2, 3) if (note.pitch - down) % 12 in scale)
        around = {"mordent": (note.pitch, upper), "turn": (upper, note.pitch, lower), "grace": (lower,), "plain": ()}
        onset = note.onset
        for pitch in around[kind]:
            short = 7 + dice.below(3)
            notes.append(Played(onset, short - 1, pitch, note.velocity))
            onset += short
        notes.append(note._replace(onset=onset, length=note.length - (onset - note.onset)))
    return notes
