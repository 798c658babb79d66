"""Keys, chords and chord progressions: what the composer's melodies and accompaniments agree on."""

from dataclasses import dataclass
from typing import NamedTuple

from dsmr.composer.dice import Dice
from dsmr.composer.themes import Metre, Tone

_MAJOR = (0, 2, 4, 5, 7, 9, 11)
_MINOR = (0, 2, 3, 5, 7, 8, 10)
_MAJOR_NAMES = ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
_MINOR_NAMES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "G sharp", "A", "B flat", "B")

TONIC, SUPERTONIC, MEDIANT, SUBDOMINANT, DOMINANT, SUBMEDIANT, SUBTONIC = range(7)

# What usually follows what: (root, weight).
_NEXT = {
    TONIC: ((SUBDOMINANT, 3), (SUBMEDIANT, 3), (SUPERTONIC, 2), (DOMINANT, 2), (MEDIANT, 1)),
    SUPERTONIC: ((DOMINANT, 5), (SUBDOMINANT, 1), (SUBMEDIANT, 1)),
    MEDIANT: ((SUBMEDIANT, 3), (SUBDOMINANT, 3), (SUPERTONIC, 1)),
    SUBDOMINANT: ((DOMINANT, 3), (SUPERTONIC, 2), (TONIC, 2), (MEDIANT, 1)),
    DOMINANT: ((TONIC, 4), (SUBMEDIANT, 2), (MEDIANT, 1)),
    SUBMEDIANT: ((SUPERTONIC, 3), (SUBDOMINANT, 3), (MEDIANT, 1), (DOMINANT, 1)),
    SUBTONIC: ((MEDIANT, 3), (TONIC, 2)),
}


class Key(NamedTuple):
    """A tonic in semitones above middle C (−12 … 12) and a mode."""

    tonic: int
    minor: bool

    def pitch(self, step: int, alter: int = 0) -> int:
        """MIDI pitch of a scale step (0 = the tonic, 7 an octave)."""
        scale = _MINOR if self.minor else _MAJOR
        return 60 + self.tonic + 12 * (step // 7) + scale[step % 7] + alter

    @property
    def name(self) -> str:
        """For example `F sharp minor`."""
        names, mode = (_MINOR_NAMES, "minor") if self.minor else (_MAJOR_NAMES, "major")
        return f"{names[self.tonic % 12]} {mode}"


class Chord(NamedTuple):
    """A triad on scale degree `root` (0-6), with its seventh if so wanted, sounding from `tick` for `length`."""

    tick: int
    length: int
    root: int
    seventh: bool

    def degrees(self) -> tuple[int, ...]:
        """Scale degrees 0-6 that belong to the chord, root first."""
        return tuple((self.root + third) % 7 for third in ((0, 2, 4, 6) if self.seventh else (0, 2, 4)))

    def alter(self, key: Key, step: int) -> int:
        """1 where the step is the leading note of a minor key over its dominant, which is raised, else 0."""
        return int(key.minor and self.root == DOMINANT and step % 7 == SUBTONIC)

    def pitches(self, key: Key, floor: int) -> list[int]:
        """The chord's notes in close position, ascending, none below MIDI pitch `floor`."""
        classes = [key.pitch(degree, self.alter(key, degree)) for degree in self.degrees()]
        return sorted(floor + (pitch - floor) % 12 for pitch in classes)

    def bass(self, key: Key, floor: int) -> int:
        """The root as a bass note in the octave above `floor`."""
        return floor + (key.pitch(self.root) - floor) % 12


@dataclass(frozen=True)
class Passage:
    """A stretch of music on paper: `melody` and `chords` in ticks from its beginning, `bars` bars of `metre`."""

    key: Key
    metre: Metre
    bars: int
    melody: list[Tone]
    chords: list[Chord]

    @property
    def length(self) -> int:
        """Ticks of the whole passage."""
        return self.bars * self.metre.bar


def chords_of_roots(dice: Dice, roots: list[list[int]], metre: Metre) -> list[Chord]:
    """Chords that share each bar evenly among its roots (the first takes what a beat cannot divide)."""
    chords = []
    for bar, wanted in enumerate(roots):
        tick, left = bar * metre.bar, metre.bar
        for i, root in enumerate(wanted):
            share = left // (len(wanted) - i) // metre.beat * metre.beat
            length = left if i == len(wanted) - 1 else max(metre.beat, share)
            seventh = dice.chance(0.5 if root == DOMINANT else 0.12)
            closing = bar == len(roots) - 1 and root == TONIC
            chords.append(Chord(tick, length, root, seventh and not closing))
            tick, left = tick + length, left - length
    return chords


def progression(dice: Dice, bars: int, metre: Metre, closed: bool) -> list[Chord]:
    """A fresh chord progression that ends on the tonic (`closed`) or halfway on the dominant."""
    pace = dice.between(0.05, 0.6)  # how often a bar has two chords
    roots: list[list[int]] = []
    root = dice.weigh(((TONIC, 5), (SUBMEDIANT, 1), (SUBDOMINANT, 1), (MEDIANT, 0.5)))
    for bar in range(bars):
        if bar == bars - 1:
            roots.append([TONIC] if closed else [DOMINANT])
        elif closed and bar == bars - 2:
            roots.append([dice.pick((SUPERTONIC, SUBDOMINANT)), DOMINANT] if dice.chance(0.6) else [DOMINANT])
        else:
            wanted = [root]
            root = dice.weigh(_NEXT[root])
            if dice.chance(pace):
                wanted.append(root)
                root = dice.weigh(_NEXT[root])
            roots.append(wanted)
    return chords_of_roots(dice, roots, metre)


def substituted(dice: Dice, roots: list[list[int]], minor: bool) -> list[list[int]]:
    """The same harmony with some chords exchanged for their relatives, the last two bars left as they are."""
    relatives = {TONIC: SUBMEDIANT, SUBDOMINANT: SUPERTONIC, SUBMEDIANT: SUBDOMINANT, MEDIANT: SUBMEDIANT}
    boldness, bars = dice.between(0.1, 0.4), []
    for bar, wanted in enumerate(roots):
        inner = 0 < bar < len(roots) - 2
        changed = [relatives.get(r, r) if inner and dice.chance(boldness) else r for r in wanted]
        bars.append([DOMINANT if r == SUBTONIC and not minor else r for r in changed])
    return bars
