"""A training step of a model of 25 million parameters, ours beside x-transformers' XL memory: tokens/s and peak memory.

    python -m benchmarks.training_step      # the table, and benchmarks/results/cpu-training-step.{json,md,png}
    taskset -c 0,1 python -m benchmarks.training_step --contenders "ours, full" "ours, full, checkpointed"

Models that `torch.compile` has been through take part where it finds a compiler, those with `--checkpoint-layers` where
they are named, and so do those whose step is a CUDA graph (`--graph`; on a GPU: "ours, full, replayed").

Every contender lives in a process of its own, so that peak resident memory is its own, and the processes take turns of
one step, so that a noisy machine disturbs all alike: ratios are medians over the turns' ratios. Before its first turn a
process checks its contender: number of parameters, finite and falling loss, and ours against the reference backend in
float64 on a small cut of the same model.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.parts.models import CONTENDERS, VARIANTS, Ours, ReferenceStep, Sizes, Training, check_learning
from benchmarks.parts.peers import Missing
from benchmarks.parts.rows import about
from dsmr.console.devices import resolve_device
from dsmr.console.errors import UserError
from dsmr.console.files import write_json, write_text
from dsmr.console.heap import keep_freed_memory
from dsmr.console.progress import ProgressLine
from dsmr.console.terminal import out_of_memory
from dsmr.corpus.pool import cores
from dsmr.profiling.row import Peak, resident_bytes
from dsmr_kernels.costing.cost import human_bytes
from dsmr_kernels.costing.timing import synchronize

SIZES = Sizes(8, 512, 8, 512, 2048, 2)
CHECKED = Sizes(4, 128, 2, 32, 96, 2, vocabulary=64)
XL = "x-transformers, XL memory"
XL_COMPILED = f"{XL}, compiled"
ALL = CONTENDERS | VARIANTS
USUAL = [name for name in ALL if not name.endswith(("checkpointed", "replayed"))]
DTYPES = ("bfloat16", "float32")
SPEED, MEMORY = "tokens/s", "peak memory beyond Python and packages"
GOALS = (  # contender, dtype, figure, whether at least or at most, bound
    ("ours, two_scale", "bfloat16", SPEED, True, 3.0),
    ("ours, full", "bfloat16", SPEED, True, 2.3),
    ("ours, two_scale", "float32", SPEED, True, 2.0),
    ("ours, full", "float32", SPEED, True, 1.7),
    *((f"ours, {schedule}", dtype, MEMORY, False, 0.6) for dtype in DTYPES for schedule in ("two_scale", "full")),
)
Row = dict[str, Any]


# --- The process of one contender ---------------------------------------------------------------------------------


def work(task: dict[str, Any]) -> Iterator[Row]:
    """First what is known after the checks, then the seconds of a step for each line on standard input."""
    sizes = Sizes(**{**task["sizes"], "dtype": getattr(torch, task["dtype"])})
    if sizes.on == "cpu":
        torch.set_num_threads(task["threads"])
        keep_freed_memory()  # as `dsmr train` does; for every contender alike
    make, name = ALL[task["contender"]], task["contender"]
    small = replace(CHECKED, dtype=sizes.dtype, on=sizes.on)
    cut = Training(small, make)  # also imports all that is needed, before memory is counted
    if name.startswith("ours"):
        ReferenceStep(small, name.split(", ")[1]).hold(name, cut)
    peak = Peak(sizes.device)
    with peak:
        training = Training(sizes, make)
        check_learning(name, training, sum(p.numel() for p in Ours(sizes, "full").model.parameters()))
        whole = resident_bytes("VmHWM")
    yield {"parameters": training.parameters, "peak_bytes": whole, "own_peak_bytes": peak.bytes}
    for _ in sys.stdin:
        synchronize(sizes.device)
        begin = time.perf_counter()
        training()
        synchronize(sizes.device)
        yield {"seconds": time.perf_counter() - begin}


def worker() -> int:
    """The task is the first line of standard input; each answer is a line on standard output."""
    task = json.loads(sys.stdin.readline())
    try:
        for said in work(task):
            print(json.dumps(said), flush=True)
    except Missing as missing:
        print(json.dumps({"skipped": str(missing)}), flush=True)
    except (RuntimeError, MemoryError, AssertionError, ValueError) as error:
        reason = "out of memory" if isinstance(error, MemoryError) or out_of_memory(error) else str(error)
        print(json.dumps({"failed": (reason.splitlines() or [type(error).__name__])[0]}), flush=True)
    return 0


# --- The one who asks ---------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A process, and what it has said."""

    name: str
    dtype: str
    process: "subprocess.Popen[str]"
    row: Row = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return "skipped" not in self.row and "failed" not in self.row

    def hear(self) -> Row:
        """The next line; a process that ends without one has failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said: Row = json.loads(line) if line else {"failed": f"its process ended with code {self.process.wait()}"}
        if "seconds" not in said:
            self.row.update(said)
        return said

    def step(self) -> None:
        """One turn."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # a process that has gone is heard as such
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        said = self.hear()
        if "seconds" in said:
            self.seconds.append(said["seconds"])


def measure(
    sizes: Sizes, dtype: str, names: list[str], turns: int, threads: int, line: ProgressLine
) -> Iterator[list[Contender]]:
    """Start every contender, one after another, and let them take turns; all of them after each turn."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--worker"]
    plain = {name: getattr(sizes, name) for name in Sizes.__dataclass_fields__ if name != "dtype"}
    with contextlib.ExitStack() as stack:
        contenders: list[Contender] = []
        for name in names:
            line.update(f"checking {name}, {dtype}")
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            one = Contender(name, dtype, process)
            contenders.append(one)
            task = {"contender": name, "dtype": dtype, "sizes": plain, "threads": threads}
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            one.hear()
        for turn in range(turns):
            for one in contenders:
                if one.alive:
                    line.update(f"turn {turn + 1} of {turns}: {one.name}, {one.dtype}")
                    one.step()
            yield contenders


def _beside(one: Contender, name: str, contenders: list[Contender]) -> Contender | None:
    """The contender `name` in the same dtype, if it has taken as many turns."""
    found = next((other for other in contenders if (other.name, other.dtype) == (name, one.dtype)), None)
    return found if found is not None and found.alive and len(found.seconds) == len(one.seconds) else None


def _times_as_fast(one: Contender, other: Contender) -> float:
    """The median over the turns."""
    return statistics.median(theirs / mine for theirs, mine in zip(other.seconds, one.seconds, strict=True))


def rows_of(contenders: list[Contender], sizes: Sizes) -> list[Row]:
    """A row for each contender: tokens/s, and both figures against x-transformers in the same dtype."""
    rows = []
    for one in contenders:
        row: Row = {"contender": one.name, "dtype": one.dtype, **one.row}
        rows.append(row)
        if not (one.alive and one.seconds):
            continue
        row["seconds"] = one.seconds
        row["tokens_per_s"] = sizes.tokens / statistics.median(one.seconds)
        if (compiled := _beside(one, XL_COMPILED, contenders)) is not None:
            row["times_as_fast_as_compiled"] = _times_as_fast(one, compiled)
        if (other := _beside(one, XL, contenders)) is not None:
            row["times_as_fast"] = _times_as_fast(one, other)
            row["share_of_peak"] = one.row["peak_bytes"] / other.row["peak_bytes"]
            row["share_of_own_peak"] = one.row["own_peak_bytes"] / other.row["own_peak_bytes"]
    return rows


def goals_of(rows: list[Row]) -> list[Row]:
    """Each goal with what was measured; "met" is None where it was not."""
    found = []
    for contender, dtype, figure, least, bound in GOALS:
        row = next((row for row in rows if (row["contender"], row["dtype"]) == (contender, dtype)), {})
        value = row.get("times_as_fast" if figure == SPEED else "share_of_own_peak")
        met = None if value is None else (value >= bound if least else value <= bound)
        wanted = f"{'≥' if least else '≤'} {bound:g} × the {figure} of {XL}"
        found.append({"goal": f"{contender}, {dtype}", "wanted": wanted, "measured": value, "met": met})
    return found


# --- Output -------------------------------------------------------------------------------------------------------


def text_of(rows: list[Row], goals: list[Row], sizes: Sizes, turns: int) -> str:
    """Both tables as Markdown."""
    machine = ", ".join(f"{name} {said}" for name, said in about().items())
    lines = [
        f"A training step (forward, backward, clipping, AdamW) of {sizes}, vocabulary {sizes.vocabulary}. Measured by "
        f"`python -m benchmarks.training_step` in {turns} turns on: {machine}. Peak memory is the resident size of the "
        "whole process, and in brackets what lies beyond Python and the imported packages; a goal for it is held "
        "against the latter.",
        "",
        f"| contender | dtype | parameters | tokens/s | times as fast as {XL} | as the same, compiled | peak memory | "
        "of the first's |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        start = f"| {row['contender']} | {row['dtype']} |"
        if "tokens_per_s" not in row:
            said = next((f"{how}: {row[how]}" for how in ("skipped", "failed") if how in row), "no turn was timed")
            lines.append(f"{start} {said} | | | | | |")
            continue
        speed = f"{row['times_as_fast']:.2f} ×" if "times_as_fast" in row else ""
        compiled = f"{row['times_as_fast_as_compiled']:.2f} ×" if "times_as_fast_as_compiled" in row else ""
        share = f"{row['share_of_peak']:.2f} × ({row['share_of_own_peak']:.2f} ×)" if "share_of_peak" in row else ""
        peak = f"{human_bytes(row['peak_bytes'])} ({human_bytes(row['own_peak_bytes'])})"
        lines.append(
            f"{start} {row['parameters'] / 1e6:.2f} M | {row['tokens_per_s']:,.0f} | {speed} | {compiled} | {peak} | "
            f"{share} |"
        )
    lines += ["", "| goal | wanted | measured | met |", "|---|---|--:|---|"]
    for goal in goals:
        measured = "not measured" if goal["measured"] is None else f"{goal['measured']:.2f} ×"
        met = {None: "", True: "yes", False: "no"}[goal["met"]]
        lines.append(f"| {goal['goal']} | {goal['wanted']} | {measured} | {met} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Tokens a second and peak memory, side by side."""
    from dsmr.console.figures import new_figure, save

    shown = [row for row in rows if "tokens_per_s" in row]
    figure, axes = new_figure(1, 2, size=(11, 0.4 * len(shown) + 1.2), sharey=True)
    places = range(len(shown))
    colours = ["#2a6f97" if row["contender"].startswith("ours,") else "#e07a5f" for row in shown]
    for axis, title, values in (
        (axes[0], "tokens a second", [row["tokens_per_s"] for row in shown]),
        (axes[1], "peak resident memory, MiB", [row["peak_bytes"] / 2**20 for row in shown]),
    ):
        axis.barh(places, values, color=colours)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        for place, value in zip(places, values, strict=True):
            axis.text(value, place, f" {value:,.0f}", va="center", fontsize=8)
    axes[0].set_yticks(places, [f"{row['contender']}, {row['dtype']}" for row in shown], fontsize=8)
    axes[0].invert_yaxis()
    save(figure, path)


def write(contenders: list[Contender], sizes: Sizes, turns: int, folder: Path) -> str:
    """Write what is known as JSON, Markdown and PNG; the Markdown."""
    rows, stem = rows_of(contenders, sizes), f"{sizes.device.type}-training-step"
    goals = goals_of(rows)
    text = text_of(rows, goals, sizes, turns)
    write_json(folder / f"{stem}.json", {"machine": about(), "sizes": str(sizes), "rows": rows, "goals": goals})
    write_text(folder / f"{stem}.md", text)
    draw(rows, folder / f"{stem}.png")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 with a sentence for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of every contender")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="precisions")
    parser.add_argument("--contenders", nargs="+", default=USUAL, choices=list(ALL), metavar="NAME")
    parser.add_argument("--threads", type=int, default=min(torch.get_num_threads(), cores()), help="of a contender")
    for name, said in (("layers", "layers"), ("width", "width"), ("segment", "tokens"), ("memory", "tokens")):
        parser.add_argument(f"--{name}", type=int, default=getattr(SIZES, name), help=f"{said} of the model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args(arguments)
    if options.worker:
        return worker()
    try:
        device = resolve_device(options.device)
        sizes = replace(SIZES, on=str(device), **{n: getattr(options, n) for n in ("layers", "width")})
        sizes = replace(sizes, **{name: getattr(options, name) for name in ("segment", "memory")})
        if min(options.turns, options.threads, sizes.layers, sizes.width, sizes.segment, sizes.memory) < 1:
            raise UserError("turns, threads, layers, width, segment and memory must be at least 1")
        if sizes.width % sizes.heads:
            raise UserError(f"width must be a multiple of the {sizes.heads} heads, got {sizes.width}")
        text, done, now = "", list[Contender](), list[Contender]()
        for dtype in options.dtypes:
            with ProgressLine() as line:
                for now in measure(sizes, dtype, options.contenders, options.turns, options.threads, line):
                    text = write(done + now, sizes, options.turns, options.out)  # outlives an interruption
            done += now
        Console().print(text, soft_wrap=True, highlight=False, markup=False)
    except UserError as error:
        print(f"benchmarks.training_step: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
