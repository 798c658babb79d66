"""The table of what eight bits cost: exact ways of stepping agree, and every way is in it."""

import sys

import pytest
from tiny_corpus import tiny_corpus

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from small_export import small_run

from benchmarks import export_quality


@pytest.mark.slow
def test_every_way_is_in_the_table_and_the_exact_ones_agree(tmp_path, monkeypatch):
    small_run(tmp_path / "run")
    tiny_corpus(tmp_path / "corpus")
    options = ["--data", tmp_path / "corpus", "--tokens", 60, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["export_quality", str(tmp_path / "run"), *map(str, options)])
    export_quality.main()
    lines = (tmp_path / "export-quality.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:]]
    assert len(rows) == len(export_quality.IN_TORCH) + len(export_quality.EXPORTS)
    exact = [row for row in rows if row[1:3] == ["float32", "float32"]]
    assert len(exact) == 2
    assert len({row[3] for row in exact}) == 1
    assert all(float(row[5]) < 0.5 for row in rows)
