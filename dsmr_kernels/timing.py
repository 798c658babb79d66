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
