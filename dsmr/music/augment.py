"""New keys and new tempos for training pieces, made on the fly from their tokens alone.

The result is again a piece of the same vocabulary with the same notes in the same order of moments: every pitch moved
by one interval, every time by one factor. MidiTok is not needed, and nothing is written.
"""

import math

import numpy as np
import numpy.typing as npt

from dsmr.music.vocabulary import PITCH_TYPES, TIME_TYPES, Vocabulary


class Augmenter:
    """Draws a transposition and a stretch for each piece it is called with.

    Args:
        vocabulary: the vocabulary of the pieces.
        transpose: lowest and highest interval in semitones; drawn among those that keep every note of the piece
            within the vocabulary's pitches (0 if none does).
        stretch: shortest and longest factor on all times; drawn evenly on a logarithmic scale.
    """

    def __init__(
        self, vocabulary: Vocabulary, transpose: tuple[int, int] = (-5, 6), stretch: tuple[float, float] = (0.9, 1.1)
    ) -> None:
        if not transpose[0] <= transpose[1]:
            raise ValueError(f"transpose must be (lowest, highest), got {transpose}")
        if not 0 < stretch[0] <= stretch[1] < math.inf:
            raise ValueError(f"stretch must be (shortest, longest) with 0 < shortest, got {stretch}")
        self.vocabulary = vocabulary
        self.transpose = transpose
        self.stretch = stretch
        self._is_time = vocabulary.of_type(*TIME_TYPES)
        self._is_duration = vocabulary.of_type("Duration")
        self._has_pitch = vocabulary.of_type(*PITCH_TYPES)
        self._times = _Bars(vocabulary) if "Bar" in vocabulary.type_names else _Shifts(vocabulary)

    def __call__(self, tokens: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """One piece (BOS ... EOS) in a key and at a tempo drawn from `rng`; the input is not changed."""
        low, high = self.interval_range(tokens)
        interval = int(rng.integers(low, high + 1))
        factor = math.exp(rng.uniform(math.log(self.stretch[0]), math.log(self.stretch[1])))
        return self.stretched(self.transposed(tokens, interval), factor)

    def interval_range(self, tokens: npt.NDArray[np.int64]) -> tuple[int, int]:
        """The lowest and highest interval of `transpose` by which this piece can be moved; (0, 0) if none."""
        pitches = self.vocabulary.pitch[tokens[self._has_pitch[tokens]]]
        if pitches.size == 0:
            return 0, 0
        known = self.vocabulary.pitch[self._has_pitch]
        low = max(self.transpose[0], int(known.min() - pitches.min()))
        high = min(self.transpose[1], int(known.max() - pitches.max()))
        return (low, high) if low <= high else (0, 0)

    def transposed(self, tokens: npt.NDArray[np.int64], interval: int) -> npt.NDArray[np.int64]:
        """Every note `interval` semitones higher; `ValueError` if one would leave the vocabulary's pitches."""
        moved = np.arange(self.vocabulary.size)
        for index in np.flatnonzero(self._has_pitch):
            kind = self.vocabulary.type_names[self.vocabulary.types[index]]
            moved[index] = self.vocabulary.ids.get(f"{kind}_{self.vocabulary.pitch[index] + interval}", -1)
        result = moved[tokens]
        if result.size and result.min() < 0:
            raise ValueError(f"{interval} semitones would move a note out of the vocabulary's pitches")
        return result.astype(tokens.dtype)

    def stretched(self, tokens: npt.NDArray[np.int64], factor: float) -> npt.NDArray[np.int64]:
        """Every time multiplied by `factor`, to the nearest tick.

        Onsets are rounded as times since the beginning, so errors do not add up, and moments that differ stay
        different (one tick apart at least, made up for at the next chance), so the order of notes stays the same.
        """
        words = self.vocabulary
        if np.any(tokens[1:] == words.bos_id):
            raise ValueError("tokens must be one piece: there is a BOS in their middle")
        head, tail = tokens[:1] == words.bos_id, tokens[-1:] == words.eos_id
        body = tokens[int(head.sum()) : len(tokens) - int(tail.sum())]
        ticks = words.tick_clock(body)
        is_event = ~self._is_time[body]
        events, old = body[is_event].astype(np.int64), ticks[is_event]
        if events.size == 0 or factor == 1.0:
            return tokens.copy()
        begins = np.append(True, np.diff(old) > 0)  # the first event of each moment
        moments = np.rint(old[begins] * factor).astype(np.int64)
        step = np.arange(len(moments))
        moments = np.maximum.accumulate(moments - step) + step
        events = self._durations(factor)[events]
        fill, counts, last = self._times.written(moments)

        # Before the first event of each moment: `counts` tokens `fill`, then those of `last` that are not -1.
        gaps = np.zeros(len(events), dtype=np.int64)
        gaps[begins] = counts + (last >= 0).sum(axis=1)
        places = np.arange(len(events)) + np.cumsum(gaps)
        result = np.full(len(events) + int(gaps.sum()), fill, dtype=np.int64)
        result[places] = events
        for back in range(1, last.shape[1] + 1):  # `last` is aligned to the right
            column = last[:, -back]
            result[places[begins][column >= 0] - back] = column[column >= 0]
        return np.concatenate([tokens[:1][head], result, tokens[-1:][tail]]).astype(tokens.dtype)

    def _durations(self, factor: float) -> npt.NDArray[np.int64]:
        """For each id its replacement: durations to the nearest one of `factor` times their length."""
        replaced = np.arange(self.vocabulary.size)
        durations = np.flatnonzero(self._is_duration)
        if durations.size:
            durations = durations[np.argsort(self.vocabulary.ticks[durations])]
            ticks = self.vocabulary.ticks[durations].astype(np.float64)
            middles = (ticks[1:] + ticks[:-1]) / 2
            replaced[durations] = durations[np.searchsorted(middles, ticks * factor)]
        return replaced


class _Shifts:
    """Time told by TimeShift tokens, a long pause by several: the greatest first, as MidiTok writes them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        shifts = np.flatnonzero(vocabulary.of_type("TimeShift"))
        shifts = shifts[np.argsort(vocabulary.ticks[shifts])]
        ticks = vocabulary.ticks[shifts]
        if ticks[0] != 1:
            raise ValueError(f"the shortest TimeShift must be one tick, got {ticks[0]}")
        self.longest, self.longest_ticks = int(shifts[-1]), int(ticks[-1])
        rows: list[list[int]] = [[]]
        for total in range(1, self.longest_ticks):
            greatest = int(np.searchsorted(ticks, total, side="right")) - 1
            rows.append([int(shifts[greatest]), *rows[total - int(ticks[greatest])]])
        width = max(map(len, rows))
        self.table = np.array([[-1] * (width - len(row)) + row for row in rows])

    def written(self, moments: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each moment the tokens that lead to it: a token, how often it comes, and the rest (-1 where none)."""
        pauses = np.diff(moments, prepend=0)
        return self.longest, pauses // self.longest_ticks, self.table[pauses % self.longest_ticks]


class _Bars:
    """Time told by Bar and Position tokens (REMI)."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.bar = vocabulary.ids["Bar_None"]
        self.bar_ticks = int(vocabulary.ticks[self.bar])
        positions = np.flatnonzero(vocabulary.of_type("Position"))
        self.positions = np.full(self.bar_ticks, -1)
        self.positions[vocabulary.ticks[positions]] = positions
        if self.positions.min() < 0:
            raise ValueError(f"a bar of {self.bar_ticks} ticks must have as many positions, got {len(positions)}")

    def written(self, moments: npt.NDArray[np.int64]) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `_Shifts.written`."""
        bars = moments // self.bar_ticks
        return self.bar, np.diff(bars, prepend=-1), self.positions[moments % self.bar_ticks][:, None]
