"""One command for a machine with a GPU: its tests, the compiler's report, the comparison, the goals.

    make gpu                                   # or: python -m benchmarks.gpu ; at most ten minutes, no network
    python -m benchmarks.gpu --dry --out DIR   # the same program with tiny shapes on a CPU, to see that it works
    python -m benchmarks.gpu --predict         # what an H100 should show: benchmarks/results/h100-predictions.{json,md}

Writes benchmarks/results/<gpu>.json and .md, anew after every row. Each step has a time limit; what fails, crashes,
runs out of memory or of time becomes a row with its reason, and the rest goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts import goals, gpu_report, predictions
from benchmarks.parts.contenders import Shape
from benchmarks.parts.machine import describe, slug
from benchmarks.parts.peers import PEERS
from dsmr.console.errors import UserError
from dsmr.console.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("tests", "aot", "goals", "piece", "grid")
LIMITS = {"tests": 180.0, "aot": 75.0}  # seconds of a step; the comparison may take what is left
ROW_LIMIT = 75.0  # seconds of a row without a word, compilation included
WORKER = (sys.executable, "-m", "benchmarks.parts.gpu_worker")
LOOK = 1.0  # seconds: between two looks at a process pass 0.05, and many of these only where this one stood still
TOTAL = 540.0


def environment() -> dict[str, str]:
    """For the processes of the steps: the kernels compiled, not interpreted, and this very copy of the project."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def run_step(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """Run one command within its limit; the row says how it ended and the last line that it said."""
    begin = time.monotonic()
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=max(limit, 1.0)
        )
        lines = (ended.stdout + ended.stderr).strip().splitlines()
        row = {"status": "ok" if ended.returncode == 0 else f"failed with {ended.returncode}"}
        row |= {"said": lines[-1] if lines else "", "output": "\n".join(lines[-60:])}
    except subprocess.TimeoutExpired:
        row = {"status": "failed", "said": f"took longer than {limit:.0f} s"}
    except OSError as error:
        row = {"status": "failed", "said": str(error)}
    return {"step": name, "seconds": time.monotonic() - begin, **row}


def tests_step(limit: float) -> dict[str, Any]:
    """The GPU tests; only files that have some are collected, since others may need what is not installed."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        return {"step": "tests", "status": "skipped", "seconds": 0.0, "said": "no test is marked gpu"}
    return run_step(
        "tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files], limit
    )


def aot_step(device: torch.device, limit: float, out: Path) -> dict[str, Any]:
    """What this part's compiler makes of the configurations of its goals; without a GPU, a single one."""
    command = [sys.executable, "-m", "dsmr_kernels.tools.aot", "--dtype", "bfloat16", "--dim", "64", "--dim", "128"]
    if device.type == "cuda":
        from dsmr_kernels.backends.triton.configs import family
        from dsmr_kernels.backends.triton.launch import architecture

        command += ["--target", family(architecture(device)), "--json", str(out)]
    else:
        command += ["--target", "sm_80", "--kernel", "forward", "--variant", "bare", "--json", str(out)]
    return run_step("aot", command, limit)


def tasks_of(step: str, device: torch.device, dtype: str, backend: str) -> list[dict[str, Any]]:
    """The rows that a step of the comparison measures: ours first, so that it is there whatever its peers do."""
    dry = device.type == "cpu"
    common = {"device": str(device), "dtype": dtype, "backend": backend}
    if step == "piece":
        shape, segments = (goals.DRY_PIECE, goals.DRY_SEGMENTS) if dry else (goals.PIECE, goals.SEGMENTS)
        label = goals.piece_label(shape, segments)
        return [_task("piece", shape, goals.OURS, common) | {"label": label, "segments": segments}]
    goal = len(goals.SHAPES) - len(goals.GRID)
    shapes = {"goals": goals.SHAPES[:goal], "grid": goals.GRID}[step]
    if dry:
        shapes = goals.DRY_SHAPES[:1] if step == "goals" else goals.DRY_SHAPES[1:]
    return [_task("attention", shape, name, common) for shape in shapes for name in (goals.OURS, *PEERS)]


def _task(kind: str, shape: Shape, contender: str, common: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "shape": asdict(shape), "label": str(shape), "contender": contender, **common}


def measure(
    tasks: list[dict[str, Any]],
    until: float,
    keep: Callable[[dict[str, Any]], None],
    row_limit: float = ROW_LIMIT,
    worker: Sequence[str] = WORKER,
) -> None:
    """Have the tasks measured by processes that may die; `keep` gets a row for every task, in order.

    Args:
        until: on the clock of `time.monotonic`; tasks not begun by then become rows that say so.
        row_limit: seconds after which a silent process is ended, and its task has failed.
        worker: the process: see `benchmarks.parts.gpu_worker`.
    """
    while tasks:
        if time.monotonic() >= until:
            for task in tasks:
                keep(_not_measured(task, "skipped", "the time of the run was over"))
            return
        with tempfile.TemporaryDirectory() as folder:
            done, reason = _process(tasks, Path(folder), until, keep, row_limit, worker)
        if done < len(tasks) and reason is not None:
            keep(_not_measured(tasks[done], "failed", reason))
            done += 1
        tasks = tasks[done:]


def _not_measured(task: dict[str, Any], status: str, reason: str) -> dict[str, Any]:
    row = {key: task[key] for key in ("kind", "shape", "label", "contender", "dtype")}
    return row | {"status": status, "reason": reason}


def _process(
    tasks: list[dict[str, Any]],
    folder: Path,
    until: float,
    keep: Callable[[dict[str, Any]], None],
    row_limit: float,
    worker: Sequence[str],
) -> tuple[int, str | None]:
    """One process for as many tasks as it survives: how many rows it gave, and why the next one failed, if it did."""
    given, rows, errors = folder / "tasks.json", folder / "rows.jsonl", folder / "errors"
    given.write_text(json.dumps(tasks))
    rows.touch()
    done, offset, silent, looked = 0, 0, 0.0, time.monotonic()
    with errors.open("w") as stderr:
        command = [*worker, str(given), str(rows)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=stderr, stderr=stderr)
        try:
            while True:
                ended = process.poll() is not None
                text = rows.read_text()
                for line in text[offset : text.rfind("\n") + 1].splitlines():
                    silent = 0.0
                    if "row" in (said := json.loads(line)):
                        keep(said["row"])
                        done += 1
                offset = text.rfind("\n") + 1
                if ended:
                    break
                since, looked = time.monotonic() - looked, time.monotonic()
                silent += min(since, LOOK)  # where this process stood still (a machine asleep), so did the other
                if silent > row_limit:
                    return done, f"took longer than {row_limit:.0f} s"
                if time.monotonic() > until + row_limit / 2:
                    return done, "the time of the run was over"
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    if done == len(tasks) or (process.returncode == 3 and done):
        return done, None  # 3: it gave the row that broke the GPU for it, and left
    last = errors.read_text().strip().splitlines()
    return done, f"the process died with {process.returncode}: {last[-1] if last else 'it said nothing'}"


def run(device: torch.device, steps: list[str], out: Path, dtype: str, backend: str, total: float) -> dict[str, Any]:
    """All steps; the report is written after each step and each row."""
    begin = time.monotonic()
    given = [word for i, word in enumerate(sys.argv[1:]) if "--out" not in (word, sys.argv[i])]  # where it goes aside
    command = " ".join(["python -m benchmarks.gpu", *given])
    report: dict[str, Any] = {"machine": describe(device), "command": command, "steps": [], "rows": []}
    name = slug(report["machine"]["device"])

    def save() -> None:
        report["goals"] = goals.goals(report["rows"])
        report["predicted"] = gpu_report.compared(report["rows"])
        write_json(out / f"{name}.json", report)
        write_text(out / f"{name}.md", gpu_report.markdown(report))

    def keep(row: dict[str, Any]) -> None:
        report["rows"].append(row)
        took = f"{row['forward_backward']['kernel_ms']:.3f} ms" if "forward_backward" in row else row.get("reason", "")
        say(f"{row['label']}: {row['contender']}: {row['status']} {took}")
        save()

    def say(said: str) -> None:
        print(f"{time.monotonic() - begin:4.0f} s  {said}", file=sys.stderr, flush=True)

    for step in steps:
        started, left = time.monotonic(), total - (time.monotonic() - begin)
        say(f"{step} ...")
        if step == "tests":
            row = tests_step(min(LIMITS[step], left))
        elif step == "aot":
            row = aot_step(device, min(LIMITS[step], left), out / f"{name}-aot.json")
        else:
            before = len(report["rows"])
            measure(tasks_of(step, device, dtype, backend), begin + total, keep)
            fine = sum(row["status"] == "ok" for row in report["rows"][before:])
            said = f"{fine} of {len(report['rows']) - before} rows measured"
            row = {"step": step, "status": "ok", "seconds": time.monotonic() - started, "said": said}
        report["steps"].append(row)
        say(f"{step}: {row['status']}. {row.get('said', '')}")
        save()
    return report


def main(arguments: list[str] | None = None) -> int:
    """Run the steps, or write the predictions; 0 if every step and every row of ours went well."""
    parser = argparse.ArgumentParser(description="Test and measure the kernels on this machine's GPU.")
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes on the CPU: tries the program, measures nothing"
    )
    parser.add_argument("--predict", action="store_true", help="write what an H100 should show, and stop")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the report")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="after which no new row is begun")
    asked = parser.parse_args(arguments)
    steps = asked.steps.split(",")
    if unknown := [step for step in steps if step not in STEPS]:
        print(f"steps must be some of {', '.join(STEPS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        if asked.predict:
            rows = predictions.predict()
            content = {"ceilings": asdict(predictions.H100), "rows": rows, "goals": predictions.goal_rows(rows)}
            write_json(asked.out / "h100-predictions.json", content)
            write_text(asked.out / "h100-predictions.md", predictions.markdown(rows))
            print(f"wrote {asked.out / 'h100-predictions.md'}")
            return 0
        if not asked.dry and not torch.cuda.is_available():
            print(
                "there is no GPU here: --dry tries the program on the CPU, --predict says what to expect",
                file=sys.stderr,
            )
            return 1
        device = torch.device("cpu") if asked.dry else torch.device("cuda", torch.cuda.current_device())
        dtype, backend = ("float32", "sdpa") if asked.dry else ("bfloat16", "triton")
        report = run(device, steps, asked.out, dtype, backend, asked.seconds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(gpu_report.summary(report))
    print(f"wrote {asked.out / slug(report['machine']['device'])}.json and .md")
    wrong = [step for step in report["steps"] if step["status"] not in ("ok", "skipped")]
    wrong += [row for row in report["rows"] if row["contender"] == goals.OURS and row["status"] != "ok"]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
