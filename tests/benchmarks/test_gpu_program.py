"""The program behind `make gpu`, tried on a CPU, so that nothing silly fails on the day that there is a GPU."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.parts import goals, gpu_report, gpu_worker, machine
from benchmarks.parts.contenders import Shape, check, forward, ours
from benchmarks.parts.peers import PEERS, MaskedSDPA, Missing, WrittenOut
from dsmr_kernels.costing.timing import kernel_seconds, wall_seconds

CPU = torch.device("cpu")
SMALL = Shape(2, 4, 2, 12, 20, 16)


def _task(**change: Any) -> dict[str, Any]:
    return gpu.tasks_of("goals", CPU, "float32", "sdpa")[0] | change


@pytest.mark.soak
def test_the_whole_program_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--dry", "--steps", "goals,piece,grid", "--out", str(tmp_path), "--seconds", "3600"]  # on a busy machine
    assert gpu.main(asked) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "cpu.json").read_text())
    rows = report["rows"]
    assert len(rows) == 2 * (1 + len(PEERS)) + 1
    for row in rows:
        assert row["status"] == (
            "ok" if row["contender"] in (goals.OURS, "written out", "SDPA, boolean mask") else "skipped"
        )
        assert row["status"] == "ok" or row["reason"]
    for row in (row for row in rows if row["status"] == "ok" and row["kind"] == "attention"):
        assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
        assert row["forward"]["tflops"] > 0
        assert all(row[name][kind] > 0 for name in gpu_report.PASSES for kind in ("kernel_ms", "wall_ms"))
    (piece,) = (row for row in rows if row["kind"] == "piece")
    assert piece["gain"] > 0
    assert [step["status"] for step in report["steps"]] == ["ok"] * 3
    assert {row["met"] for row in report["goals"]} <= {None, True, False}
    page = (tmp_path / "cpu.md").read_text()
    for words in ("## Goals", "## Steps", "pip install flash-attn", "calls in turn", str(goals.DRY_SHAPES[1])):
        assert words in page
    assert "wrote" in capsys.readouterr().out


def test_predictions_are_written(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert gpu.main(["--predict", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "h100-predictions.json").read_text())
    rows = content["rows"]
    for row in rows:
        if row["direction"] != "piece":
            assert 0 < row["floor_ms"] < row["fast_ms"] <= row["expected_ms"] <= row["slow_ms"]
    long = goals.LONG_128
    (mine,) = (r for r in rows if r["label"] == str(long) and r["contender"] == "ours" and r["direction"] == "forward")
    assert mine["flops"] == long.forward_flops
    assert len(content["goals"]) == len(goals.goals([]))
    assert all(row["measured"] is not None for row in content["goals"])
    assert str(long) in (tmp_path / "h100-predictions.md").read_text()


def test_the_backward_is_counted_product_by_product() -> None:
    pytest.importorskip("triton")
    from benchmarks.parts.predictions import Sizes, ours, peer

    sizes = Sizes(Shape(3, 4, 2, 8, 5, 16))
    own, pairs = 3 * 4 * 36, 3 * 4 * (36 + 40)
    assert (sizes.own_pairs, sizes.pairs) == (own, pairs)
    assert [work.flops for work in ours(sizes, "backward")] == [2 * 16 * 3 * pairs, 2 * 16 * 4 * own]
    assert [work.flops for work in peer(sizes, "backward", "flash")] == [0, 2 * 16 * 5 * pairs]
    assert sum(work.flops for work in peer(sizes, "backward", "masked")) == 2 * 16 * 5 * 3 * 4 * 8 * 13
    assert sum(work.pairs for work in peer(sizes, "backward", "flex")) == 2 * pairs
    q, kv, memory = 3 * 4 * 8 * 16 * 2, 2 * 3 * 2 * 8 * 16 * 2, 2 * 3 * 2 * 5 * 16 * 2
    assert [work.bytes for work in ours(sizes, "forward")] == [2 * q + kv + memory]
    assert sum(work.bytes for work in peer(sizes, "forward", "flash")) == 2 * q + 3 * (kv + memory)


@pytest.mark.parametrize("peer", [WrittenOut, MaskedSDPA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_compute_the_same_attention(peer: Any, dtype: torch.dtype) -> None:
    case = SMALL.case(dtype)
    assert max(check(case, "peer", peer(case)).values()) <= 1
    assert peer(case)(case).shape == ours(case).shape


def test_peers_that_cannot_run_say_what_they_need() -> None:
    case = SMALL.case(torch.float32)
    said = {}
    for name, peer in PEERS.items():
        try:
            peer(case)(case)
        except Missing as missing:
            said[name] = str(missing)
    assert {"SDPA flash, causal", "FlexAttention, block mask"} <= set(said)
    assert all("GPU" in words or "pip install" in words or "KV heads" in words for words in said.values())


def test_a_wrong_contender_fails_and_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "wrong", lambda case: lambda case: MaskedSDPA(case)(case) * 1.01)
    row = gpu_worker.measured(_task(contender="wrong"))
    assert row["status"] == "failed"
    assert "wrong: out errs by" in row["reason"] or "wrong: d" in row["reason"]
    assert "forward" not in row


@pytest.mark.parametrize(
    ("error", "reason"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"), (RuntimeError("a\nb"), "RuntimeError: a")],
)
def test_a_contender_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    def broken(case: Any) -> Any:
        raise error

    monkeypatch.setitem(PEERS, "broken", broken)
    row = gpu_worker.measured(_task(contender="broken"))
    assert (row["status"], row["reason"]) == ("failed", reason)


def _worker(path: Path, body: str) -> list[str]:
    """A process that answers each task by `body`, which sees the task's number n, and may say(row)."""
    path.write_text(
        "import json, sys, time\n"
        "tasks = json.load(open(sys.argv[1])); out = open(sys.argv[2], 'a')\n"
        "def say(row): print(json.dumps({'row': row}), file=out, flush=True)\n"
        f"for n, task in enumerate(tasks):\n    {body}\n"
    )
    return [sys.executable, str(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("sys.exit('Segmentation fault') if task['contender'] == 'b' else say(task)", "the process died with 1: Segm"),
        ("time.sleep(60) if task['contender'] == 'b' else say(task)", "took longer than 1 s"),
    ],
)
def test_a_process_that_dies_or_hangs_costs_one_row(tmp_path: Path, body: str, reason: str) -> None:
    rows: list[dict[str, Any]] = []
    tasks = [_task(contender=name) for name in "abc"]
    gpu.measure(tasks, time.monotonic() + 60, rows.append, 1.0, _worker(tmp_path / "worker.py", body))
    assert [row["contender"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["status"] == "failed"
    assert rows[1]["reason"].startswith(reason)
    assert "status" not in rows[0]  # as the process gave it


def test_a_time_in_which_the_machine_slept_is_not_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that was closed, or a job that was stopped and continued: what stood still is not what hung."""
    rows: list[dict[str, Any]] = []
    clock, sleeps, slept = time.monotonic, iter([0.0, 0.0, 0.0, 0.0, 500.0]), []

    def woken() -> float:
        slept.append(next(sleeps, 0.0))
        return clock() + sum(slept)

    monkeypatch.setattr(gpu.time, "monotonic", woken)
    body = "time.sleep(0.5); say(task)"
    gpu.measure([_task(contender="a")], clock() + 3600, rows.append, 30.0, _worker(tmp_path / "worker.py", body))
    assert "status" not in rows[0]  # as the process gave it


def test_a_row_that_breaks_the_gpu_is_not_lost(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    body = "say(task); sys.exit(3) if task['contender'] == 'a' else None"
    tasks = [_task(contender=name) for name in "ab"]
    gpu.measure(tasks, time.monotonic() + 60, rows.append, 10.0, _worker(tmp_path / "worker.py", body))
    assert [row["contender"] for row in rows] == ["a", "b"]


def test_what_there_is_no_time_for_is_a_row() -> None:
    rows: list[dict[str, Any]] = []
    gpu.measure([_task(), _task()], time.monotonic() - 1, rows.append)
    assert [row["status"] for row in rows] == ["skipped"] * 2
    assert rows[0]["reason"] == "the time of the run was over"


@pytest.mark.slow
def test_steps_end_in_rows() -> None:
    fine = gpu.run_step("fine", [sys.executable, "-c", "print('12 passed')"], 60)
    assert (fine["status"], fine["said"]) == ("ok", "12 passed")
    failed = gpu.run_step("failed", [sys.executable, "-c", "import sys; sys.exit('no')"], 60)
    assert (failed["status"], failed["said"]) == ("failed with 1", "no")
    slow = gpu.run_step("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert (slow["status"], slow["said"]) == ("failed", "took longer than 1 s")
    assert gpu.environment()["TRITON_INTERPRET"] == "0"


def _measured(shape: Shape, contender: str, ms: float, tflops: float = 1.0) -> dict[str, Any]:
    times = {"kernel_ms": ms, "wall_ms": 2 * ms, "graph_ms": ms}
    row: dict[str, Any] = {name: dict(times) for name in gpu_report.PASSES}
    row["forward"]["tflops"] = tflops
    row |= {"kind": "attention", "label": str(shape), "contender": contender, "status": "ok", "dtype": "bfloat16"}
    return row | {"errors": {"out": 0.5}}


def test_goals_are_judged_against_the_best_peer() -> None:
    label = goals.piece_label(goals.PIECE, goals.SEGMENTS)
    rows = [
        _measured(goals.LONG_128, "ours", 1.0, 460),
        _measured(goals.LONG_128, "slow peer", 9.0),
        _measured(goals.LONG_128, "fast peer", 1.6),
        _measured(goals.LONG_64, "ours", 1.0, 340),
        _measured(goals.TRAINING, "ours", 2.0),
        _measured(goals.TRAINING, "peer", 4.0) | {"status": "failed"},
        {"kind": "piece", "label": label, "contender": "ours", "status": "ok", "gain": 3.9},
    ]
    found = goals.goals(rows)
    assert [row["met"] for row in found] == [True, False, False, None, None, None, False]
    assert found[2]["measured"] == pytest.approx(1 / 1.6)
    assert [row["met"] for row in goals.goals([])] == [None] * len(found)


def test_measurements_are_held_against_predictions() -> None:
    pytest.importorskip("triton")
    (row,) = (r for r in gpu_report.compared([_measured(goals.LONG_128, "ours", 1e4)]) if r["direction"] == "forward")
    assert not row["within"]
    assert row["over_floor"] == pytest.approx(1e4 / row["floor_ms"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("there is no GPU here: --dry")
    assert gpu.main(["--steps", "teats"]) == 2


def test_names_and_timings() -> None:
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert machine.describe(CPU)["torch"] == torch.__version__
    case = SMALL.case(torch.float32)
    for seconds in (kernel_seconds, wall_seconds):
        assert 0 < seconds(forward(ours, case), CPU, budget=0.01) < 1
        assert seconds(lambda: time.sleep(0.01), CPU, budget=0.05) == pytest.approx(0.01, abs=0.008)
