"""`dsmr profile`: what memory schedules cost on this device, predicted and measured, layer by layer.

Every row (a schedule and a kind of work) is measured by `dsmr.profiling.row` in a process of its own. A row that fails
or does not fit is reported as such, and the others go on; what is known is written after each schedule, whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsmr.console.files import write_json
from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.budget import Proposal
from dsmr.profiling.cost import Predicted, held_bytes, least_bytes, predict_piece, predict_step, predict_token
from dsmr.profiling.job import KINDS, Job, Sizes
from dsmr_kernels.costing.cost import human_bytes
from dsmr_kernels.costing.load import BUSY_SPREAD, cores, in_words, is_busy, load_average, load_of_others
from dsmr_kernels.costing.predict import Ceilings

Row = dict[str, Any]
"""A measured row as `dsmr.profiling.row` gives it, with "predicted" beside it; or no more than "error"."""

LENGTHS = tuple(1024 * 2**i for i in range(7))  # of pieces, for the curves: 1k to 64k tokens


@dataclass
class Profile:
    """All that is known; `rows` by schedule and then by kind of work."""

    sizes: Sizes
    ceilings: Ceilings
    rows: dict[str, dict[str, Row]] = field(default_factory=dict)
    proposals: list[Proposal] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    load_before: float | None = field(default_factory=load_average)
    load_after: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return {
            "device": self.ceilings.device,
            "torch": torch.__version__,
            "sizes": asdict(self.sizes),
            "ceilings": self.ceilings.to_json(),
            "machine": {"cores": cores(), "load_before": self.load_before, "load_after": self.load_after},
            "warnings": self.warnings,
            "schedules": [{"schedule": name, "rows": rows} for name, rows in self.rows.items()],
            "proposals": [asdict(proposal) for proposal in self.proposals],
            "seconds_by_piece_length": self.curves,
        }

    @property
    def warnings(self) -> list[str]:
        """A sentence for each sign that others used the machine meanwhile."""
        said = []
        ours = self.sizes.threads if self.sizes.device == "cpu" else 1
        others = load_of_others(self.load_before, self.load_after, ours if self.rows else 0)
        if others is not None and is_busy(others, cores()):
            said.append(
                f"the machine was busy, with {in_words(others, cores())} besides this program: times are longer"
            )
        wide = [
            f"{name}, {what} {100 * spread:.0f} %"
            for name, rows in self.rows.items()
            for what, spread in _spreads(rows)
            if spread > BUSY_SPREAD
        ]
        if wide:
            more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
            said.append(
                f"rounds that should take the same lie more than {100 * BUSY_SPREAD:.0f} % apart: "
                f"{'; '.join(wide[:3])}{more}"
            )
        if self.ceilings.disturbed:
            said.append(
                f"the ceilings behind the predictions were measured under load ({self.ceilings.disturbed}): "
                "predictions may be too slow"
            )
        return said

    @property
    def failures(self) -> list[str]:
        """A sentence for each row that could not be measured."""
        return [
            f"{name}, {kind}: {row['error']}"
            for name, rows in self.rows.items()
            for kind, row in rows.items()
            if "error" in row
        ]


def _spreads(rows: dict[str, Row]) -> Iterator[tuple[str, float]]:
    """What was timed of a schedule, in words, and how far its rounds lie apart."""
    for kind, row in rows.items():
        if "timings" in row:
            yield {"train": "a training step", "piece": "a whole piece"}[kind], row["timings"]["all"]["spread"]
        for entry in row.get("positions", ()):
            yield f"playing after {entry['position']:,} tokens", entry["timing"]["spread"]


def profile(
    schedules: Sequence[MemorySchedule],
    sizes: Sizes,
    ceilings: Ceilings,
    *,
    kinds: Sequence[str] = KINDS,
    json_path: Path | None = None,
    trace: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Measure every schedule in every kind of work.

    Args:
        json_path: written after each schedule, so that what was measured outlives an interruption.
        trace: for a Chrome trace of the first row that is not decoding.
        progress: told what is being measured, and for how long it will go on.
    """
    for schedule in schedules:
        sizes.config(schedule)  # sizes that do not go together are refused before any work
    found = Profile(sizes, ceilings)
    jobs = [(schedule, kind) for schedule in schedules for kind in kinds]
    traced = next((job for job in jobs if job[1] != "decode"), None)
    begun = time.monotonic()
    for number, (schedule, kind) in enumerate(jobs):
        left = (time.monotonic() - begun) / number * (len(jobs) - number) if number else None
        progress(
            f"row {number + 1} of {len(jobs)}: {schedule}, {kind}"
            + ("" if left is None else f"; about {left:.0f} s to go")
        )
        path = str(trace) if trace is not None and (schedule, kind) == traced else None
        job = Job(str(schedule), kind, sizes, path)
        row = measured_row(job)
        if "error" not in row:
            row["predicted"] = predicted_row(sizes, schedule, kind, ceilings)
        found.rows.setdefault(str(schedule), {})[kind] = row
        found.load_after = load_average()
        if json_path is not None and kind == kinds[-1]:
            write_json(json_path, found.to_json(), sealed=True)
    found.curves = length_curves(schedules, sizes, ceilings)
    return found


# --- One row ------------------------------------------------------------------------------------------------------


def free_bytes(device: str) -> int | None:
    """Memory that is free on `device`, in bytes; None where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def measured_row(job: Job) -> Row:
    """The row from a process of its own, or {"error": why there is none}."""
    least, free = least_bytes(job.sizes, MemorySchedule.parse(job.schedule), job.kind), free_bytes(job.sizes.device)
    if free is not None and least > free:
        return {"error": f"out of memory: it needs at least {human_bytes(least)}, and {human_bytes(free)} are free"}
    here = str(Path(__file__).resolve().parent.parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        [sys.executable, "-m", "dsmr.profiling.row"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    ) as process:
        try:
            out, said = process.communicate(json.dumps(job.to_json()))
        except BaseException:  # Ctrl-C above all: leave no process behind
            process.kill()
            raise
    if process.returncode in (-9, 137):
        return {"error": "out of memory: the system ended its process"}
    if process.returncode:
        lines = said.strip().splitlines()
        return {"error": f"its process ended with code {process.returncode}" + (f": {lines[-1]}" if lines else "")}
    return json.loads(out)


def predicted_row(sizes: Sizes, schedule: MemorySchedule, kind: str, ceilings: Ceilings) -> dict[str, Any]:
    """What should stand beside a measured row."""
    held = held_bytes(sizes, schedule, kind)
    if kind == "decode":
        tokens = [predict_token(sizes, schedule, position, ceilings) for position in sizes.positions]
        return {
            "kv_bytes": held,
            "positions": [
                {"position": position, "seconds": seconds, "attention_seconds": attention}
                for position, (seconds, attention) in zip(sizes.positions, tokens, strict=True)
            ],
        }
    predicted = predict_step(sizes, schedule, kind, ceilings)
    seconds = {name: predicted.seconds(name) for name in ("forward", "backward", "step")}
    return {
        "kv_bytes": held,
        "seconds": {**seconds, "all": sum(seconds.values())},
        "attention_share": predicted.attention / sum(seconds.values()),
        "parts": _parts(predicted),
    }


def _parts(predicted: Predicted) -> list[dict[str, Any]]:
    """In the form of the measured ones."""
    layers = [
        {"direction": direction, "layer": number, "part": part, "seconds": seconds}
        for number, layer in enumerate(predicted.layers)
        for direction in ("forward", "backward")
        for part, seconds in getattr(layer, direction).items()
    ]
    around = [
        {"direction": direction, "layer": -1, "part": part, "seconds": seconds}
        for direction, parts in predicted.around.items()
        for part, seconds in parts.items()
    ]
    return layers + around


def attention_share(row: Row) -> float:
    """Of a measured step's time."""
    attention = sum(part["seconds"] for part in row["parts"] if part["part"] == "attention")
    return attention / sum(part["seconds"] for part in row["parts"])


def tokens_per_second(row: Row) -> float:
    """Of a measured training step or whole piece, by the median step."""
    return row["tokens"] / row["timings"]["all"]["median"]


# --- Curves -------------------------------------------------------------------------------------------------------


def length_curves(
    schedules: Sequence[MemorySchedule], sizes: Sizes, ceilings: Ceilings, lengths: Sequence[int] = LENGTHS
) -> dict[str, list[tuple[int, float]]]:
    """Predicted seconds of one pass forward and back through a piece, by its length, for four ways to remember.

    The two-scale schedule is the first that was asked for, or else one made of the first schedule's horizons; the
    sliding window has its budget, spread evenly.
    """
    first = schedules[0]
    layers, long = first.layers, max(max(first.horizons), 1)
    two = next((s for s in schedules if str(s).startswith("two_scale")), None)
    if two is None:
        two = MemorySchedule.two_scale(layers, long, max(long // 8, 1), max(layers // 4, 1))
    window = MemorySchedule.uniform(two.layers, sum(two.horizons) // two.layers)
    sliding = Sizes(**{**asdict(sizes), "visibility": "sliding"})
    curves: dict[str, list[tuple[int, float]]] = {}
    for length in lengths:
        for name, schedule, shape in (
            ("full", MemorySchedule.full(two.layers, length), sizes),
            (str(two), two, sizes),
            (f"sliding, {window.horizons[0]:,} tokens", window, sliding),
            ("none", MemorySchedule.none(two.layers), sizes),
        ):
            curves.setdefault(name, []).append((length, predict_piece(shape, schedule, length, ceilings)))
    return curves
