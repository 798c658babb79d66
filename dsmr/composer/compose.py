"""The embedded corpus: complete piano pieces of 3 to 8 minutes whose refrain returns after thousands of tokens.

It stands in for data that may not be shipped, and it is a controlled experiment: what a piece's refrain is cannot be
known from other pieces, its first statement and the episodes between are fresh, but most returns repeat the first
statement note by note and hundredth by hundredth. Only a model that remembers the first statement can foretell them.
The same seed gives the same piece on every machine.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmr.composer.dice import Dice
from dsmr.composer.figures import Figure, accompany, draw_figure, sing
from dsmr.composer.harmony import Key, Passage
from dsmr.composer.melody import invented, own_theme
from dsmr.composer.performance import Clock, Played, Touch, held, ornamented, pedalled, play, settled
from dsmr.composer.themes import METRES, THEMES
from dsmr.music.tokenizer import write_midi

FORMS = ("rondo", "variations")
NOTE = np.dtype([("onset", "f8"), ("duration", "f8"), ("pitch", "i8"), ("velocity", "i8")])
PEDAL = np.dtype([("time", "f8"), ("duration", "f8")])

GAP_NOTES = 600  # notes at least between two statements of the refrain, in pieces of three minutes and more
_SHORTEST, _LONGEST = 1.0, 30.0  # minutes that can be asked for
_LOWEST, _HIGHEST = 21, 108
_TICKS_PER_QUARTER, _TICKS_PER_HUNDREDTH = 500, 10  # at 120 quarters a minute a tick is a millisecond


@dataclass(frozen=True)
class Section:
    """A span of a piece; notes with onsets in [start_s, end_s) are its own.

    `return_index` is 0 for the first statement of the refrain, 1, 2, … for its returns and −1 elsewhere; `kind` is
    "statement", "exact", "transposed" or "varied" for the refrain and "fresh" elsewhere; `transposition` is in
    semitones against the first statement.
    """

    label: str
    start_s: float
    end_s: float
    is_refrain: bool = False
    return_index: int = -1
    transposition: int = 0
    kind: str = "fresh"


@dataclass(frozen=True)
class Composition:
    """A complete piece: `notes` ordered by onset and pitch, and `pedals`, in seconds on a grid of ten milliseconds."""

    seed: int
    title: str
    form: str
    notes: NDArray[Any]
    pedals: NDArray[Any]
    sections: list[Section] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Duration, the last section's rest included."""
        return self.sections[-1].end_s

    def labels_for(self, onsets_seconds: Sequence[float] | NDArray[Any]) -> NDArray[np.uint8]:
        """For each time: 1 inside the first statement of the refrain, 2 inside a return, 0 elsewhere."""
        starts = np.array([section.start_s for section in self.sections]) - 0.005  # half a step of the grid
        kinds = [0, *(min(section.return_index + 1, 2) for section in self.sections)]
        return np.array(kinds, dtype=np.uint8)[np.searchsorted(starts, np.asarray(onsets_seconds), side="right")]

    def to_score(self) -> Any:
        """The piece as a `symusic.Score`: one piano track at 120 quarters a minute, a tick a millisecond."""
        return to_score(self)

    def write_midi(self, path: str | os.PathLike[str]) -> None:
        """Write a MIDI file, whole or not at all."""
        write_midi(path, to_score(self))


def to_score(composition: Composition) -> Any:
    """The `symusic.Score` of a composition; see `Composition.to_score`."""
    import symusic

    score: Any = symusic.Score(_TICKS_PER_QUARTER)
    score.tempos.append(symusic.Tempo(0, 120.0))
    track: Any = symusic.Track(name="Piano", program=0, is_drum=False)
    ticks = 100 * _TICKS_PER_HUNDREDTH
    for onset, duration, pitch, velocity in composition.notes.tolist():
        track.notes.append(symusic.Note(round(onset * ticks), round(duration * ticks), pitch, velocity))
    for time, duration in composition.pedals.tolist():
        down, up = round(time * ticks), round((time + duration) * ticks)
        track.controls.append(symusic.ControlChange(down, 64, 127))
        track.controls.append(symusic.ControlChange(up, 64, 0))
        track.pedals.append(symusic.Pedal(down, up - down))
    score.tracks.append(track)
    return score


@dataclass(frozen=True)
class _Span:
    """A performed section before it has its place in the piece: times in hundredths from its own beginning."""

    notes: list[Played]
    pedals: list[tuple[int, int]]
    length: int


@dataclass(frozen=True)
class _Performance:
    """A passage as performed: what a varied return needs of it are the two hands apart and the tempo curve."""

    passage: Passage
    melody: list[Played]
    harmony: list[Played]
    clock: Clock
    touch: Touch
    span: _Span


def _joined(dice: Dice, hands: list[Played], passage: Passage, clock: Clock, breath: int) -> _Span:
    """Both hands and the pedal as one section."""
    length = int(clock.end) + breath
    return _Span(settled(hands, length), pedalled(dice, passage.chords, clock), length)


def _beat(notes: int, passage: Passage, density: float) -> float:
    """Hundredths of a second a beat that give about `density` notes a second at a tempo that can be played."""
    quarters = passage.metre.beat / 24.0
    beat = 100.0 * notes / (passage.bars * passage.metre.beats * density)
    return min(max(beat, 36.0 * quarters), 95.0 * quarters)


def _perform(
    dice: Dice, passage: Passage, figure: Figure, density: float, loudness: float, thick: float, octaves: bool
) -> _Performance:
    """Perform a passage with an accompaniment figure, at the tempo that its number of notes suggests."""
    upper, lower = sing(dice, passage, thick, octaves), accompany(dice, figure, passage)
    touch = Touch.drawn(dice, _beat(len(upper) + len(lower), passage, density), loudness)
    clock = Clock(dice, passage, touch)
    melody = play(dice, upper, passage, clock, touch)
    harmony = play(dice, lower, passage, clock, touch)
    span = _joined(dice, melody + harmony, passage, clock, 5 + dice.below(20))
    return _Performance(passage, melody, harmony, clock, touch, span)


def _refrain(dice: Dice, theme_index: int, key: Key, density: float, longest: int) -> _Performance:
    """The piece's refrain, at most about `longest` hundredths of a second but never under eight bars."""
    theme = THEMES[theme_index]
    thick, octaves = dice.between(0.0, 0.6), dice.chance(0.3)
    loudness = dice.between(42.0, 68.0)
    for phrases in (4, 3, 2):
        own = dice.fork(phrases)
        passage = own_theme(own, theme, key, phrases)
        refrain = _perform(own, passage, draw_figure(own, passage.metre), density, loudness, thick, octaves)
        if refrain.span.length <= longest:
            break
    return refrain


def _transposed(span: _Span, semitones: int) -> _Span:
    """The same performance in another key."""
    notes = [note._replace(pitch=note.pitch + semitones) for note in span.notes]
    return _Span(notes, span.pedals, span.length)


def _varied(dice: Dice, refrain: _Performance) -> _Span:
    """The refrain with an ornamented melody or with another accompaniment, the other hand exactly as before."""
    melody, harmony, passage = refrain.melody, refrain.harmony, refrain.passage
    if dice.chance(0.5):
        melody = ornamented(dice, melody, passage)
    else:
        written = accompany(dice, draw_figure(dice, passage.metre), passage)
        harmony = play(dice, written, passage, refrain.clock, refrain.touch)
    return _Span(settled(melody + harmony, refrain.span.length), refrain.span.pedals, refrain.span.length)


class _Piece:
    """A piece in the making: its sections one after another, with the seeded choices that all of them share."""

    def __init__(self, seed: int, minutes: float, form: str) -> None:
        self.dice = Dice(seed)
        self.form = form
        self.total = int(minutes * 6000)
        self.scale = min(1.0, minutes / 3.0) ** 2
        dice = self.dice.fork(1)
        theme_index = dice.below(len(THEMES))
        self.theme = THEMES[theme_index]
        minor = self.theme.minor if dice.chance(0.6) else not self.theme.minor
        self.key = Key(dice.below(12), minor)
        self.density = dice.between(6.3, 8.8)
        self.metre = METRES[self.theme.metre]
        longest = int(min(4200, 0.2 * self.total))
        self.refrain = _refrain(self.dice.fork(2), theme_index, self.key, self.density, longest)
        self.sections: list[tuple[Section, _Span]] = []
        self.now = 0
        self.returns = 0

    def add(self, span: _Span, label: str, kind: str = "fresh", transposition: int = 0) -> None:
        """Put a section at the end of what there is."""
        refrain = kind != "fresh"
        start, end = self.now / 100, (self.now + span.length) / 100
        index = self.returns if refrain else -1
        self.sections.append((Section(label, start, end, refrain, index, transposition, kind), span))
        self.now += span.length
        self.returns += refrain

    def add_return(self, dice: Dice) -> None:
        """A return of the refrain: mostly exact, else transposed or varied."""
        kind = dice.weigh((("exact", 6), ("transposed", 2), ("varied", 2)))
        if kind == "transposed":
            pitches = [note.pitch for note in self.refrain.span.notes]
            down, up = max(-5, _LOWEST - min(pitches)), min(6, _HIGHEST - max(pitches))
            semitones = dice.pick([shift for shift in range(down, up + 1) if shift])
            self.add(_transposed(self.refrain.span, semitones), "A", kind, semitones)
        elif kind == "varied":
            self.add(_varied(dice, self.refrain), "A", kind)
        else:
            self.add(self.refrain.span, "A", kind)

    def _related(self, dice: Dice) -> Key:
        """A key in which an episode may stand."""
        tonic, minor = self.key
        relative = Key(tonic + (3 if minor else -3), not minor)
        near = (Key(tonic + 7, minor), Key(tonic + 5, minor), relative, Key(tonic, not minor), Key(tonic - 4, minor))
        tonic, minor = dice.pick(near)
        return Key(tonic % 12, minor)

    def phrase(self, dice: Dice, key: Key, bars: int, closed: bool) -> Passage:
        """A fresh phrase in the piece's metre, over fresh chords."""
        return invented(dice, key, self.metre, bars, closed)

    def variation(self, dice: Dice) -> Passage:
        """A fresh melody over the refrain's own chords, in its key."""
        theme = self.refrain.passage
        return invented(dice, theme.key, theme.metre, theme.bars, True, theme.chords)

    def played(self, dice: Dice, passage: Passage, figure: Figure) -> _Performance:
        """A fresh passage played with a touch of its own."""
        density = min(max(self.density * dice.between(0.85, 1.2), 6.5), 9.5)
        thick = dice.between(0.0, 0.5) if dice.chance(0.6) else 0.0
        return _perform(dice, passage, figure, density, dice.between(38.0, 72.0), thick, dice.chance(0.3))

    def episode(self, dice: Dice, label: str, until: int) -> None:
        """Fresh phrases up to about time `until` and at least `GAP_NOTES` notes; a rondo's lead home at last."""
        now, notes, spans = self.now, 0, list[_Span]()
        key, figure = self._related(dice), draw_figure(dice, self.metre)
        while True:
            if self.form == "variations":
                span = self.played(dice, self.variation(dice), draw_figure(dice, self.metre)).span
            else:
                if dice.chance(0.4):
                    key, figure = self._related(dice), draw_figure(dice, self.metre)
                passage = self.phrase(dice, key, dice.pick((8, 8, 4)), len(spans) % 2 == 1)
                span = self.played(dice, passage, figure).span
            spans.append(span)
            now, notes = now + span.length, notes + len(span.notes)
            if notes >= GAP_NOTES * self.scale and now + span.length // 2 >= until:
                break
        if self.form == "rondo":
            spans.append(self.played(dice, self.phrase(dice, self.key, 4, False), figure).span)
        for i, span in enumerate(spans, 1):
            self.add(span, f"{label}{i}")

    def coda(self, dice: Dice) -> _Span:
        """Eight closing bars in the home key (four in a short piece), the last chord held."""
        passage = self.phrase(dice, self.key, 8 if self.scale == 1.0 else 4, True)
        played = self.played(dice, passage, draw_figure(dice, self.metre))
        end = played.span.length + 80 + dice.below(60)
        last_bar = int(played.clock.at(passage.length - passage.metre.bar)) - 5
        *pedals, (down, _) = played.span.pedals
        notes = held(played.melody + played.harmony, last_bar, end)
        return _Span(settled(notes, end), [*pedals, (down, end - 2 - down)], end)

    def write(self) -> None:
        """Refrain, episodes and returns by turns, and a coda."""
        dice = self.dice.fork(3)
        coda = self.coda(self.dice.fork(4))
        each = self.refrain.span.length
        shortest = int(100 * GAP_NOTES * self.scale / (self.density * 0.93)) + 300
        free = self.total - each - coda.length
        most = max(1, min(6, free // (each + shortest)))
        returns = max(1, most - dice.chance(0.25))
        spare = max(0, free - returns * (each + shortest))
        shares = [dice.unit() * dice.unit() + 0.02 for _ in range(returns)]
        self.add(self.refrain.span, "A", "statement")
        end = self.now
        for i, share in enumerate(shares):
            end += shortest + int(spare * share / sum(shares))
            label = "V" + "'" * i if self.form == "variations" else chr(ord("B") + i)
            self.episode(self.dice.fork(10 + i), label, end - (600 if self.form == "rondo" else 0))
            self.add_return(self.dice.fork(100 + i))
            end += each
        self.add(coda, "coda")

    def finished(self, seed: int) -> Composition:
        """All sections in one piece."""
        notes, pedals, offset = [], [], 0
        for _, span in self.sections:
            notes += [((o + offset) / 100, l / 100, p, v) for o, l, p, v in span.notes]
            pedals += [((t + offset) / 100, d / 100) for t, d in span.pedals]
            offset += span.length
        table = np.array(notes, dtype=NOTE)
        kind = "Rondo" if self.form == "rondo" else "Variations"
        title = f"{kind} in {self.key.name} after “{self.theme.title}”"
        return Composition(
            seed, title, self.form, table, np.array(pedals, dtype=PEDAL), [section for section, _ in self.sections]
        )


def compose(seed: int, minutes: float | None = None, form: str | None = None) -> Composition:
    """Compose piece number `seed` (≥ 0): `minutes` long to within about a phrase (drawn between 3 and 8 if None).

    `form` is "rondo" or "variations" (drawn if None). Pieces under three minutes have shorter
    episodes and may run half a minute over.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer ≥ 0, not {seed!r}")
    if form is not None and form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    if minutes is not None and not _SHORTEST <= minutes <= _LONGEST:
        raise ValueError(f"minutes must lie between {_SHORTEST:g} and {_LONGEST:g}, not {minutes!r}")
    dice = Dice(int(seed), 0)
    drawn_form = dice.weigh((("rondo", 0.65), ("variations", 0.35)))
    drawn_minutes = dice.between(3.4, 7.5)
    piece = _Piece(int(seed), drawn_minutes if minutes is None else float(minutes), form or drawn_form)
    piece.write()
    return piece.finished(int(seed))
