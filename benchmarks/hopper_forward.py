"""How fast are the forwards with tensor descriptors on a Hopper GPU, beside the kernel that serves today?

    python -m benchmarks.hopper_forward --json hopper.json            # at most two minutes
    python -m benchmarks.hopper_forward --dry --json hopper.json      # what of it runs without a GPU

Every candidate of `bulk.CANDIDATES` is first checked in a process of its own, several at once: against the float64
oracle on small odd shapes, with rows that nobody may see full of NaN, and against today's kernel on the large ones,
three times over with equal bits. Those that pass are then timed in turn with today's kernel in one process, as CUDA
graphs, so that nothing but the GPU's own work counts; if that process dies, each in one of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.contenders import Shape

ROOT = Path(__file__).resolve().parents[1]
TODAY = "today's"
LARGE = [Shape(8, 16, 16, 1024, 8192, 64), Shape(8, 16, 16, 1024, 8192, 128)]
SMALL = [Shape(1, 8, 8, 1024, 8192, 64), Shape(1, 8, 8, 1024, 8192, 128)]
DRY = [Shape(1, 2, 1, 20, 40, 64)]
CHECK_SECONDS = 70.0  # of one candidate, compilation included
SIDE_BY_SIDE = 12  # candidates checked at once
ROUNDS = 15  # of all candidates in turn
Row = dict[str, Any]


def _call(case: Any, candidate: str) -> tuple[Tensor, Tensor]:
    """out and lse of one forward by a candidate or by today's kernel."""
    from dsmr_kernels.backends.triton import bulk, training
    from dsmr_kernels.spec import AttentionSpec, Inputs

    options: dict[str, Any] = {"segment_length": None, "segment_offset": 0, "visibility": "segment"}
    options |= {"detach_segments": True, "scale": case.q.shape[3] ** -0.5} | case.options
    spec = AttentionSpec(**options, return_lse=True)
    inputs = Inputs(case.q, case.k, case.v, case.memory, None, None, None, None, None, spec)
    if candidate == TODAY:
        assert bulk.tile_for(inputs) is None
        return training.forward(inputs)
    if reason := bulk.unsupported(inputs):
        raise ValueError(reason)
    with bulk.trying(bulk.CANDIDATES[candidate]):
        return training.forward(inputs)


def _odd_cases(head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Memories that are wrapped, part full, nearly empty and empty, of odd sizes; what they do not hold is NaN."""
    from dsmr_kernels.cases import random_case

    common: dict[str, Any] = {"head_dim": head_dim, "dtype": dtype}
    cases = [
        random_case(queries=150, capacity=1024, seen=[1500, 70], horizon=250, segment_length=64, **common),
        random_case(batch=3, queries=301, capacity=700, seen=[700, 1100, 5], horizon=700, **common),
        random_case(queries=77, capacity=333, seen=[400, 0], horizon=20, segment_length=50, segment_offset=9, **common),
        random_case(queries=130, horizon=64, segment_length=32, **common),
    ]
    if device.type == "cpu":
        cases = [random_case(queries=40, capacity=100, seen=[130, 7], horizon=45, segment_length=30, **common)]
    for case in cases:
        if case.memory is not None:
            held = torch.zeros(case.memory.k.shape[0], case.memory.capacity, dtype=torch.bool)
            for row, (length, position) in enumerate(zip(case.memory.length, case.memory.position, strict=True)):
                held[row, (position - 1 - torch.arange(int(length))) % case.memory.capacity] = True
            for x in (case.memory.k, case.memory.v):
                x.masked_fill_(~held[:, None, :, None], torch.nan)
    return [case.to(device=device) for case in cases]


def _against_the_oracle(case: Any, found: tuple[Tensor, Tensor], name: str) -> float:
    """The largest share of the error that the tolerance rule allows. Raises where it is more than that."""
    from dsmr_kernels.backends import reference
    from dsmr_kernels.tolerance import allowed_error, error

    def wanted(one: Any, **how: Any) -> dict[str, Tensor]:
        return one.computed_by(reference.memory_attention, **how)

    exact, plain = wanted(case.to(torch.float64)), wanted(case, work=case.q.dtype)
    share = 0.0
    for what, x in zip(("out", "lse"), found, strict=True):
        allowed = allowed_error(what, plain[what], exact[what], case.q.dtype)
        wrong = error(x, exact[what])
        if not wrong <= allowed:
            raise AssertionError(f"{name}: {what} errs by {wrong:.3g} where {allowed:.3g} is allowed")
        share = max(share, wrong / allowed)
    return share


def check(candidate: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Row:
    """One candidate's correctness at a head_dim: odd shapes against the oracle, a large one against today's kernel."""
    share = 0.0
    for number, case in enumerate(_odd_cases(shape.head_dim, dtype, device)):
        share = max(share, _against_the_oracle(case, _call(case, candidate), f"odd case {number}"))
    case = shape.case(dtype, device=device)
    today = _call(case, TODAY)
    found = [_call(case, candidate) for _ in range(3)]
    for again in found[1:]:
        if not all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True)):
            raise AssertionError("the same call gave other bits")
    apart = [float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(found[0], today, strict=True)]
    if not max(apart) < 1e-2:
        raise AssertionError(f"{shape}: out and lse are {apart[0]:.3g} and {apart[1]:.3g} from today's kernel")
    return {"candidate": candidate, "head_dim": shape.head_dim, "share": share, "apart": max(apart)}


def _replay(case: Any, candidate: str, device: torch.device) -> Callable[[], Any]:
    """A call as a CUDA graph; on a CPU, as it is."""
    if device.type == "cpu":
        return lambda: _call(case, candidate)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _call(case, candidate)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _call(case, candidate)
    return graph.replay


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    if device.type == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    for _ in range(repeats):
        call()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3 / repeats


def time_in_turn(candidates: list[str], shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """Medians of rounds in which all candidates and, twice, today's kernel take turns."""
    case = shape.case(dtype, device=device)
    calls = {name: _replay(case, name, device) for name in (TODAY, *candidates)}
    order = [TODAY, *candidates, TODAY]
    repeats = max(1, min(50, int(1e-2 / _seconds(calls[TODAY], device, 1)))) if device.type == "cuda" else 1
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        for name in order:
            found[name].append(_seconds(calls[name], device, repeats))
    rows = []
    for name, seconds in found.items():
        median = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / median
        row = {"candidate": name, "shape": str(shape), "ms": 1e3 * median, "spread": spread}
        rows.append(row | {"tflops": shape.forward_flops / median / 1e12})
    return rows


def _worker(task: Row, device: torch.device) -> None:
    """A task in this process; a line of JSON for each row."""
    shapes = [Shape(**shape) for shape in task["shapes"]]
    for shape in shapes:
        dtype = getattr(torch, task["dtype"])
        try:
            if task["kind"] == "check":
                rows = [check(task["candidates"][0], shape, dtype, device)]
            else:
                rows = time_in_turn(task["candidates"], shape, dtype, device)
        except Exception as error:  # the other head_dim may do; what breaks the device ends the process
            said = str(error).strip().split("\n")
            failed = f"{type(error).__name__}: {said[0] or said[-1]}"[:400]
            rows = [{"candidate": ", ".join(task["candidates"]), "head_dim": shape.head_dim, "failed": failed}]
            rows[0]["trace"] = traceback.format_exc()[-3000:]
        for row in rows:
            print(json.dumps(row), flush=True)


def _run(task: Row, limit: float, dry: bool) -> list[Row]:
    """A task in a process of its own, and what became of it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["TRITON_INTERPRET"] = "1" if dry else "0"
    command = [sys.executable, "-m", "benchmarks.hopper_forward", "--task", json.dumps(task)]
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=errors, env=environment, cwd=ROOT, timeout=max(limit, 1.0)
            ).returncode
            ended = f"the process ended with {code}"
        except subprocess.TimeoutExpired:
            code, ended = -1, f"took longer than {limit:.0f} s"
        output.seek(0)
        rows = [json.loads(line) for line in output if line.startswith("{")]
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()]
    if code:
        rows.append(
            {"candidate": ", ".join(task["candidates"]), "failed": f"{ended}: {last[-1] if last else ''}"[:400]}
        )
    return rows


def measure(candidates: list[str], dtype: str, seconds: float, dry: bool, save: Callable[[Row], None]) -> Row:
    """The whole comparison within so many seconds; `save` is given what there is whenever there is more."""
    from dsmr_kernels.backends.triton import bulk

    end = time.monotonic() + seconds
    shapes = {"check": DRY if dry else LARGE, "time": DRY if dry else LARGE + SMALL}

    def task(kind: str, names: list[str], of: list[Shape]) -> Row:
        return {"kind": kind, "candidates": names, "dtype": dtype, "shapes": [vars(x) for x in of]}

    report: Row = {"dtype": dtype, "checks": [], "times": []}
    limit = min(CHECK_SECONDS, seconds * 0.65)
    begin = time.monotonic()
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        until = begin + seconds * 0.65

        def checked(name: str) -> list[Row]:
            of = [shape for shape in shapes["check"] if shape.head_dim in bulk.CANDIDATES[name].head_dims]
            return _run(task("check", [name], of), min(limit, until - time.monotonic()), dry)

        for rows in pool.map(checked, candidates):
            report["checks"] += rows
            for row in rows:
                said = row.get("failed") or f"{row['share']:.2f} of the allowed error"
                print(f"checked {row['candidate']}, head_dim {row.get('head_dim', '?')}: {said}", flush=True)
            save(report)
    good = {
        dim: [x["candidate"] for x in report["checks"] if "failed" not in x and x["head_dim"] == dim]
        for dim in {shape.head_dim for shape in shapes["time"]}
    }
    for dim, names in sorted(good.items(), reverse=True):
        of = [shape for shape in shapes["time"] if shape.head_dim == dim]
        rows = _run(task("time", names, of), min(25.0 if not dry else 60.0, end - time.monotonic()), dry)
        if any("failed" in row for row in rows):  # one of them spoilt it for the others
            report["times"] += [row for row in rows if "failed" in row]
            rows = []
            for name in names:
                if time.monotonic() < end - 8:
                    rows += _run(task("time", [name], of), min(15.0, end - time.monotonic()), dry)
        report["times"] += rows
        save(report)
        _print(rows)
    report["seconds"] = time.monotonic() - begin
    return report


def _print(rows: list[Row]) -> None:
    for shape in dict.fromkeys(row["shape"] for row in rows if "shape" in row):
        print(f"\n{shape}\n{'':48}      ms  TFLOP/s  of today's speed  spread")
        ours = [row for row in rows if row.get("shape") == shape]
        today = statistics.median(row["ms"] for row in ours if row["candidate"] == TODAY)
        for row in sorted(ours, key=lambda row: row["ms"]):
            ratio = today / row["ms"]
            print(f"{row['candidate']:48} {row['ms']:7.3f} {row['tflops']:8.0f} {ratio:17.2f} {row['spread']:7.1%}")
    for row in rows:
        if "failed" in row:
            print(f"{row['candidate']}: {row['failed']}")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=115.0, help="for all of it (default: %(default)s)")
    parser.add_argument("--only", action="append", help="one candidate; may be given again (default: all)")
    parser.add_argument("--dry", action="store_true", help="tiny, in Triton's interpreter, Triton's own language alone")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.task:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        _worker(json.loads(given.task), torch.device("cpu" if interpreted else "cuda:0"))
        return 0
    if not given.dry and not torch.cuda.is_available():
        print("there is no GPU: --dry runs what needs none", file=sys.stderr)
        return 2
    import triton

    from dsmr_kernels.backends.triton import bulk

    names = given.only or list(bulk.CANDIDATES)
    if unknown := [name for name in names if name not in bulk.CANDIDATES]:
        print(f"--only must be of {', '.join(bulk.CANDIDATES)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    if given.dry:
        names = [name for name in names if not bulk.CANDIDATES[name].consumers]
    dtype = "float16" if given.dry else given.dtype  # the interpreter errs in bfloat16
    machine = {"torch": torch.__version__, "triton": triton.__version__, "device": "none"}
    if not given.dry:
        machine["device"] = torch.cuda.get_device_name()

    def save(report: Row) -> None:
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(report | machine, indent=1) + "\n")

    report = measure(names, dtype, given.seconds, given.dry, save)
    save(report)
    report |= machine
    print(f"\n{report['device']}, torch {report['torch']}, {report['seconds']:.0f} s", flush=True)
    failed = [row for row in report["checks"] + report["times"] if "failed" in row]
    return 1 if given.dry and failed else 0


if __name__ == "__main__":
    sys.exit(main())
