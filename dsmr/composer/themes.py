"""Fourteen public-domain themes, the seed-corn of the embedded corpus, written down from memory in our own notation.

A melody is a string of bars divided by `|`. A note is a scale degree 1-7 (`r` is a rest), `#` or `b` before it alters
it by a semitone, each `'` or `,` after it moves it an octave up or down, and a letter gives its value: `w h q e s`
(whole to sixteenth), a dot adds half; a dot alone dots the last letter, and with neither the last value holds. Degrees
count in the major or the natural minor scale. The harmony has one to four degrees a bar (roots of triads; the fifth is
always major). Up-beats are left out, since the composer joins, transposes and rewrites phrases anyway.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

QUARTER = 24  # ticks; divisible by what sixteenths and triplets need

_VALUES = {"w": 4 * QUARTER, "h": 2 * QUARTER, "q": QUARTER, "e": QUARTER // 2, "s": QUARTER // 4}
_NOTE = re.compile(r"([#b]?)([1-7r])([',]*)([whqes]?)(\.?)$")


class Metre(NamedTuple):
    """Ticks of a bar and of the beat that is felt in it."""

    bar: int
    beat: int

    @property
    def beats(self) -> int:
        """Beats of a bar."""
        return self.bar // self.beat


METRES = {"4/4": Metre(96, 24), "3/4": Metre(72, 24), "6/8": Metre(72, 36)}


class Tone(NamedTuple):
    """A melody note in a key: `step` counts scale degrees from the tonic (7 an octave), `alter` semitones."""

    tick: int
    length: int
    step: int
    alter: int


@dataclass(frozen=True)
class Theme:
    """One theme: `melody` and `harmony` in the notation above, as many bars in the one as in the other."""

    title: str
    source: str
    metre: str
    minor: bool
    melody: str
    harmony: str

    def bars(self) -> list[list[Tone]]:
        """The notes of every bar, ticks counted from the bar's beginning; `ValueError` if a bar does not add up."""
        size = METRES[self.metre].bar
        bars, letter, value = [], "q", QUARTER
        for number, text in enumerate(self.melody.split("|"), 1):
            tick, tones = 0, []
            for word in text.split():
                match = _NOTE.match(word)
                if match is None:
                    raise ValueError(f"{self.title}: bar {number} has {word!r}, which is not a note")
                sign, degree, octaves, named, dot = match.groups()
                if named or dot:
                    letter = named or letter
                    value = _VALUES[letter] * (3 if dot else 2) // 2
                if degree != "r":
                    step = int(degree) - 1 + 7 * (octaves.count("'") - octaves.count(","))
                    tones.append(Tone(tick, value, step, {"#": 1, "b": -1, "": 0}[sign]))
                tick += value
            if tick != size:
                raise ValueError(f"{self.title}: bar {number} lasts {tick} ticks, but {self.metre} has {size}")
            bars.append(tones)
        return bars

    def roots(self) -> list[list[int]]:
        """The roots of every bar as scale degrees 0-6; `ValueError` if there are not as many bars as in the melody."""
        roots = [[int(degree) - 1 for degree in bar.split()] for bar in self.harmony.split("|")]
        if len(roots) != self.melody.count("|") + 1:
            raise ValueError(f"{self.title}: {len(roots)} bars of harmony for {self.melody.count('|') + 1} of melody")
        return roots


THEMES = (
    Theme(
        "Ode to Joy",
        "Ludwig van Beethoven (died 1827), Ninth Symphony",
        "4/4",
        False,
        "3q 3 4 5 | 5 4 3 2 | 1 1 2 3 | 3q. 2e 2h | 3q 3 4 5 | 5 4 3 2 | 1 1 2 3 | 2q. 1e 1h |"
        "2q 2 3 1 | 2 3e 4 3q 1 | 2 3e 4 3q 2 | 1 2 5,h | 3q 3 4 5 | 5 4 3 2 | 1 1 2 3 | 2q. 1e 1h",
        "1 | 5 | 1 | 1 5 | 1 | 5 | 1 | 5 1 | 5 1 | 5 1 | 5 3 | 6 2 5 5 | 1 | 5 | 1 4 | 5 1",
    ),
    Theme(
        "Ah! vous dirai-je, maman",
        "traditional French",
        "4/4",
        False,
        "1q 1 5 5 | 6 6 5h | 4q 4 3 3 | 2 2 1h | 5q 5 4 4 | 3 3 2h | 5q 5 4 4 | 3 3 2h |"
        "1q 1 5 5 | 6 6 5h | 4q 4 3 3 | 2 2 1h",
        "1 | 4 1 | 4 1 | 5 1 | 1 4 | 1 5 | 1 4 | 1 5 | 1 | 4 1 | 2 6 | 5 1",
    ),
    Theme(
        "Greensleeves",
        "traditional English",
        "6/8",
        True,
        "3q 4e 5. 6s 5e | 4q 2e 7,. 1s 2e | 3q 1e 1. #7,s 1e | 2q #7,e 5,q 1e |"
        "3q 4e 5. 6s 5e | 4q 2e 7,. 1s 2e | 3. 2s 1e #7,. #6,s #7,e | 1q. 1 |"
        "7 7e. #6s 5e | 4q 2e 7,. 1s 2e | 3q 1e 1. #7,s 1e | 2q #7,e 5,q. |"
        "7 7e. #6s 5e | 4q 2e 7,. 1s 2e | 3. 2s 1e #7,. #6,s #7,e | 1q. 1",
        "1 | 7 | 1 | 5 | 1 | 7 | 1 5 | 1 | 3 | 7 | 1 | 5 | 3 | 7 | 1 5 | 1",
    ),
    Theme(
        "Minuet in G",
        "Christian Petzold (died 1733), from Anna Magdalena Bach's notebook",
        "3/4",
        False,
        "5q 1e 2 3 4 | 5q 1 1 | 6 4e 5 6 7 | 1'q 1 1 | 4 5e 4 3 2 | 3q 4e 3 2 1 | 7,q 1e 2 3 1 | 2h. |"
        "5q 1e 2 3 4 | 5q 1 1 | 6 4e 5 6 7 | 1'q 1 1 | 4 5e 4 3 2 | 3q 4e 3 2 1 | 2q 3e 2 1 7, | 1h.",
        "1 | 1 | 4 | 1 | 4 | 1 | 5 | 5 | 1 | 1 | 4 | 1 | 2 | 6 | 5 | 1",
    ),
    Theme(
        "La Folia",
        "traditional Iberian",
        "3/4",
        True,
        "1q 1. #7,e | #7,h. | 1q 1. 2e | 2h. | 3q 3. 2e | 2h. | 1q 1. #7,e | #7,h. |"
        "1q 1. #7,e | #7,h. | 1q 1. 2e | 2h. | 3q 3. 2e | 2h. | 1q 2 #7, | 1h.",
        "1 | 5 | 1 | 7 | 3 | 7 | 1 | 5 | 1 | 5 | 1 | 7 | 3 | 7 | 1 5 5 | 1",
    ),
    Theme(
        "Lullaby",
        "Johannes Brahms (died 1897), opus 49",
        "3/4",
        False,
        "5q. 3e 3q | 5h 3e 5 | 1'q 7. 6e | 6q 5 2e 3 | 4q 2 2e 3 | 4h 2e 4 | 7 6 5q 7 | 1'h 1e 1 |"
        "1'h 6e 4 | 5h 3e 1 | 4q 5 6 | 5h 1e 1 | 1'h 6e 4 | 5h 3e 1 | 4q 3 2 | 1h.",
        "1 | 1 | 1 | 1 5 5 | 5 | 5 | 5 | 1 | 4 | 1 | 2 5 5 | 1 | 4 | 1 | 5 | 1",
    ),
    Theme(
        "Emperor's Hymn",
        "Joseph Haydn (died 1809)",
        "4/4",
        False,
        "1q. 2e 3q 2 | 4 3 2e 7, 1q | 6 5 4 3 | 2 3e 1 5h | 1q. 2e 3q 2 | 4 3 2e 7, 1q | 6 5 4 3 | 2 3e 1 5h |"
        "2q 3 2e 7, 5,q | 4 3 2e 7, 5,q | 5 4 3. 3e | #4q #4e 5 5h |"
        "1'q. 7e 7 6 5q | 6q. 5e 5 4 3q | 2 3e 4 5 6 4 2 | 1q 3e. 2s 1h",
        "1 5 | 4 5 | 4 1 | 2 5 | 1 5 | 4 5 | 4 1 | 2 5 | 5 | 5 | 5 6 | 2 5 | 1 3 | 4 1 | 2 | 5 1",
    ),
    Theme(
        "Andante grazioso",
        "Wolfgang Amadeus Mozart (died 1791), Sonata in A",
        "6/8",
        False,
        "3e. 4s 3e 5q 5e | 2. 3s 2e 4q 4e | 6,q 6,e 7,q 7,e | 1q 3e 3 2 2 |"
        "3e. 4s 3e 5q 5e | 2. 3s 2e 4q 4e | 1q 2e 3q 4e | 3q 2e 1q.",
        "1 | 5 | 6 5 | 1 5 | 1 | 5 | 1 2 | 5 1",
    ),
    Theme(
        "Largo",
        "Antonin Dvorak (died 1904), New World Symphony",
        "4/4",
        False,
        "3q. 5e 5h | 3q. 2e 1h | 2q. 3e 5q. 3e | 2w | 3q. 5e 5h | 3q. 2e 1h | 2q 3 2. 1e | 1w |"
        "6q. 1'e 1'h | 7q 5 6h | 6q 1' 7 5 | 6w | 3q. 5e 5h | 3q. 2e 1h | 2q 3 2. 1e | 1w",
        "1 | 1 | 6 4 | 5 | 1 | 6 | 2 5 | 1 | 4 | 3 6 | 4 5 | 6 | 1 | 6 | 2 5 | 1",
    ),
    Theme(
        "In the Hall of the Mountain King",
        "Edvard Grieg (died 1907), Peer Gynt",
        "4/4",
        True,
        "1e 2 3 4 5 3 5q | #4e 2 #4q 4e b2 4q | 1e 2 3 4 5 3 5 1' | 7 5 3 5 7h |"
        "1e 2 3 4 5 3 5q | #4e 2 #4q 4e b2 4q | 1e 2 3 4 5 3 5 1' | 5 3 2 #7, 1h",
        "1 | 5 4 | 1 | 3 | 1 | 5 4 | 1 | 5 1",
    ),
    Theme(
        "Korobeiniki",
        "traditional Russian",
        "4/4",
        True,
        "5q 2e 3 4q 3e 2 | 1q 1e 3 5q 4e 3 | 2q. 3e 4q 5 | 3 1 1h | 4q. 6e 1'q 7e 6 | 5q. 3e 5q 4e 3 |"
        "2q 2e 3 4q 5 | 3 1 1h | 5 3 | 4 2 | 3 1 | #7, 5, | 5 3 | 4 2 | 3q 5 1'h | #7 1'",
        "5 | 1 | 5 | 1 | 4 | 1 | 5 | 1 | 1 | 5 | 1 | 5 | 1 | 5 | 1 4 | 5 1",
    ),
    Theme(
        "Scarborough Fair",
        "traditional English",
        "3/4",
        True,
        "1h 1q | 5h 5q | 2. 3e 2q | 1h. | rq 5 7 | 1'h 7q | 5 #6 4 | 5h. |"
        "rq 1' 1' | 1'h 7q | 5 5 4 | 3 2 7, | 1h 5q | 4h 3q | 2 1 7, | 1h.",
        "1 | 1 | 7 | 1 | 1 | 3 | 1 7 7 | 1 | 1 | 3 | 3 | 7 | 1 | 7 | 7 5 5 | 1",
    ),
    Theme(
        "Auld Lang Syne",
        "traditional Scottish",
        "4/4",
        False,
        "1q. 1e 1q 3 | 2. 1e 2q 3 | 1. 1e 3q 5 | 6h. 6q | 5. 3e 3q 1 | 2. 1e 2q 3 | 1. 6,e 6,q 5, | 1h. 6q |"
        "5. 3e 3q 1 | 2. 1e 2q 6 | 5. 3e 3q 5 | 6h. 1'q | 5. 3e 3q 1 | 2. 1e 2q 3 | 1. 6,e 6,q 5, | 1w",
        "1 | 5 | 1 | 4 | 1 | 5 | 4 5 | 1 | 1 | 5 | 1 | 4 | 1 | 5 | 4 5 | 1",
    ),
    Theme(
        "Amazing Grace",
        "traditional American",
        "3/4",
        False,
        "1h 3e 1 | 3h 2q | 1h 6,q | 5,h 5,q | 1h 3e 1 | 3h 2q | 5h. | 5h 3q |"
        "5q. 3e 5 3 | 1h 5,q | 6,. 1e 1 6, | 5,h 5,q | 1h 3e 1 | 3h 2q | 1h. | 1",
        "1 | 1 | 4 | 1 | 1 | 6 | 5 | 5 | 1 | 1 | 4 | 1 | 1 | 5 | 4 | 1",
    ),
)
