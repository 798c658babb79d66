"""The benchmark of caches of Transformers: it checks before it times, and says what it measured."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.23")

from benchmarks import huggingface


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LAYERS": 2, "WIDTH": 64, "HEADS": 2}.items():
        monkeypatch.setattr(huggingface, name, value)


def test_it_writes_a_row_for_each_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--context", 64, "--rounds", 2, "--tokens", 2, "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["huggingface", *map(str, options)])
    huggingface.main()
    rows = json.loads((tmp_path / "cpu-huggingface.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [contender.name for contender in huggingface.contenders(64)]
    ours, exact, rounded = rows[2:]
    token = 2 * 64 * 4  # bytes of a token in a layer
    assert exact["bytes"] == (32 + 4) * token
    assert ours["bytes"] == exact["bytes"] + 2 * token
    assert rounded["bytes"] < ours["bytes"] / 3
    text = (tmp_path / "cpu-huggingface.md").read_text()
    assert text.count("\n| ") == 1 + len(rows)


def test_a_wrong_cache_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = huggingface.Decoder.step
    monkeypatch.setattr(huggingface.Decoder, "step", lambda self, tokens: step(self, tokens) + 0.01)
    with pytest.raises(AssertionError, match="DynamicCache"):
        huggingface.compare(32, 1, 1)
