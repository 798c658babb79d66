"""Measure the engines of the CPU path on the present processor, and write those that win to a file.

    python -m dsmr_kernels.tools.tune --device cpu --out tuned-cpu.json    # a minute
    DSMR_TUNED_CPU=tuned-cpu.json python train.py                          # used only when asked for

For each dtype and pass every engine that can make it is held against the float64 oracle, then timed, all in turn. One
wins if over all shapes it is faster than the table's by more than `MARGIN`. The file is refused on another processor,
instruction set, version of PyTorch or of the engines.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from dsmr_kernels.api import memory_attention
from dsmr_kernels.backends.sdpa.processor import Choice, Key, Pass, from_table
from dsmr_kernels.backends.sdpa.tuned import FORMAT, candidates, use
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.costing.timing import in_turn
from dsmr_kernels.measured import sealed
from dsmr_kernels.storage import write_text
from dsmr_kernels.testing import assert_agrees_with_oracle

MARGIN = 0.03  # of the time: less than this is noise, and the table stays
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Shape:
    """A call to measure: one segment of `queries` tokens behind a full memory of `memory` tokens, head_dim 64."""

    batch: int
    heads: int
    queries: int
    memory: int

    def case(self, dtype: torch.dtype) -> Case:
        """Random inputs; the memory has wrapped."""
        return random_case(
            batch=self.batch, heads=self.heads, kv_heads=self.heads, queries=self.queries, head_dim=64, dtype=dtype,
            capacity=self.memory, seen=[self.memory + 7] * self.batch, horizon=self.memory,
        )  # fmt: skip


# A long memory, a training step, many short rows.
SHAPES = (Shape(1, 8, 1024, 4096), Shape(2, 8, 512, 2048), Shape(8, 8, 128, 512))
SMALL = Shape(1, 2, 96, 160)  # for the oracle


@contextlib.contextmanager
def trying(entries: dict[Key, Choice]) -> Iterator[None]:
    """Let these choices serve, whatever DSMR_TUNED_CPU says."""
    use(entries)
    try:
        yield
    finally:
        use(None)


def _timed(case: Case, key: Key, choice: Choice) -> Callable[[], Any]:
    """The pass by this choice, to be timed."""
    leaves = [x.detach().requires_grad_(key[1] == "backward") for x in (case.q, case.k, case.v)]

    def forward() -> Any:
        q, k, v = leaves
        return memory_attention(q, k, v, case.memory, **case.options, backend="sdpa")

    out = forward() if key[1] == "backward" else None

    def call() -> Any:
        with trying({key: choice}):
            return forward() if out is None else torch.autograd.grad(out, leaves, case.grad, retain_graph=True)

    return call


def measure(key: Key, rounds: int) -> list[dict[str, Any]]:
    """What every candidate takes for a pass, in seconds at each shape; those whose results are wrong are left out."""
    rows: list[dict[str, Any]] = []
    right: list[tuple[dict[str, Any], Choice]] = []
    for choice in candidates(*key):
        row = _entry(key, choice)
        try:
            with trying({key: choice}):
                assert_agrees_with_oracle(SMALL.case(key[0]), "sdpa")
            right.append((row | {"seconds": []}, choice))
        except (AssertionError, RuntimeError) as error:  # also what PyTorch has no kernel for
            rows.append(row | {"left_out": str(error).strip().split("\n")[0]})
    for shape in SHAPES:
        case = shape.case(key[0])
        for (row, _), turns in zip(right, in_turn([_timed(case, key, c) for _, c in right], rounds), strict=True):
            row["seconds"].append(statistics.median(turns))
    return [row for row, _ in right] + rows


def _entry(key: Key, choice: Choice) -> dict[str, Any]:
    def named(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    return {"dtype": named(key[0]), "pass": key[1], "engine": choice.engine, "computed_in": named(choice.dtype)}


def winner(rows: list[dict[str, Any]], table: dict[str, Any]) -> dict[str, Any] | None:
    """The entry that is faster than the `table`'s over all shapes by more than `MARGIN`, if there is one."""
    timed = [row for row in rows if "seconds" in row]
    base = next((row["seconds"] for row in timed if row.items() >= table.items()), None)
    for row in timed:
        row["speedup"] = 1.0
        if base is not None:
            ratios = [math.log(a / b) for a, b in zip(base, row["seconds"], strict=True)]
            row["speedup"] = round(math.exp(sum(ratios) / len(ratios)), 3)
    best = max(timed, key=lambda row: row["speedup"], default=None)
    if best is None or (base is not None and best["speedup"] <= 1 + MARGIN):
        return None
    return {name: best[name] for name in table}


def tune(dtypes: Iterable[str], rounds: int, say: Callable[[str], None] = lambda said: None) -> dict[str, Any]:
    """{"entries": those that beat the table's, "measured": everything}."""
    entries, measured = [], []
    table = {(d, of): from_table(getattr(torch, d), of) for d in dtypes for of in get_args(Pass)}
    for (dtype, of), first in table.items():
        key: Key = (getattr(torch, dtype), of)
        rows = measure(key, rounds)
        best = winner(rows, _entry(key, first))
        for row in rows:
            times = ", ".join(f"{1e3 * s:.1f}" for s in row.get("seconds", ()))
            outcome = f"{times} ms, {row['speedup']:.2f} x" if times else row["left_out"]
            say(f"{dtype} {of}: {row['engine']} in {row['computed_in']}: {outcome}")
        measured += rows
        if best is not None:
            entries.append(best)
    return {"entries": entries, "measured": measured}


def write(path: Path, machine: dict[str, str], found: dict[str, Any]) -> None:
    """Write a file for `dsmr_kernels.backends.sdpa.tuned` to read, whole or not at all.

    Args:
        machine: what must be the same where it is used.
        found: of `tune`; what was measured is kept for readers of the file and never read back.
    """
    write_text(path, json.dumps(sealed({"format": FORMAT, **machine, **found}), indent=1) + "\n")
