"""Seconds of a call on the device where it runs: warmed up before the clock, the device waited for.

`seconds_of` gives every round of a long call. For short ones, `kernel_seconds` is what the GPU itself works, behind a
cold L2 cache, and `wall_seconds` what the caller waits, launches and Python included; on a CPU both read the clock.
"""

import random
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


FLUSH, OFTEN = 256 << 20, 8  # bytes, several times any L2 cache, and how often they are written before a call


def _often(call: Callable[[], Any], device: torch.device, budget: float, most: int) -> int:
    """Repeats that fit into `budget` seconds, 3 to `most`; the calls that find it out are the warm-up."""
    for _ in range(2):
        call()
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return max(3, min(most, int(budget / max(time.perf_counter() - begin, 1e-6))))


def kernel_seconds(call: Callable[[], Any], device: torch.device, *, budget: float = 0.3, most: int = 50) -> float:
    """Median time of the GPU's own work in one call, the L2 cache overwritten before each."""
    if device.type != "cuda":
        return wall_seconds(call, device, budget=budget, most=most)
    repeats = _often(call, device, budget, most)
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        for _ in range(OFTEN):  # keeps the GPU busy for most of a millisecond, while the call's launches queue up
            flush.zero_()
        begin.record()
        call()
        end.record()
    synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def wall_seconds(call: Callable[[], Any], device: torch.device, *, budget: float = 0.3, most: int = 50) -> float:
    """Median time of a call among others of its kind, one after another, launches and Python included."""
    seconds, group = [], max(1, _often(call, device, budget, most) // 5)
    for _ in range(5):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(group):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - begin) / group)
    return statistics.median(seconds)


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any] | None:
    """The call captured in a CUDA graph, to be replayed; None on a CPU. The call must already be warm."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Yardstick:
    """Tells whether a machine that others use as well is quiet: a matrix product, against the fastest seen so far."""

    SLOWER = 1.2
    TRIES = 3

    def __init__(self, device: torch.device, tries: int | None = None) -> None:
        side = 1024 if device.type == "cpu" else 4096
        self.device, self.side = device, torch.randn(side, side, device=device)
        self.tries = self.TRIES if tries is None else tries
        self.best = min(seconds_of(self._product, device, rounds=5))
        self.seen = [self.best]

    def _product(self) -> torch.Tensor:
        return self.side @ self.side

    def quiet(self) -> bool:
        """Whether the product runs now about as fast as it ever did."""
        now = min(seconds_of(self._product, self.device, rounds=2, warmup=0))
        self.best = min(self.best, now)
        self.seen.append(now)
        return now <= self.SLOWER * self.best

    @property
    def spread(self) -> float:
        """Of the product's seconds over all that was asked so far: the distance between the quartiles over the
        median."""
        return Timing.of(self.seen).spread

    def fastest(self, measure: Callable[[], tuple[float, ...]]) -> tuple[tuple[float, ...], bool]:
        """The least of each of `measure`'s figures, measured again as long as the machine was not quiet before and
        after, a few times at most; and whether it was quiet in the end."""
        found: tuple[float, ...] | None = None
        before = self.quiet()
        for _ in range(self.tries):
            figures = measure()
            found = figures if found is None else tuple(map(min, found, figures))
            after = self.quiet()
            if before and after:
                return found, True
            before = after
        assert found is not None
        return found, False


def in_turn(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, the calls taking turns, on a CPU; two rounds of warm-up go before.

    Each round shuffles them: what a call finds in the caches is left there by the one before it.
    """
    order, shuffle = list(range(len(calls))), random.Random(0).shuffle
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        shuffle(order)
        for which in order:
            begin = time.perf_counter()
            calls[which]()
            if turn >= 2:
                seconds[which].append(time.perf_counter() - begin)
    return seconds
