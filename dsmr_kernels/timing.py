"""Seconds of a call on the device where it runs: warmed up before the clock, on CUDA timed by events."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median round, the fastest, and the distance between the quartiles over the median."""

    median: float
    fastest: float
    spread: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Of one or more rounds."""
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (median,) * 3
        return cls(median, min(seconds), (high - low) / median if median else 0.0, len(seconds))


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    call: Callable[[], Any], device: torch.device, *, rounds: int = 7, warmup: int = 2, limit: float = float("inf")
) -> list[float]:
    """Seconds of each round.

    Args:
        warmup: rounds before the clock; compilation and allocation belong there.
        limit: begin no further round, the first aside, once so many seconds have been timed.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    seconds: list[float] = []
    while not seconds or (len(seconds) < rounds and sum(seconds) < limit):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return seconds


class Yardstick:
    """Tells whether a machine that others use as well is quiet: a matrix product, against the fastest seen so far."""

    SLOWER = 1.2
    TRIES = 3

    def __init__(self, device: torch.device) -> None:
        side = 1024 if device.type == "cpu" else 4096
        self.device, self.side = device, torch.randn(side, side, device=device)
        self.best = min(seconds_of(self._product, device, rounds=5))

    def _product(self) -> torch.Tensor:
        return self.side @ self.side

    def quiet(self) -> bool:
        """Whether the product runs now about as fast as it ever did."""
        now = min(seconds_of(self._product, self.device, rounds=2, warmup=0))
        self.best = min(self.best, now)
        return now <= self.SLOWER * self.best

    def fastest(self, measure: Callable[[], tuple[float, ...]]) -> tuple[tuple[float, ...], bool]:
        """The least of each of `measure`'s figures, measured again as long as the machine was not quiet before and
        after, a few times at most; and whether it was quiet in the end."""
        found: tuple[float, ...] | None = None
        before = self.quiet()
        for _ in range(self.TRIES):
            figures = measure()
            found = figures if found is None else tuple(map(min, found, figures))
            after = self.quiet()
            if before and after:
                return found, True
            before = after
        assert found is not None
        return found, False
