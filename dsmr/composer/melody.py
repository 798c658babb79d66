"""Melodies: a theme made so much a piece's own that knowing the theme does not foretell it, and freshly invented ones.

Both keep to the chords: what falls on a beat is drawn to a chord note, and the last bar rests on the tonic's chord.
"""

from collections.abc import Sequence

from dsmr.composer.dice import Dice
from dsmr.composer.harmony import TONIC, Chord, Key, Passage, chords_of_roots, progression, substituted
from dsmr.composer.themes import METRES, QUARTER, Metre, Theme, Tone

LOW, HIGH = -4, 11  # steps of the melody's range
_PHRASE = 4  # bars

_SIMPLE = (
    ((24,), 4), ((12, 12), 5), ((18, 6), 2), ((6, 6, 12), 1), ((12, 6, 6), 2), ((6, 6, 6, 6), 2), ((8, 8, 8), 1),
    ((48,), 2), ((36, 12), 2), ((12, 24, 12), 1),
)  # fmt: skip
_COMPOUND = (
    ((36,), 2), ((24, 12), 4), ((12, 12, 12), 4), ((18, 6, 12), 2), ((12, 24), 1), ((6, 6, 6, 6, 6, 6), 1),
    ((12, 6, 6, 6, 6), 1), ((24, 6, 6), 1),
)  # fmt: skip
_LEAPS = ((1, 5.0), (-1, 6.0), (2, 3.0), (-2, 3.0), (0, 1.0), (3, 1.5), (-3, 1.0), (4, 0.7), (-4, 0.4), (5, 0.3))


def chord_at(chords: Sequence[Chord], tick: int) -> Chord:
    """The chord that sounds at `tick`."""
    for chord in chords:
        if tick < chord.tick + chord.length:
            return chord
    return chords[-1]


def _settled(dice: Dice, step: int, chord: Chord) -> int:
    """The chord note nearest to a step."""
    members = chord.degrees()
    away = (0, 1, -1, 2, -2) if dice.chance(0.5) else (0, -1, 1, -2, 2)
    return next((step + d for d in away if (step + d) % 7 in members), step)


def _folded(step: int) -> int:
    """The same degree inside the melody's range."""
    while step > HIGH:
        step -= 7
    while step < LOW:
        step += 7
    return step


def _mutated_bar(dice: Dice, bar: list[Tone]) -> list[Tone]:
    """One bar of a theme by one of the old devices: inversion, retrograde, sequence, swapped rhythm, new contour."""
    if len(bar) < 2:
        return [tone._replace(step=tone.step + dice.pick((0, 0, 2, -2)), alter=0) for tone in bar]
    device = dice.weigh((("keep", 3), ("invert", 2), ("reverse", 2), ("shift", 2), ("rhythm", 2), ("anew", 2)))
    steps = [tone.step for tone in bar]
    lengths = [tone.length for tone in bar]
    if device == "keep":
        return bar
    if device == "invert":
        steps = [2 * steps[0] - step for step in steps]
    elif device == "reverse":
        steps.reverse()
    elif device == "shift":
        by = dice.pick((-2, -1, 1, 2))
        steps = [step + by for step in steps]
    elif device == "rhythm":
        lengths.reverse()
    else:
        for i in range(1, len(steps)):
            steps[i] = steps[i - 1] + dice.weigh(_LEAPS)
    tick, tones = bar[0].tick, []
    for step, length in zip(steps, lengths, strict=True):
        tones.append(Tone(tick, length, step, 0))
        tick += length
    return tones


def _enlivened(dice: Dice, tones: list[Tone]) -> list[Tone]:
    """The notes with passing notes, dots and divisions; how many of each is this piece's habit."""
    passing, dotting, dividing = dice.between(0.1, 0.7), dice.between(0.0, 0.5), dice.between(0.2, 0.8)
    turns = [dice.pick((1, -1, 2, -2, 3)) for _ in range(3)]
    lively: list[Tone] = []
    for i, tone in enumerate(tones):
        following = tones[i + 1] if i + 1 < len(tones) else None
        if tone.length >= 2 * QUARTER and following and dice.chance(dividing):
            piece = QUARTER // 2 if tone.length % QUARTER == 0 else tone.length // 3
            lively.append(tone._replace(length=tone.length - 2 * piece))
            for j, turn in enumerate((turns[0], dice.pick(turns))):
                tick = tone.tick + tone.length - (2 - j) * piece
                lively.append(Tone(tick, piece, tone.step + turn, 0))
        elif following and tone.length >= QUARTER // 2 and dice.chance(passing):
            gap = following.step - tone.step
            by = (1 if gap > 0 else -1) if abs(gap) >= 2 else dice.pick((1, -1, 2))
            part = tone.length // (4 if dice.chance(dotting) and tone.length % 4 == 0 else 2)
            lively.append(tone._replace(length=tone.length - part))
            lively.append(Tone(tone.tick + tone.length - part, part, tone.step + by, 0))
        else:
            lively.append(tone)
    return lively


def _in_harmony(dice: Dice, key: Key, metre: Metre, tones: list[Tone], chords: list[Chord], bars: int) -> list[Tone]:
    """The notes drawn to the chords on the beats, without wild leaps, and coming to rest in the last bar."""
    last_bar = (bars - 1) * metre.bar
    done: list[Tone] = []
    for tone in tones:
        if tone.tick >= last_bar:
            break
        chord = chord_at(chords, tone.tick)
        step, alter = tone.step, tone.alter
        if tone.tick % metre.beat == 0 and tone.length >= 12 and step % 7 not in chord.degrees() and dice.chance(0.8):
            step, alter = _settled(dice, step, chord), 0
        while done and step - done[-1].step > 6:
            step -= 7
        while done and step - done[-1].step < -6:
            step += 7
        done.append(Tone(tone.tick, tone.length, _folded(step), alter or chord.alter(key, step)))
    final = chord_at(chords, last_bar)
    near = done[-1].step if done else 0
    if final.root == TONIC:
        step = min((-7, 0, 7), key=lambda home: (abs(home - near), home))
    else:
        step = _settled(dice, near, final)
    step = _folded(step)
    done.append(Tone(last_bar, metre.bar - (0 if metre.beats == 2 else metre.beat), step, final.alter(key, step)))
    return done


def own_theme(dice: Dice, theme: Theme, key: Key, phrases: int) -> Passage:
    """A refrain out of a theme: phrases chosen and re-ordered, motifs altered, rhythm and harmony made the piece's own.

    `phrases` counts four-bar phrases; the theme's last one always closes.
    """
    metre = METRES[theme.metre]
    bars, roots = theme.bars(), theme.roots()
    available = len(bars) // _PHRASE
    order = [dice.below(available) for _ in range(phrases - 1)] + [available - 1]
    tones: list[Tone] = []
    wanted: list[list[int]] = []
    written: dict[int, list[list[Tone]]] = {}
    for place, phrase in enumerate(order):
        first = phrase * _PHRASE
        if phrase not in written or dice.chance(0.6):
            written[phrase] = [_mutated_bar(dice, bar) for bar in bars[first : first + _PHRASE]]
        for i, bar in enumerate(written[phrase]):
            at = (place * _PHRASE + i) * metre.bar
            tones += [Tone(at + t.tick, t.length, t.step, t.alter if theme.minor == key.minor else 0) for t in bar]
        wanted += roots[first : first + _PHRASE]
    tones = [t._replace(step=t.step + dice.pick((-2, -1, 1, 2)), alter=0) if dice.chance(0.2) else t for t in tones]
    wanted[-1] = [TONIC]
    chords = chords_of_roots(dice, substituted(dice, wanted, key.minor), metre)
    melody = _in_harmony(dice, key, metre, _enlivened(dice, tones), chords, phrases * _PHRASE)
    return Passage(key, metre, phrases * _PHRASE, melody, chords)


def _rhythm(dice: Dice, metre: Metre) -> tuple[int, ...]:
    """Note lengths that fill one bar."""
    cells, left = (_SIMPLE if metre.beat == QUARTER else _COMPOUND), metre.bar
    lengths: list[int] = []
    while left:
        cell = dice.weigh(cells)
        if sum(cell) <= left:
            lengths += cell
            left -= sum(cell)
    return tuple(lengths)


def invented(dice: Dice, key: Key, metre: Metre, bars: int, closed: bool, chords: list[Chord] | None = None) -> Passage:
    """A fresh phrase: a motif, its continuation and a cadence, over a fresh progression or over given `chords`."""
    chords = progression(dice, bars, metre, closed) if chords is None else chords
    motifs = [_rhythm(dice, metre) for _ in range(3)]
    contours: list[list[int]] = [[dice.weigh(_LEAPS) for _ in range(16)] for _ in range(3)]
    tones: list[Tone] = []
    step = dice.pick((0, 2, 4, 4, 7))
    for bar in range(bars):
        which = dice.weigh(((bar % 2, 3), (2, 1)))
        lengths = motifs[which] if dice.chance(0.7) else _rhythm(dice, metre)
        contour = contours[which] if dice.chance(0.45) else [dice.weigh(_LEAPS) for _ in range(16)]
        tick = bar * metre.bar
        for i, length in enumerate(lengths):
            tones.append(Tone(tick, length, step, 0))
            tick += length
            pull = 1 if step < 0 and dice.chance(0.5) else (-1 if step > 7 and dice.chance(0.5) else 0)
            step = _folded(step + contour[i % 16] + 2 * pull)
    return Passage(key, metre, bars, _in_harmony(dice, key, metre, tones, chords, bars), chords)
