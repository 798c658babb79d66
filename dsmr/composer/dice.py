"""Chance that falls the same way on every machine, for the composer.

NumPy promises that a bit generator's raw stream never changes, but not what `Generator.normal` or `.integers` make of
it. So everything is drawn here from raw PCG64 words, with integer arithmetic and exact divisions only.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BLOCK = 1024


class Dice:
    """A reproducible source of chance, named by a seed and a path; `fork` gives independent dice for a sub-task."""

    def __init__(self, seed: int, *path: int) -> None:
        self._seed, self._path = seed, path
        self._bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path))
        self._words: list[int] = []

    def fork(self, number: int) -> "Dice":
        """Dice of their own for sub-task `number`, the same however many throws were made here before."""
        return Dice(self._seed, *self._path, number)

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._words:
            self._words = self._bits.random_raw(_BLOCK).tolist()
        return (self._words.pop() >> 11) * (1.0 / (1 << 53))

    def below(self, n: int) -> int:
        """An integer in 0 … n − 1."""
        return int(self.unit() * n)

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def bell(self) -> float:
        """A bell-shaped number in (−2, 2) with mean 0 and variance 1/3: the sum of four even ones."""
        return self.unit() + self.unit() + self.unit() + self.unit() - 2.0

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.unit() < probability

    def pick(self, choices: Sequence[T]) -> T:
        """One of `choices`, all equally likely."""
        return choices[int(self.unit() * len(choices))]

    def weigh(self, choices: Sequence[tuple[T, float]]) -> T:
        """One of `(choice, weight)`, as likely as its weight."""
        point = self.unit() * sum(weight for _, weight in choices)
        for choice, weight in choices:
            point -= weight
            if point < 0:
                return choice
        return choices[-1][0]

    def shuffled(self, choices: Sequence[T]) -> list[T]:
        """The same things in another order."""
        mixed = list(choices)
        for i in range(len(mixed) - 1, 0, -1):
            j = self.below(i + 1)
            mixed[i], mixed[j] = mixed[j], mixed[i]
        return mixed
