"""The benchmarks: nothing wrong is timed, every row says what it is, and the report divides what it should."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    report,
    step_profile,
    test_attention,
    test_decode_attention,
    test_ring_append,
    test_training_step,
    training_step,
)
from benchmarks import test_whole_piece as whole_piece
from benchmarks.parts.caches import Concatenation
from benchmarks.parts.contenders import Shape, forward_backward
from benchmarks.parts.models import CONTENDERS, SAME_SIZE, Sizes, Training, check_learning
from benchmarks.parts.peers import MaskedSDPA, Missing
from benchmarks.parts.rows import OURS, Row, reported, timed
from benchmarks.training_step import Contender, goals_of, rows_of, text_of
from dsmr.console.errors import UserError
from dsmr_kernels.cases import Case
from dsmr_kernels.costing.cost import Work

ROOT = Path(__file__).resolve().parents[2]
SMALL = Shape(1, 2, 2, 12, 20, 16)


class Clock:
    """Stands in for pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.stats, self.timed = "", dict[str, Any](), {"min": 0.5, "median": 1.0}, 0

    def pedantic(self, call: Callable[[], Any], **options: Any) -> None:
        self.timed += 1
        call()


def _slightly_wrong(case: Case) -> Any:
    right = MaskedSDPA(case)
    return lambda case: right(case) * 1.01


class Forgetful(Concatenation):
    """Keeps the oldest token instead of the newest but one."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        oldest = self.k[:, :, :1]
        super().append(k, v)
        self.k = torch.cat([oldest, self.k[:, :, 1:]], 2)


@pytest.mark.parametrize("direction", test_attention.PASSES)
def test_wrong_attention_fails_and_is_not_timed(monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    monkeypatch.setitem(test_attention.PEERS, "wrong", _slightly_wrong)
    clock, pass_ = Clock(), test_attention.PASSES[direction]
    with pytest.raises(AssertionError, match=r"wrong: (out|d[qkv]) errs by"):
        test_attention.compare(clock, "small", SMALL, torch.float32, direction, pass_, "wrong")
    assert clock.timed == 0
    assert clock.extra_info["contender"] == "wrong"


def test_attention_that_is_right_forward_and_wrong_backward_fails() -> None:
    case, oracle = test_attention.case_and_oracle(SMALL, torch.float32)

    # The output is right to the last bit; the gradient of k is a tenth too large.
    peer = MaskedSDPA(case)

    def wrong(case: Case) -> torch.Tensor:
        return peer(Case(case.q, case.k + 0.1 * (case.k - case.k.detach()), case.v, None, case.grad))

    found = dict(zip(("dq", "dk", "dv"), forward_backward(wrong, case)(), strict=True))
    oracle.hold("wrong", {"out": peer(case), "dq": found["dq"], "dv": found["dv"]})
    with pytest.raises(AssertionError, match="wrong: dk errs by"):
        oracle.hold("wrong", {"dk": found["dk"]})


def test_wrong_caches_and_pieces_fail_and_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(test_ring_append.CACHES, "wrong", Forgetful)
    monkeypatch.setitem(test_ring_append.SHAPES, "small", Shape(1, 2, 2, 4, 20, 16))
    clock = Clock()
    with pytest.raises(AssertionError, match="Forgetful: k is not the newest 20 tokens"):
        test_ring_append.test_append(clock, "small", torch.float32, "wrong")
    monkeypatch.setitem(test_decode_attention.CONTENDERS, "wrong", (Forgetful, test_decode_attention.by_sdpa))
    monkeypatch.setitem(test_decode_attention.SHAPES, "small", Shape(1, 2, 2, 1, 20, 16))
    with pytest.raises(AssertionError, match="wrong: out errs by"):
        test_decode_attention.test_decode_attention(clock, "small", torch.float32, "wrong")

    class Amnesic(whole_piece.InTurn):
        def remember(self, part: Case) -> None:
            pass

    monkeypatch.setitem(whole_piece.CONTENDERS, "wrong", Amnesic)
    monkeypatch.setattr(whole_piece, "SEGMENT", (SMALL, 3))
    with pytest.raises(AssertionError, match="wrong: out errs by"):
        whole_piece.test_whole_piece(clock, torch.float32, "forward", "wrong")
    assert clock.timed == 0


@pytest.mark.parametrize("contender", whole_piece.CONTENDERS)
def test_whole_pieces_agree(monkeypatch: pytest.MonkeyPatch, contender: str) -> None:
    monkeypatch.setattr(whole_piece, "SEGMENT", (SMALL, 4))
    direction = "forward" if contender == "SDPA, boolean mask, one call" else "forward + backward"
    clock = Clock()
    whole_piece.test_whole_piece(clock, torch.float32, direction, contender)
    assert clock.timed == 1
    assert clock.extra_info["tokens_per_s"] == 4 * SMALL.queries / 0.5


def test_a_wrong_model_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Sizes(2, 32, 2, 8, 24, 1, vocabulary=20)
    monkeypatch.setattr(test_training_step, "CHECKED", small)
    monkeypatch.setattr(test_training_step, "SIZES", small)
    name = "ours concatenated, full"
    right, clock = CONTENDERS[name], Clock()
    test_training_step.reference.cache_clear()
    test_training_step.test_training_step(clock, torch.float32, name)
    assert clock.timed == 1

    def amnesic(sizes: Sizes) -> Any:
        made: Any = right(sizes)
        made.past = [None] * (sizes.layers + 1)
        called = type(made).__call__

        def forgetting(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            made.past = [None] * sizes.layers
            return called(made, tokens, targets)

        forgetting.model = made.model  # type: ignore[attr-defined]
        return forgetting

    monkeypatch.setitem(CONTENDERS, name, amnesic)
    with pytest.raises(AssertionError, match=r"concatenated, full: (the loss|a gradient) errs by"):
        test_training_step.test_training_step(clock, torch.float32, name)
    assert clock.timed == 1
    test_training_step.reference.cache_clear()


def test_models_of_other_sizes_are_not_compared() -> None:
    sizes = Sizes(2, 32, 2, 8, 24, 1, vocabulary=20)
    training = Training(sizes, CONTENDERS["ours, full"])
    check_learning("ours", training, training.parameters)
    with pytest.raises(AssertionError, match="parameters, ours has"):
        check_learning("ours", training, int(training.parameters * (1 + 2 * SAME_SIZE)))
    with torch.no_grad():
        training.contender.model.embedding.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(AssertionError, match="the loss is"):
        check_learning("ours", training, training.parameters)


def _row(**change: Any) -> Row:
    said: dict[str, Any] = {"question": "q", "case": "c", "contender": "x", "ours": False, "shape": "s"}
    return Row(**said | {"dtype": torch.float32, "backend": "b"} | change)


def test_rates_are_those_of_the_fastest_round() -> None:
    clock = Clock()
    row = _row(work=Work(flops=2e9, nominal_flops=4e9, bytes_read=1e9, calls=1), predicted=0.25, tokens=10)
    with reported(clock, row):
        timed(clock, row, lambda: None)
    said = clock.extra_info
    assert (said["gflops"], said["nominal_gflops"], said["gb_per_s"]) == (4.0, 8.0, 2.0)
    assert (said["predicted_ms"], said["tokens_per_s"]) == (250.0, 20.0)
    assert said["device"] in clock.group
    assert said["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Missing("not installed: pip install x"), "pip install x"),
        (RuntimeError("can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_what_cannot_run_is_a_skipped_row(error: Exception, reason: str) -> None:
    with pytest.raises(pytest.skip.Exception, match=reason), reported(Clock(), _row()):
        raise error
    with pytest.raises(RuntimeError, match="a bug"), reported(Clock(), _row()):
        raise RuntimeError("a bug")


# --- The report ---------------------------------------------------------------------------------------------------


def _saved(path: Path, times: dict[str, float], untimed: tuple[str, ...] = (), **machine: str) -> Path:
    rows = [
        {
            "extra_info": {"question": "append", "case": "c", "contender": n, "ours": n == OURS, "dtype": "float32"},
            "stats": {"min": seconds, "median": 2 * seconds},
        }
        for n, seconds in times.items()
    ]
    missing = [
        {"question": "append", "case": "c", "contender": name, "status": "failed", "reason": "wrong"}
        for name in untimed
    ]
    content = {"machine_info": {"device": "CPU", **machine}, "benchmarks": rows, "untimed": missing}
    path.write_text(json.dumps(content))
    return path


def test_the_report_divides_by_the_best_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _saved(tmp_path / "a.json", {OURS: 0.002, "slow": 0.008, "good": 0.003}, ("broken",))
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| c | ours | 2.000 | 4.000 | **1.50 ×** |" in said
    assert "|  | good | 3.000 | 6.000 | 1.00 × |" in said
    assert "- broken: failed: wrong" in said
    assert "device CPU" in said
    page = (tmp_path / "benchmarks.md").read_text()
    assert said.strip() in page
    assert "](images/bench-append.png)" in page
    assert (tmp_path / "images" / "bench-append.png").stat().st_size > 1000


def test_regressions_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _saved(tmp_path / "a.json", {OURS: 0.002, "x": 0.002, "y": 0.002, "z": 0.002})
    after = _saved(tmp_path / "b.json", {OURS: 0.003, "x": 0.0021, "y": 0.001}, ("z",))
    assert report.main([str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "| ours | 2.000 | 3.000 | +50% slower |" in said
    assert "| x |" not in said
    assert "| y | 2.000 | 1.000 | -50% |" in said
    assert "no longer timed" in said
    assert "2 of 4 rows" in said
    assert report.main([str(before), str(before)]) == 0
    only = _saved(tmp_path / "c.json", {OURS: 0.003})
    assert report.main([str(before), str(only), "--threshold", "0.6"]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read"),
        ("{", "is not a JSON file"),
        ("[]", "is not a run of these benchmarks"),
        ('{"benchmarks": [{"stats": {}}], "machine_info": {}}', "it lacks 'extra_info'"),
        ('{"benchmarks": [], "machine_info": {}}', "holds no rows"),
    ],
)
def test_bad_files_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_runs_of_other_machines_are_not_compared(tmp_path: Path) -> None:
    one = report.load(_saved(tmp_path / "a.json", {OURS: 1.0}))
    other = report.load(_saved(tmp_path / "b.json", {OURS: 1.0}, threads="8"))
    with pytest.raises(UserError, match="threads is None in the first and 8 in the second"):
        report.differences(one, other, 0.1)
    with pytest.raises(UserError, match="no row in common"):
        report.differences(one, report.load(_saved(tmp_path / "c.json", {"x": 1.0})), 0.1)


@pytest.mark.slow
def test_a_run_of_pytest_keeps_every_row(tmp_path: Path) -> None:
    """One file of the benchmarks as a user runs it, with one contender broken."""
    (tmp_path / "breaking.py").write_text(
        "from benchmarks.parts.caches import CACHES, Rolled\n"
        "class Wrong(Rolled):\n"
        "    def append(self, k, v):\n"
        "        super().append(v, k)\n"
        "CACHES['wrong'] = Wrong\n"
    )
    saved = tmp_path / "run.json"
    outside = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # where nothing is timed
    command = [sys.executable, "-m", "pytest", "-q", "-p", "breaking", "-p", "no:cacheprovider", "--benchmark-only"]
    done = subprocess.run(
        [*command, "benchmarks/test_ring_append.py", "-k", "token-float32", f"--benchmark-json={saved}"],
        cwd=ROOT,
        env=outside | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "DSMR_BENCH": "quick"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    run = report.load(saved)
    assert {key[2] for key in run.rows} >= {OURS, "torch.cat and slice", "torch.roll"}
    assert [(row["contender"], row["status"]) for row in run.untimed if row["status"] == "failed"] == [
        ("wrong", "failed")
    ]
    assert run.profile == "quick"
    assert "CPU" in done.stdout
    assert "node" not in run.machine
    assert all(row["device"] == "CPU" for row in run.rows.values())


# --- The training step --------------------------------------------------------------------------------------------


def test_goals_are_judged_by_ratios() -> None:
    sizes = Sizes(8, 512, 8, 512, 2048, 2)
    process: Any = None

    def known(peak: int) -> dict[str, int]:
        return {"parameters": 25_000_000, "peak_bytes": 2**32, "own_peak_bytes": peak}

    contenders = [
        Contender("x-transformers, XL memory", "bfloat16", process, known(2**30), [4.0, 8.0, 4.0]),
        Contender("x-transformers, XL memory, compiled", "bfloat16", process, known(2**30), [3.0, 6.0, 3.0]),
        Contender("ours, two_scale", "bfloat16", process, known(2**29), [1.0, 2.0, 1.0]),
        Contender("ours, full", "bfloat16", process, known(2**30), [2.0, 4.0, 2.0]),
        Contender("ours, two_scale", "float32", process, {"failed": "out of memory"}),
    ]
    rows = rows_of(contenders, sizes)
    assert rows[2]["tokens_per_s"] == 1024
    assert [row.get("times_as_fast_as_compiled") for row in rows[2:]] == [3.0, 1.5, None]
    goals = goals_of(rows)
    assert [(goal["goal"], goal["measured"], goal["met"]) for goal in goals] == [
        ("ours, two_scale, bfloat16", 4.0, True),
        ("ours, full, bfloat16", 2.0, False),
        ("ours, two_scale, float32", None, None),
        ("ours, full, float32", None, None),
        ("ours, two_scale, bfloat16", 0.5, True),
        ("ours, full, bfloat16", 1.0, False),
        ("ours, two_scale, float32", None, None),
        ("ours, full, float32", None, None),
    ]
    text = text_of(rows, goals, sizes, 3)
    assert "| ours, two_scale | float32 | failed: out of memory |" in text
    assert "| not measured |" in text


def test_what_is_known_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process: Any = None
    known = {"parameters": 25_000_000, "own_peak_bytes": 2**20, "peak_bytes": 2**30}

    def interrupted(sizes: Sizes, dtype: str, names: list[str], turns: int, threads: int, line: Any) -> Any:
        one = Contender("ours, full", dtype, process, dict(known), [1.0])
        yield [one]
        if dtype == "float32":
            raise KeyboardInterrupt

    monkeypatch.setattr(training_step, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training_step.main(["--out", str(tmp_path)])
    saved = json.loads((tmp_path / "cpu-training-step.json").read_text())
    assert [(row["dtype"], row["tokens_per_s"]) for row in saved["rows"]] == [("bfloat16", 1024), ("float32", 1024)]
    assert (tmp_path / "cpu-training-step.png").exists()
    assert training_step.main(["--width", "100", "--out", str(tmp_path)]) == 1


def test_a_profile_of_a_step_finds_every_kind_of_work() -> None:
    training = Training(Sizes(2, 64, 2, 16, 32, 1, vocabulary=40), CONTENDERS["ours, full"])
    found, seconds, copies = step_profile.shares(training)
    assert sum(found.values()) == pytest.approx(1)
    assert all(share > 0 for share in found.values()), found
    assert seconds > 0
    assert copies > 0


@pytest.mark.parametrize("name", ["ours, full", "ours, two_scale"])
def test_the_floor_of_a_step_makes_as_many_products_as_are_counted(name: str) -> None:
    """Of one layer and its head, by hand; of attention, of what tokens see of memory and segment."""
    sizes = Sizes(2, 64, 2, 16, 32, 1, vocabulary=40)
    training = Training(sizes, CONTENDERS[name])
    with FlopCounterMode(display=False) as layers:
        step_profile.products_of_layers(training)()
    assert layers.get_total_flops() == 3 * 2 * 16 * (2 * (4 * 64 * 64 + 2 * 64 * 256) + 64 * 40)
    with FlopCounterMode(display=False) as attention:
        step_profile.products_of_attention(training)()
    model: Any = training.contender.model
    seen = sum(model.config.schedule.horizons) * 5 + 2 * 8 * 7
    assert attention.get_total_flops() == 2 * 2 * 16 * 32 * seen
    assert all(seconds > 0 for seconds in step_profile.floor(training, turns=1))
