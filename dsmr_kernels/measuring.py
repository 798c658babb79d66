"""How long a call takes, measured rightly: warm, with a cold L2 cache on a GPU, the median of many.

`kernel_seconds` is what the GPU works, by events around the call; `wall_seconds` is what the caller waits, launches and
Python included. On a CPU both read the clock.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


FLUSH, OFTEN = 256 << 20, 8  # bytes, several times any L2 cache, and how often they are written before a call


def _often(call: Call, device: torch.device, budget: float, most: int) -> int:
    """Repeats that fit into `budget` seconds, 3 to `most`; the calls that find it out are the warm-up."""
    for _ in range(2):
        call()
    _wait(device)
    begin = time.perf_counter()
    call()
    _wait(device)
    return max(3, min(most, int(budget / max(time.perf_counter() - begin, 1e-6))))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_seconds(call: Call, device: torch.device, *, budget: float = 0.3, most: int = 50) -> float:
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
    _wait(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


def wall_seconds(call: Call, device: torch.device, *, budget: float = 0.3, most: int = 50) -> float:
    """Median time of a call among others of its kind, one after another, launches and Python included."""
    seconds, group = [], max(1, _often(call, device, budget, most) // 5)
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(group):
            call()
        _wait(device)
        seconds.append((time.perf_counter() - begin) / group)
    return statistics.median(seconds)


def graphed(call: Call, device: torch.device) -> Call | None:
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
