"""Ours against concatenating, in turn within one run, so that a noisy machine disturbs both alike.

    python -m benchmarks.side_by_side                # the table, and benchmarks/results/cpu-attention.{json,md,png}
    python -m benchmarks.side_by_side --busy         # with another program on one core: cpu-attention-busy
    taskset -c 0,1 python -m benchmarks.side_by_side # on two cores of many

Every shape is checked against the float64 oracle before it is timed. Reported are medians over rounds, and the median
of the rounds' ratios; short calls, of which one that was held up says little, take more rounds than are asked for. The
memory that a call frees is kept for the next, as in training: else two megabytes that concatenating asks for take 0.04
or 0.6 ms, by what ran before.
"""

import argparse
import contextlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts.busy import SPINNING, spinning
from benchmarks.parts.contenders import Shape, check, forward, forward_backward, matmul_rate, ours
from benchmarks.parts.machine import cores, describe
from benchmarks.parts.peers import MaskedSDPA
from dsmr.console.files import atomic_path, write_json, write_text
from dsmr.console.heap import keep_freed_memory
from dsmr_kernels.costing.timing import in_turn

CLAIM = Shape(1, 8, 8, 1024, 4096, 64)
GRID = [
    CLAIM,
    Shape(1, 8, 8, 1024, 1024, 64),
    Shape(2, 8, 8, 512, 2048, 64),
    Shape(8, 8, 8, 512, 1024, 64),
    Shape(1, 8, 2, 1024, 4096, 64),
    Shape(1, 16, 16, 512, 1024, 128),
    Shape(2, 4, 4, 256, 1024, 32),
    Shape(4, 8, 8, 256, 512, 64),
    Shape(1, 8, 8, 256, 256, 64),
    Shape(8, 8, 8, 128, 512, 64),
    Shape(1, 8, 8, 128, 2048, 64),
    Shape(1, 8, 8, 2048, 512, 64),
]
PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
DTYPES = (torch.float32, torch.bfloat16)
SECONDS, MOST_ROUNDS = 0.5, 99  # rounds are added until a row's pass has taken so long


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def enough(calls: list[Callable[[], Any]], rounds: int) -> int:
    """How many rounds to take, `rounds` at least."""
    took = sum(max(seconds[0], 1e-6) for seconds in in_turn(calls, 1))
    return max(rounds, min(MOST_ROUNDS, int(SECONDS / took)))


def measure(shape: Shape, dtype: torch.dtype, rounds: int, busy: bool = False) -> dict[str, Any]:
    """One row of the table, correctness first; beside the machine's own product, unless it is `busy`, since the product
    would then be another moment's."""
    case = shape.case(dtype)
    concatenated = MaskedSDPA(case)
    check(case, "dsmr", ours)
    check(case, "sdpa", concatenated)
    row: dict[str, Any] = {"shape": asdict(shape), "label": str(shape), "dtype": name_of(dtype)}
    for key, kind in zip(PASSES, (forward, forward_backward), strict=True):
        calls = [kind(ours, case), kind(concatenated, case)]
        mine, theirs = in_turn(calls, enough(calls, rounds))
        row[key] = {
            "rounds": len(mine),
            "dsmr_ms": 1e3 * statistics.median(mine),
            "sdpa_ms": 1e3 * statistics.median(theirs),
            "speedup": statistics.median(b / a for a, b in zip(mine, theirs, strict=True)),
        }
        if key == "forward" and not busy:
            rate = shape.forward_flops / statistics.median(mine)
            (product,) = in_turn([matmul_rate(dtype, 1024)], rounds)
            row[key]["gflops"] = rate / 1e9
            row[key]["share_of_matmul"] = rate * statistics.median(product) / (2 * 1024**3)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    shares = all("share_of_matmul" in row["forward"] for row in rows)
    columns = ["shape", "dtype", "forward, ms", "concatenated", "speed-up", *["of the matrix product"] * shares]
    columns += ["forward + backward, ms", "concatenated", "speed-up"]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'--:|' * (len(columns) - 2)}"]
    for row in rows:
        f, b = row["forward"], row["forward_backward"]
        share = f"| {100 * f['share_of_matmul']:.0f} % " if shares else ""
        lines.append(
            f"| {row['label']} | {row['dtype']} | {f['dsmr_ms']:.1f} | {f['sdpa_ms']:.1f} | {f['speedup']:.2f} × "
            f"{share}| {b['dsmr_ms']:.1f} | {b['sdpa_ms']:.1f} | {b['speedup']:.2f} × |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], where: str, path: Path) -> None:
    """Bars of the speed-ups, measured `where`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 0.42 * len(rows) + 1.6), sharey=True, layout="constrained")
    labels = [f"{row['label']}, {row['dtype']}" for row in rows]
    figure.suptitle(where, fontsize=10)
    for axis, (key, title) in zip(axes, PASSES.items(), strict=True):
        values = [row[key]["speedup"] for row in rows]
        colours = ["#2a6f97" if row["dtype"] == "float32" else "#e07a5f" for row in rows]
        axis.barh(labels, values, color=colours)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{title}: times faster than concatenating", fontsize=10)
        for position, value in enumerate(values):
            axis.text(value, position, f" {value:.2f}", va="center", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def summary(rows: list[dict[str, Any]]) -> str:
    """The medians of the speed-ups, and where it is slower."""
    said = []
    for key, name in PASSES.items():
        values = [row[key]["speedup"] for row in rows]
        said.append(f"{name}: median {statistics.median(values):.2f} x, least {min(values):.2f} x")
    slower = [
        f"{row['label']}, {row['dtype']}, {name}"
        for row in rows
        for key, name in PASSES.items()
        if row[key]["speedup"] < 1
    ]
    return f"{'; '.join(said)}. Slower than concatenating: {'; '.join(slower) if slower else 'nowhere'}."


def main() -> None:
    """Measure the grid, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="least timed rounds of each shape")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="N", help="which of the grid, by number, from 0")
    parser.add_argument("--busy", action="store_true", help="with another program on one core")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(cores())  # PyTorch may count cores that the process is not given
    keep_freed_memory()
    shapes = [GRID[number] for number in arguments.shapes or range(len(GRID))]
    work, rows = [(shape, dtype) for shape in shapes for dtype in DTYPES], []
    machine = describe(torch.device("cpu"))
    with spinning() if arguments.busy else contextlib.nullcontext():
        for done, (shape, dtype) in enumerate(work, 1):
            rows.append(measure(shape, dtype, arguments.rounds, arguments.busy))
            print(f"{done} of {len(work)}: {shape}, {name_of(dtype)}", file=sys.stderr, flush=True)
    said, markdown = summary(rows), table(rows)
    print(f"{markdown}\n\n{said}")
    stem = "cpu-attention-busy" if arguments.busy else "cpu-attention"
    results = {"machine": machine, "rounds": arguments.rounds, "busy": arguments.busy, "rows": rows}
    write_json(arguments.out / f"{stem}.json", results)
    command = f"python -m benchmarks.side_by_side{' --busy' * arguments.busy} --rounds {arguments.rounds}"
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    beside = f", with {SPINNING}" if arguments.busy else ""
    write_text(arguments.out / f"{stem}.md", f"Measured by `{command}` on: {about}{beside}.\n\n{markdown}\n\n{said}\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    where = f"{machine['instruction set']}, {machine['threads']} threads{beside}"
    draw(rows, where, arguments.out / f"{stem}.png")


if __name__ == "__main__":
    main()
