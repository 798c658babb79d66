"""Planted returns: pieces in which a passage comes back a known number of tokens later, made on the fly from a seed.

Natural music seldom tells how far a model remembers: what returns, and from where, is nobody's note. Here a passage of
5 to 30 seconds is taken out of a piece and put in again 1,000 to 16,000 tokens later, as it was, transposed or
stretched, and every token of it is labelled. Nothing else of the piece is changed: the rest moves back by what is put
in. It is ours, not the paper's.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.corpus.layout import SPLITS
from dsmr.corpus.store import Corpus
from dsmr.music.augment import Augmenter
from dsmr.music.vocabulary import Vocabulary

KINDS = ("exact", "transposed", "stretched")
ELSEWHERE, FIRST, RETURN = 0, 1, 2
"""Labels of tokens: elsewhere, in a passage that will return, in a return; those of composed refrains too."""
TRIES, NUDGE = 12, 0.2  # passages tried for one return, and how far apart (in the distance's logarithm)


@dataclass(frozen=True)
class Return:
    """One return: tokens `begin` to `end` - 1 of the planted piece repeat `source` to `source_end` - 1.

    `distance` is `begin` - `source`; `interval` is in semitones; `factor` is how much slower all times are.
    """

    source: int
    source_end: int
    begin: int
    end: int
    kind: str
    interval: int = 0
    factor: float = 1.0

    @property
    def distance(self) -> int:
        return self.begin - self.source


@dataclass(frozen=True)
class Planted:
    """A piece with its returns, in order; `labels` has one of ELSEWHERE, FIRST, RETURN for each token."""

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    returns: tuple[Return, ...]


class Planter:
    """Plants returns into pieces of one vocabulary.

    Args:
        share: of a planted piece's tokens that shall be returns, about; above 0 and at most 0.5.
        seconds: shortest and longest passage.
        distance: from a passage to its return in tokens, drawn evenly on a logarithmic scale.
        kinds: of `KINDS`, each as likely as the other.

    Raises:
        UserError: for a vocabulary in which a passage cannot be taken out whole, or values out of range.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        share: float = 0.25,
        seconds: tuple[float, float] = (5.0, 30.0),
        distance: tuple[int, int] = (1000, 16000),
        kinds: tuple[str, ...] = KINDS,
    ) -> None:
        # In TSD a passage between two moments is whole; elsewhere notes or the pedal would be cut off, or bars broken.
        if set(vocabulary.type_names) != {"PAD", "BOS", "EOS", "Pitch", "Velocity", "Duration", "TimeShift"}:
            raise UserError(
                "returns can be planted into pieces of the tokeniser tsd alone, but the corpus was prepared with "
                f"{vocabulary.scheme} ({', '.join(vocabulary.type_names[3:])})"
            )
        if not 0 < share <= 0.5:
            raise UserError(f"the share of returns must be above 0 and at most 0.5, but it is {share}")
        if not 0 < seconds[0] <= seconds[1]:
            raise UserError(f"the seconds of a return must be the shortest and the longest, but they are {seconds}")
        if not 1 <= distance[0] <= distance[1]:
            raise UserError(f"the distances of returns must be the nearest and the farthest, but they are {distance}")
        if not kinds or set(kinds) - set(KINDS):
            raise UserError(f"the kinds of returns must be of {', '.join(KINDS)}, but they are {', '.join(kinds)}")
        self.vocabulary = vocabulary
        self.share, self.seconds, self.distance, self.kinds = share, seconds, distance, kinds
        self._augmenter = Augmenter(vocabulary)
        self._is_time = vocabulary.of_type("TimeShift")

    def __call__(self, tokens: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """A planted piece's tokens alone, as a `StreamLoader` wants them."""
        return self.plant(tokens, rng).tokens

    def plant(self, tokens: npt.NDArray[np.int64], rng: np.random.Generator) -> Planted:
        """Plant returns into one piece (BOS … EOS); one that is too short for any comes back as it was."""
        tokens = np.asarray(tokens, dtype=np.int64)
        draft = _Draft(tokens, self._is_time, self.vocabulary)
        at = 0  # border at which the next return may stand
        while True:
            # The first return stands as soon as it can; what is fresh between two is longer, the smaller the share.
            found = self._next(draft, at, rng)
            if found is None:
                return draft.planted()
            length = found[2] - found[1]
            fresh = (1 / self.share - 1) * length * float(rng.uniform(0.5, 1.5))
            at = draft.border_after(found[0], fresh)

    def _next(self, draft: "_Draft", at: int, rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Plant one return at border `at` or later: where it stands, begin and end of its source in the original."""
        for border in range(max(at, draft.first_border(self.distance[0])), len(draft.borders), 16):
            here = draft.place(border)
            low, high = self.distance[0], min(self.distance[1], here)
            wanted = rng.uniform(math.log(low), math.log(high)) if high > low else math.log(low)
            for _ in range(TRIES):
                # Near what was drawn, not drawn anew: near passages are more often free, and would be too many.
                near = round(math.exp(wanted + rng.uniform(-NUDGE, NUDGE)))
                seconds = float(rng.uniform(*self.seconds))
                source = draft.source(border, here - min(max(near, low), high), seconds, self.distance)
                if source is not None:
                    draft.put(border, source, *self._again(draft.original[slice(*source)], rng))
                    return border, *source
        return None

    def _again(
        self, passage: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.int64], str, int, float]:
        """A passage as it returns: its tokens, the kind, interval and factor."""
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        if kind == "transposed":
            low, high = self._augmenter.interval_range(passage)
            intervals = [interval for interval in range(low, high + 1) if interval]
            if intervals:
                interval = int(rng.choice(intervals))
                return self._augmenter.transposed(passage, interval), kind, interval, 1.0
        if kind == "stretched":
            factor = math.exp(float(rng.uniform(0.05, 0.2)) * (1 if rng.random() < 0.5 else -1))
            return self._augmenter.stretched(passage, factor), kind, 0, factor
        return passage, "exact", 0, 1.0


class _Draft:
    """A piece in the making: the original, what was put in where, and which of its passages are taken.

    A border is where a moment begins: its first token moves time on. Passages go from border to border.
    """

    def __init__(self, tokens: npt.NDArray[np.int64], is_time: npt.NDArray[np.bool_], vocabulary: Vocabulary) -> None:
        self.original = tokens
        moves = is_time[tokens]
        self.borders = np.flatnonzero(moves & ~np.concatenate([[False], moves[:-1]]))
        clock = vocabulary.clock(tokens)
        self.times = clock[np.maximum(self.borders - 1, 0)]
        self.put_in: list[tuple[int, npt.NDArray[np.int64], tuple[int, int], str, int, float]] = []
        self.shift = np.zeros(len(self.borders), dtype=np.int64)  # of each border: tokens put in before it
        self.taken = np.zeros(len(tokens), dtype=bool)
        self.broken: list[int] = []  # original positions at which something was put in

    def place(self, border: int) -> int:
        """Where in the planted piece the border lies, before anything is put in there."""
        return int(self.borders[border] + self.shift[border])

    def first_border(self, place: int) -> int:
        """The first border at least so far into the planted piece."""
        return int(np.searchsorted(self.borders + self.shift, place))

    def border_after(self, border: int, tokens: float) -> int:
        """The first border at least so many original tokens after `border`, and not itself."""
        return max(border + 1, int(np.searchsorted(self.borders, self.borders[border] + tokens)))

    def source(self, border: int, place: int, seconds: float, distance: tuple[int, int]) -> tuple[int, int] | None:
        """The passage (in original positions) that begins nearest to `place` of the planted piece, about `seconds`
        long and over before `border`; None where it was used before or something was put into it."""
        places = (self.borders + self.shift)[:border]
        first = min(int(np.searchsorted(places, place)), border - 1)
        while first < border and self.place(border) - places[first] > distance[1]:
            first += 1
        if first >= border or self.place(border) - places[first] < distance[0]:
            return None
        last = min(int(np.searchsorted(self.times, self.times[first] + seconds)), border)
        begin, end = int(self.borders[first]), int(self.borders[last])
        if end <= begin or self.taken[begin:end].any() or any(begin < at < end for at in self.broken):
            return None
        return begin, end

    def put(
        self,
        border: int,
        source: tuple[int, int],
        passage: npt.NDArray[np.int64],
        kind: str,
        interval: int,
        factor: float,
    ) -> None:
        at = int(self.borders[border])
        self.put_in.append((at, passage, source, kind, interval, factor))
        self.shift[border:] += len(passage)
        self.taken[slice(*source)] = True
        self.broken.append(at)

    def planted(self) -> Planted:
        """The finished piece. Returns were put in from left to right, so each one's place is final."""
        tokens, labels, returns = [], [], []
        done, added = 0, 0
        marks = np.where(self.taken, FIRST, ELSEWHERE).astype(np.uint8)
        shifts: list[tuple[int, int]] = []  # (original position, tokens put in up to there, itself included)
        for at, passage, (begin, end), kind, interval, factor in self.put_in:
            tokens += [self.original[done:at], passage]
            labels += [marks[done:at], np.full(len(passage), RETURN, dtype=np.uint8)]
            before = next((total for position, total in reversed(shifts) if position <= begin), 0)
            here = at + added
            returns.append(Return(begin + before, end + before, here, here + len(passage), kind, interval, factor))
            done, added = at, added + len(passage)
            shifts.append((at, added))
        tokens.append(self.original[done:])
        labels.append(marks[done:])
        return Planted(np.concatenate(tokens), np.concatenate(labels), tuple(returns))


def planted_corpus(
    corpus: Corpus, split: str, planter: Planter, seed: int = 0, pieces: Sequence[int] | npt.NDArray[Any] | None = None
) -> tuple[Corpus, list[tuple[Return, ...]]]:
    """The pieces of a split (or just `pieces`) with returns planted, as a corpus in memory, and each one's returns.

    The same seed plants the same, whatever other pieces there are. Nothing is written. `UserError` where no piece is
    long enough for a return.
    """
    pieces = [int(i) for i in (corpus.pieces_of(split) if pieces is None else pieces)]
    done = [planter.plant(corpus.piece(i), np.random.default_rng((seed, i))) for i in pieces]
    if not any(planted.returns for planted in done):
        longest = max((len(planted.tokens) for planted in done), default=0)
        raise UserError(
            f"no piece of {corpus.name}, split '{split}', is long enough for a return after "
            f"{planter.distance[0]:,} tokens: the longest of its {len(done)} has {longest:,}"
        )
    tokens = np.concatenate([planted.tokens for planted in done]).astype(np.uint16)
    clock = [float(corpus.vocabulary.clock(planted.tokens)[-1]) for planted in done]
    own = [float(corpus.vocabulary.clock(corpus.piece(i))[-1]) for i in pieces]
    index: dict[str, npt.NDArray[Any]] = {
        "offsets": np.cumsum([0, *(len(planted.tokens) for planted in done)]).astype(np.int64),
        "n_notes": np.array([corpus.vocabulary.count_notes(planted.tokens) for planted in done], dtype=np.int64),
        "seconds": np.array(corpus.seconds[pieces] + np.subtract(clock, own)),
        "split": np.full(len(done), SPLITS.index(split), dtype=np.uint8),
    }
    manifest = {
        "name": f"{corpus.name}, returns planted (seed {seed})",
        "digest": hashlib.sha256(tokens.astype("<u2").tobytes()).hexdigest(),
    }
    labels = np.concatenate([planted.labels for planted in done])
    sources = [corpus.source[i] for i in pieces]
    return (
        Corpus(corpus.path, manifest, corpus.vocabulary, tokens, labels, index, sources),
        [planted.returns for planted in done],
    )
