"""Numbers below the least normal one, 1.2e-38 in float32, count as zero, since some processors take a hundred times as
long for each of them as for any other.

Attention makes them by the million once a model has learnt to look at few keys: gradients of the weights of all others,
of no consequence beside a sum of one. With them a step of training took three times as long on an Intel processor.
"""

from typing import Any, Self

import torch

_LEAST, _HALF = 2.2250738585072014e-308, 0.5  # of Python's own numbers, which are held to the same setting


class WithoutDenormals:
    """A context in which this thread counts them as zero, and behind which it does what it did. Threads that are
    started in it inherit it."""

    __slots__ = ("changes",)

    def __enter__(self) -> Self:
        self.changes = _LEAST * _HALF != 0.0
        if self.changes:
            torch.set_flush_denormal(True)
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.changes:
            torch.set_flush_denormal(False)
