"""Accompaniment figures: what the left hand does with a chord, drawn anew for every piece and every episode.

A figure is two bars of slots; a slot names voices of whatever chord sounds there. Voice 0 is the bass, −1 the bass an
octave lower, 1, 2, 3, … the chord's notes upwards from the figure's floor.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dsmr.composer.dice import Dice
from dsmr.composer.harmony import Chord, Key, Passage
from dsmr.composer.melody import chord_at
from dsmr.composer.themes import QUARTER, Metre, Tone

_BARS = 2


class Written(NamedTuple):
    """A note on paper: ticks from the passage's beginning, and how strongly it is to be played (0 is usual)."""

    tick: int
    length: int
    pitch: int
    weight: int


class Slot(NamedTuple):
    """Where in the two bars which voices of the chord sound."""

    tick: int
    length: int
    voices: tuple[int, ...]


@dataclass(frozen=True)
class Figure:
    """An accompaniment pattern with its register."""

    slots: tuple[Slot, ...]
    bass_floor: int
    floor: int
    freedom: float  # how often a slot leaves the pattern


def _grids(metre: Metre) -> tuple[tuple[int, float], ...]:
    """Ticks between slots, with weights."""
    if metre.beat == QUARTER:
        return ((QUARTER // 2, 5.0), (QUARTER // 3, 1.5), (QUARTER // 4, 1.5), (QUARTER, 1.0))
    return ((QUARTER // 2, 5.0), (QUARTER // 4, 1.0))


def _wander(dice: Dice, count: int) -> list[tuple[int, ...]]:
    """`count` single voices that climb and fall at random."""
    voice = dice.pick((1, 2, 3))
    voices: list[tuple[int, ...]] = []
    for _ in range(count):
        voices.append((voice,))
        voice += dice.pick((-2, -1, -1, 1, 1, 2))
        voice = voice + 2 if voice < 1 else (voice - 2 if voice > 4 else voice)
    return voices


def draw_figure(dice: Dice, metre: Metre) -> Figure:
    """A figure of one of five families (broken chords, Alberti, arpeggios, bass and chords, rocking), no two alike."""
    family = dice.weigh((("broken", 4), ("alberti", 3), ("arpeggio", 3), ("stride", 3), ("rocking", 2)))
    grid = dice.weigh(_grids(metre))
    if family == "stride":
        grid = QUARTER if metre.beat == QUARTER and dice.chance(0.7) else QUARTER // 2
    elif family == "rocking":
        grid = max(grid, QUARTER // 2)
    per_bar = metre.bar // grid
    slots: list[Slot] = []
    alberti = dice.pick(((1, 3, 2, 3), (1, 2, 3, 2), (2, 3, 1, 3), (3, 1, 2, 1), (1, 3, 2, 4)))
    turn = dice.below(max(1, per_bar - 2)) + 2
    rest = dice.between(0.0, 0.25) if family in ("broken", "stride") else dice.between(0.0, 0.08)
    for bar in range(_BARS):
        voices = _wander(dice, per_bar)
        for i in range(per_bar):
            if family == "alberti":
                voices[i] = (alberti[i % 4],)
            elif family == "arpeggio":
                height = i % (2 * turn)
                voices[i] = (min(height, 2 * turn - height) % 6 + 1,)
            elif family == "stride":
                voices[i] = dice.pick(((1, 2, 3), (2, 3), (1, 3), (1, 2), (2, 3, 4)))
            elif family == "rocking":
                voices[i] = dice.pick(((1,), (2,))) if i % 2 else dice.pick(((2, 3), (3, 4), (2, 4)))
        voices[0] = (0,) if dice.chance(0.8) else (-1, 0)
        if dice.chance(0.4) and per_bar >= 4:
            voices[per_bar // 2] = (0,)
        for i, wanted in enumerate(voices):
            if i and dice.chance(rest):
                continue
            at = bar * metre.bar + i * grid
            slots.append(Slot(at, grid if i else dice.pick((grid, grid, metre.beat)), wanted))
    return Figure(tuple(slots), 35 + dice.below(8), 46 + dice.below(6), dice.between(0.05, 0.25))


def _voice(key: Key, figure: Figure, chord: Chord, voice: int) -> int:
    """The pitch of one voice of the chord; the bass stays below the others."""
    bass = chord.bass(key, figure.bass_floor)
    if voice <= 0:
        return bass + 12 * voice
    upper = chord.pitches(key, max(figure.floor, bass + 3))
    octave, member = divmod(voice - 1, len(upper))
    return upper[member] + 12 * octave


def accompany(dice: Dice, figure: Figure, passage: Passage) -> list[Written]:
    """The figure played over the passage's chords, with small liberties, and a plain chord in the last bar."""
    key, metre = passage.key, passage.metre
    notes: list[Written] = []
    last_bar = (passage.bars - 1) * metre.bar
    for bar in range(passage.bars - 1):
        start = bar * metre.bar
        for slot in figure.slots:
            if slot.tick // metre.bar != bar % _BARS:
                continue
            tick = start + slot.tick % metre.bar
            chord = chord_at(passage.chords, tick)
            voices = slot.voices
            if chord.tick == tick and voices[0] > 0 and tick != start:
                voices = (0, *voices[1:])
            elif voices[0] > 0 and dice.chance(figure.freedom):
                voices = (dice.pick((1, 2, 3, 4)),)
            for voice in voices:
                pitch = _voice(key, figure, chord, voice)
                notes.append(Written(tick, slot.length, pitch, 2 if voice <= 0 else 0))
    final = chord_at(passage.chords, last_bar)
    spread = metre.beat if metre.beats > 2 else metre.beat // 3
    for i, voice in enumerate((0, 1, 2, 3)):
        at = min(i, 2) * spread if figure.freedom > 0.12 else min(i, 1) * spread
        notes.append(Written(last_bar + at, metre.bar - at, _voice(key, figure, final, voice), 1))
    return notes


def sing(dice: Dice, passage: Passage, thickness: float, octaves: bool) -> list[Written]:
    """The melody, here and there (`thickness`) doubled an octave higher or by a chord note below it."""
    notes = []
    for tone in passage.melody:
        pitch = passage.key.pitch(tone.step, tone.alter)
        notes.append(Written(tone.tick, tone.length, pitch, 3))
        if tone.tick % passage.metre.beat == 0 and dice.chance(thickness):
            if octaves:
                notes.append(Written(tone.tick, tone.length, pitch + 12, 2))
            else:
                notes.append(_below(passage, tone))
    return notes


def _below(passage: Passage, tone: Tone) -> Written:
    """The nearest chord note at least a third below a melody note."""
    chord = chord_at(passage.chords, tone.tick)
    step = next(s for s in range(tone.step - 2, tone.step - 9, -1) if s % 7 in chord.degrees())
    return Written(tone.tick, tone.length, passage.key.pitch(step, chord.alter(passage.key, step)), 1)
