"""Ours beside concatenating: what is written says on what it was measured, idle or beside a program that spins."""

import contextlib
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import side_by_side
from benchmarks.parts.busy import spinning
from benchmarks.parts.contenders import Shape
from dsmr_kernels.backends.sdpa.processor import instruction_set


def test_a_busy_machine_is_at_rest_again() -> None:
    with contextlib.suppress(ValueError), spinning() as program:
        assert program.poll() is None
        raise ValueError("in between")
    assert program.poll() is not None


@pytest.mark.parametrize("busy", [False, True])
def test_the_instruction_set_and_the_other_program_stand_in_what_is_written(
    busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "GRID", [Shape(1, 2, 1, 40, 30, 16)])
    monkeypatch.setattr(side_by_side, "cores", lambda: 1)
    out = ["--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["side_by_side", *out, *["--busy"] * busy])
    side_by_side.main()
    stem = "cpu-attention-busy" if busy else "cpu-attention"
    said = (tmp_path / f"{stem}.md").read_text()
    assert f"instruction set {instruction_set()}" in said
    assert ("spinning beside" in said) == busy
    assert "forward + backward: median" in said
    assert "forward + backward: median" in capsys.readouterr().out
    written = json.loads((tmp_path / f"{stem}.json").read_text())
    assert written["busy"] == busy
    assert [row["dtype"] for row in written["rows"]] == ["float32", "bfloat16"]
    assert (tmp_path / f"{stem}.png").exists()


def test_short_calls_take_more_rounds_than_are_asked_for() -> None:
    assert side_by_side.enough([lambda: None], 3) == side_by_side.MOST_ROUNDS
    assert side_by_side.enough([lambda: time.sleep(0.2)], 3) == 3


def test_a_busy_table_says_nothing_of_a_product_of_another_moment() -> None:
    passed = {"dsmr_ms": 1.0, "sdpa_ms": 2.0, "speedup": 2.0}
    row = {"label": "a", "dtype": "float32", "forward": passed, "forward_backward": passed}
    idle = {**row, "forward": {**passed, "share_of_matmul": 0.5}}
    assert "of the matrix product" not in side_by_side.table([row])
    assert side_by_side.table([row]).splitlines()[2] == "| a | float32 | 1.0 | 2.0 | 2.00 × | 1.0 | 2.0 | 2.00 × |"
    assert side_by_side.table([idle]).splitlines()[2].count("| 50 % |") == 1
