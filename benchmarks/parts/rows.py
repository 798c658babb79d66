"""One row of a benchmark: what it says of itself, and how it is timed. Every benchmark file goes through here.

On a CPU a row's time is the wall clock, and rates are those of the fastest round: what else the machine does can only
make a round slower. On CUDA three times are told apart: pytest-benchmark's own column is an eager call with the device
synchronised after it (launches and Python included, L2 cache as the last call left it); "kernel_ms" is the GPU's own
work by events, the L2 cache overwritten before each call, and what rates are made of; "graph_ms" is a replay of the
call's CUDA graph, timed like the kernels. Compilation and warm-up come before the clock.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.parts.machine import describe, package
from benchmarks.parts.peers import Missing
from dsmr.console.terminal import out_of_memory
from dsmr_kernels.costing.ceilings import load
from dsmr_kernels.costing.cost import Work
from dsmr_kernels.costing.predict import Ceilings
from dsmr_kernels.costing.timing import graphed, kernel_seconds, synchronize

OURS = "ours"


def quick() -> bool:
    """Whether small shapes and few rounds were asked for: DSMR_BENCH=quick."""
    return os.environ.get("DSMR_BENCH", "full") == "quick"


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 0.1 if quick() else 0.4  # of timed rounds for a row
ROUNDS = (3, 5, 15)  # the fewest, those worth waiting twice as long for, the most
SHORTEST = 2e-3  # seconds of a round: calls that are shorter are timed several at once


@dataclass(frozen=True)
class Row:
    """What a row says of itself.

    Attributes:
        question: the table that it stands in.
        case: the group within the table; all its rows did the same work.
        contender: who did it.
        ours: whether it is held against the best of the others.
        work: that the result needs; None where it is not counted.
        predicted: seconds, where the cost model has an answer.
        tokens: that the call reads, for tokens a second.
        parameters: of the model, where there is one.
    """

    question: str
    case: str
    contender: str
    ours: bool
    shape: str
    dtype: torch.dtype
    backend: str
    work: Work | None = None
    predicted: float | None = None
    tokens: int | None = None
    parameters: int | None = None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def ceilings() -> Ceilings | None:
    """What this device does at best, if `python -m dsmr_kernels.costing.ceilings` has measured it."""
    return load(DEVICE)


@functools.cache
def about() -> dict[str, str]:
    """The machine and the versions that a figure holds for."""
    names = ("transformers", "x-transformers", "pytest-benchmark")
    found = describe(DEVICE) | {name: package(name) for name in names}
    return found


@contextlib.contextmanager
def reported(benchmark: Any, row: Row) -> Iterator[None]:
    """Give the row its name before anything can fail inside. A contender that cannot run here, or for which there is
    not enough memory, is skipped and says so; a wrong one fails."""
    benchmark.group = f"{about()['device']}: {row.question}, {row.case}"
    benchmark.extra_info.update(
        {
            "question": row.question,
            "case": row.case,
            "contender": row.contender,
            "ours": row.ours,
            "shape": row.shape,
            "dtype": name_of(row.dtype),
            "backend": row.backend,
            "device": about()["device"],
            "versions": {name: said for name, said in about().items() if name not in ("device", "processor")},
        }
    )
    try:
        yield
    except Missing as missing:
        pytest.skip(str(missing))
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not out_of_memory(error):
            raise
        pytest.skip("out of memory")


def timed(benchmark: Any, row: Row, call: Callable[[], Any]) -> None:
    """Time a call whose result has been checked, and add to the row what follows from its time."""

    def waited() -> None:
        call()
        synchronize(DEVICE)

    waited()
    begin = time.perf_counter()
    waited()
    once = max(time.perf_counter() - begin, 1e-7)
    iterations = max(1, int(SHORTEST / once))
    rounds = min(max(int(SECONDS / (once * iterations)), ROUNDS[0]), ROUNDS[2])
    if rounds < ROUNDS[1] and once * ROUNDS[1] < 2 * SECONDS:
        rounds = ROUNDS[1]
    benchmark.pedantic(waited, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats["min"]
    if DEVICE.type == "cuda":
        seconds = _on_gpu(benchmark.extra_info, call)
    benchmark.extra_info.update(_derived(row, seconds))


def _on_gpu(said: dict[str, Any], call: Callable[[], Any]) -> float:
    """Add the GPU's own times and its peak memory; the seconds of its own work."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    call()
    said["peak_mib"] = (torch.cuda.max_memory_allocated(DEVICE) - before) / 2**20
    seconds = kernel_seconds(call, DEVICE)
    said["kernel_ms"], said["l2"] = 1e3 * seconds, "cold for kernel_ms and graph_ms, else as the last call left it"
    try:
        replay = graphed(call, DEVICE)
        if replay is not None:
            said["graph_ms"] = 1e3 * kernel_seconds(replay, DEVICE)
    except Exception as error:  # a call that cannot be captured is still worth its other figures
        said["graph_failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return seconds


def _derived(row: Row, seconds: float) -> dict[str, Any]:
    """Rates, of what the result needs and of what ordinary attention makes for it; how near to the ceilings."""
    found: dict[str, Any] = {}
    if row.tokens is not None:
        found["tokens_per_s"] = row.tokens / seconds
    if row.parameters is not None:
        found["parameters"] = row.parameters
    if row.predicted is not None:
        found["predicted_ms"] = 1e3 * row.predicted
    if row.work is None:
        return found
    found["gb_per_s"] = row.work.bytes / seconds / 1e9
    if row.work.flops:
        found["gflops"] = row.work.flops / seconds / 1e9
        found["nominal_gflops"] = row.work.nominal_flops / seconds / 1e9
    limits, dtype = ceilings(), name_of(row.dtype)
    if limits is not None and dtype in limits.matrix_flops:
        least = max(row.work.flops / limits.matrix_flops[dtype], row.work.bytes / limits.copy_bytes)
        found["share_of_ceiling"] = least / seconds
    return found
