"""Measure neighbours of the fixed configurations on the present GPU, and write those that win to a file.

    python -m dsmr_kernels.tools.tune --out tuned.json    # minutes; head_dim 64 and 128 in bfloat16 unless told
    DSMR_TUNED=tuned.json python train.py                 # used only when asked for

A neighbour is tried if it compiles without spills and within the part's limits, and timed if its results keep the
project's tolerance at the lengths at which it is timed. It wins if it is faster than the table's over all shapes by
more than `MARGIN`. The file is refused on another GPU, with other versions or other kernels. With `--device cpu` the
engines of the CPU path are measured instead (`dsmr_kernels.tools.tune_cpu`).
"""

import argparse
import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsmr_kernels.api import memory_attention
from dsmr_kernels.cases import Case as Inputs
from dsmr_kernels.cases import random_case
from dsmr_kernels.costing.timing import kernel_seconds
from dsmr_kernels.dispatch import use_tuned
from dsmr_kernels.measured import sealed
from dsmr_kernels.storage import write_text
from dsmr_kernels.testing import assert_agrees_with_oracle
from dsmr_kernels.tools import tune_cpu
from dsmr_kernels.tools.aot import ELEMENTS, VARIANTS, Case, compile_kernel
from dsmr_kernels.tools.targets import TARGETS

if TYPE_CHECKING:
    from dsmr_kernels.backends.triton.configs import Config

MARGIN = 0.02  # of the time: less than this is noise, and the table stays
KERNELS = ("forward", "dq", "dkv")
Key = tuple[str, int, str]  # kernel, padded head_dim, dtype without "torch."


@dataclass(frozen=True)
class Shape:
    """A call to tune for: `segments` segments of `queries` tokens each behind a full memory of `memory` tokens."""

    batch: int
    heads: int
    queries: int
    memory: int
    segments: int = 1

    @functools.cache  # noqa: B019, the shapes of a run are few
    def inputs(self, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> Inputs:
        """Random inputs; the memory has wrapped."""
        case = random_case(
            batch=self.batch, heads=self.heads, kv_heads=self.heads, queries=self.segments * self.queries,
            head_dim=head_dim, capacity=self.memory, seen=[self.memory + 7] * self.batch, dtype=dtype,
            horizon=self.memory, segment_length=self.queries,
        )  # fmt: skip
        return case.to(device=device)


# A long memory, a training step, a whole piece.
SHAPES = (Shape(4, 8, 1024, 8192), Shape(8, 8, 512, 1024), Shape(1, 8, 1024, 2048, 8))


def candidates(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> list["Config"]:
    """The table's configuration, then its neighbours: one change, or two that make up for one another.

    Sizes and warps are doubled or halved, stages are one more or fewer. What must exceed a part's shared memory or
    registers is left out before anything is compiled.
    """
    from dsmr_kernels.backends.triton.configs import from_table, padded

    first = from_table(kernel, architecture, head_dim, dtype)
    steps: list[dict[str, int]] = [{name: sign} for name in ("bm", "bn", "warps", "stages") for sign in (1, -1)]
    steps += [{"bm": 1, "warps": 1}, {"bm": -1, "warps": -1}, {"bn": 1, "stages": -1}, {"bn": -1, "stages": 1}]
    steps += [{"bm": 1, "bn": -1}, {"bm": -1, "bn": 1}]
    found = [first]
    for step in steps:
        sizes = {name: int(getattr(first, name) * 2.0**sign) for name, sign in step.items() if name != "stages"}
        config = replace(first, **sizes, stages=first.stages + step.get("stages", 0), may_spill=0)
        if _possible(kernel, config, architecture, padded(head_dim), dtype):
            found.append(config)
    return found


def _possible(kernel: str, config: "Config", architecture: str, dim: int, dtype: torch.dtype) -> bool:
    """Whether a tile may fit: a lower bound on the memory and registers that it needs."""
    target = TARGETS[architecture]
    if min(config.bm, config.bn) < 16 or config.stages < 1 or not 2 <= config.warps <= 16:
        return False
    streamed = config.bm if kernel == "dkv" else config.bn  # rows of the two tiles that are loaded in each step
    if 2 * streamed * dim * dtype.itemsize * max(config.stages - 1, 1) > target.shared:
        return False
    kept = 2 * config.bn * dim if kernel == "dkv" else config.bm * dim  # accumulators, float32
    held = kept + config.bm * config.bn
    return bool(target.tensor_columns) or held / (config.warps * target.warp) <= 256


def limited(config: "Config", architecture: str) -> "Config | None":
    """The same with all the registers that its warps may have, which keeps the assembler from aiming at more warps and
    spilling to get there; None where it has a limit already, or the part takes none."""
    target = TARGETS[architecture]
    if config.most_registers or target.backend != "cuda":
        return None
    return replace(config, most_registers=min(255, target.registers // config.warps))


def clean(kernel: str, architecture: str, head_dim: int, dtype: str, config: "Config") -> str | None:
    """Why a configuration may not be used, or None; see `dsmr_kernels.tools.aot`."""
    for variant, given in VARIANTS.items():
        if given["HAS_BIAS"]:  # for which the table has entries of its own
            continue
        try:
            compiled = compile_kernel(Case(kernel, architecture, head_dim, dtype, variant), config)
        except Exception as error:  # whatever a compiler says of a tile that it cannot make
            return f"does not compile ({type(error).__name__})"
        if compiled.faults:
            return "; ".join(compiled.faults)
    return None


def refusals(
    alternatives: list["Config"],
    architecture: str,
    reasons: Callable[[list["Config"]], Iterable[str | None]],
) -> dict["Config", str | None]:
    """Each configuration with why it may not be used; those that spill are tried again `limited`.

    Args:
        reasons: of some configurations, as `clean` gives them.
    """
    found = dict(zip(alternatives, reasons(alternatives), strict=True))
    again = [
        other
        for config, reason in found.items()
        if "spills" in (reason or "") and (other := limited(config, architecture))
    ]
    return found | dict(zip(again, reasons(again), strict=True))


@dataclass(frozen=True)
class Choice:
    """The configuration that won, its mean speed-up over the table's, and what was measured on the way."""

    config: "Config"
    speedup: float
    measured: list[dict[str, Any]]


def select(
    alternatives: list["Config"],
    refused: Callable[["Config"], str | None],
    seconds: Callable[["Config"], list[float]],
    say: Callable[[str], None] = lambda said: None,
) -> Choice:
    """Time the alternatives, the first of which is the table's, and take the fastest if it is faster by `MARGIN`.

    Args:
        refused: why a configuration must not be used, or None.
        seconds: its time at each shape; may raise, for instance where results are wrong: the configuration is left out.
    """
    measured: list[dict[str, Any]] = []
    base: list[float] | None = None
    best, best_speedup = alternatives[0], 1.0
    for config in alternatives:
        row: dict[str, Any] = asdict(config)
        try:
            if reason := refused(config):
                raise ValueError(reason)
            times = seconds(config)
        except Exception as error:  # a candidate that fails in any way is no candidate, and the next one is tried
            if base is None:
                raise ValueError(f"the table's own configuration {config} cannot be measured: {error}") from error
            measured.append(row | {"left_out": str(error).strip().split("\n")[0] or type(error).__name__})
        else:
            base = base or times
            speedup = math.exp(sum(math.log(a / b) for a, b in zip(base, times, strict=True)) / len(times))
            measured.append(row | {"seconds": times, "speedup": round(speedup, 3)})
            if speedup > max(best_speedup, 1 + MARGIN):
                best, best_speedup = config, speedup
        say(f"  {_words(config):44} {_outcome(measured[-1])}")
    return Choice(best, best_speedup, measured)


def _words(config: "Config") -> str:
    limit = f", ≤ {config.most_registers} registers" if config.most_registers else ""
    return f"{config.bm} x {config.bn}, {config.warps} warps, {config.stages} stages{limit}"


def _outcome(row: dict[str, Any]) -> str:
    if "left_out" in row:
        return str(row["left_out"])
    return ", ".join(f"{1e3 * s:.3f}" for s in row["seconds"]) + f" ms, {row['speedup']:.2f} x"


def measure(
    kernel: str, config: "Config", shapes: Iterable[Shape], head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Check a configuration against the oracle at each shape (one row, two heads of it), then time it there.

    The two kernels of the backward are timed within it.
    """
    from dsmr_kernels.backends.triton.configs import trying

    seconds = []
    for shape in shapes:
        with trying(kernel, config):
            small = replace(shape, batch=1, heads=2)
            assert_agrees_with_oracle(small.inputs(head_dim, dtype, device), "triton")
            inputs = shape.inputs(head_dim, dtype, device)
            leaves = [x.detach().requires_grad_(kernel != "forward") for x in (inputs.q, inputs.k, inputs.v)]

            def forward(leaves: list[torch.Tensor] = leaves, inputs: Inputs = inputs) -> Any:
                q, k, v = leaves
                return memory_attention(q, k, v, inputs.memory, **inputs.options, backend="triton")

            if kernel == "forward":
                seconds.append(kernel_seconds(forward, device))
                continue
            out = forward()

            def backward(out: Any = out, leaves: list[torch.Tensor] = leaves, grad: torch.Tensor = inputs.grad) -> Any:
                return torch.autograd.grad(out, leaves, grad, retain_graph=True)

            seconds.append(kernel_seconds(backward, device))
    return seconds


def tune(
    architecture: str, dims: Iterable[int], dtypes: Iterable[str], kernels: Iterable[str], device: torch.device
) -> tuple[dict[Key, "Config"], list[dict[str, Any]]]:
    """The configurations that beat the table's, and everything that was measured; progress goes to stderr."""
    from dsmr_kernels.backends.triton.configs import padded

    def say(said: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s {said}", file=sys.stderr, flush=True)

    begin = time.perf_counter()
    entries, measured = {}, []
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for name in dtypes:
            dtype = getattr(torch, name)
            for head_dim in dims:
                for kernel in kernels:
                    alternatives = candidates(kernel, architecture, head_dim, dtype)
                    say(f"{kernel}, head_dim {head_dim}, {name}: compiling {len(alternatives)} configurations")
                    compiled = functools.partial(clean, kernel, architecture, head_dim, name)
                    refused = refusals(alternatives, architecture, functools.partial(pool.map, compiled))
                    choice = select(
                        list(refused),
                        refused.__getitem__,
                        lambda c, k=kernel, d=head_dim, t=dtype: measure(k, c, SHAPES, d, t, device),  # type: ignore[misc]
                        say,
                    )
                    measured += [{"kernel": kernel, "head_dim": head_dim, "dtype": name, **r} for r in choice.measured]
                    if choice.config != alternatives[0]:
                        entries[(kernel, padded(head_dim), name)] = choice.config
    return entries, measured


def write(
    path: Path, machine: dict[str, str], architecture: str, entries: dict[Key, "Config"], measured: list[dict[str, Any]]
) -> None:
    """Write a file for `dsmr_kernels.backends.triton.tuned` to read, whole or not at all.

    Args:
        machine: what must be the same where it is used.
        measured: kept for readers of the file and never read back.
    """
    listed = [
        {"kernel": kernel, "padded_head_dim": dim, "dtype": dtype, **asdict(config)}
        for (kernel, dim, dtype), config in sorted(entries.items())
    ]
    content = {"format": 1, **machine, "architecture": architecture, "entries": listed, "measured": measured}
    write_text(path, json.dumps(sealed(content), indent=1) + "\n")


def _main_on_cpu(asked: argparse.Namespace) -> int:
    from dsmr_kernels.backends.sdpa.tuned import VARIABLE, this_machine

    if asked.dim or asked.kernel:
        print("tune measures a CPU's engines at a head_dim of 64: --dim and --kernel are for a GPU", file=sys.stderr)
        return 1
    dtypes = [name for name in asked.dtype or ("float32", "bfloat16") if name in tune_cpu.DTYPES]
    found = tune_cpu.tune(dtypes, asked.rounds, lambda said: print(said, file=sys.stderr, flush=True))
    tune_cpu.write(asked.out, this_machine(), found)
    for entry in found["entries"]:
        print(f"{entry['dtype']} {entry['pass']}: {entry['engine']} in {entry['computed_in']}")
    print(f"{len(found['entries'])} engines beat the table's; written to {asked.out}, used with {VARIABLE}={asked.out}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Tune, write the file, say what won."""
    parser = argparse.ArgumentParser(
        description="Measure alternatives to the fixed configurations on this GPU, or to the engines of this CPU."
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to write, for DSMR_TUNED (DSMR_TUNED_CPU)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure on (default cuda)")
    parser.add_argument("--dim", type=int, action="append", help="head_dim (may be given again; default 64 and 128)")
    parser.add_argument("--dtype", choices=ELEMENTS, action="append", help="(may be given again; default bfloat16)")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="(may be given again; default all)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each shape, on a CPU (default 7)")
    asked = parser.parse_args(arguments)
    if asked.device == "cpu":
        return _main_on_cpu(asked)
    if not torch.cuda.is_available():
        print("tune measures on a GPU, and there is none here; the fixed table needs no tuning", file=sys.stderr)
        return 1
    from dsmr_kernels.backends.triton.launch import architecture
    from dsmr_kernels.backends.triton.tuned import this_machine

    device = torch.device("cuda", torch.cuda.current_device())
    part = architecture(device)
    if part not in TARGETS:
        print(f"tune knows the limits of {', '.join(TARGETS)}, not of {part}: its table stays", file=sys.stderr)
        return 1
    use_tuned(None)  # neighbours are those of the table, whatever DSMR_TUNED says
    dims, dtypes = asked.dim or [64, 128], asked.dtype or ["bfloat16"]
    entries, measured = tune(part, dims, dtypes, asked.kernel or KERNELS, device)
    write(asked.out, this_machine(), part, entries, measured)
    for (kernel, dim, dtype), config in entries.items():
        print(f"{kernel}, head_dim {dim}, {dtype}: {_words(config)}")
    print(f"{len(entries)} configurations beat the table's; written to {asked.out}, used with DSMR_TUNED={asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
