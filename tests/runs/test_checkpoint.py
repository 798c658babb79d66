"""Checkpoints are whole or absent, load without running code, and bring every random generator back."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.console.files import write_json
from dsmr.runs.checkpoint import (
    Metrics,
    RunDirectory,
    check_same_run,
    load_checkpoint,
    load_settings,
    restore_rng,
    rng_state,
    save_checkpoint,
)


def draws() -> list[float]:
    np_draws = [np.random.rand(), np.random.normal()]  # noqa: NPY002
    return [float(torch.rand(())), random.random(), random.gauss(0, 1), *np_draws]


def test_every_random_generator_comes_back(tmp_path: Path) -> None:
    random.gauss(0, 1)
    np.random.normal()  # noqa: NPY002 (leaves half a pair of normal numbers behind)
    save_checkpoint(tmp_path / "last.pt", {"rng": rng_state()})
    expected = draws()
    restore_rng(load_checkpoint(tmp_path / "last.pt")["rng"])
    assert draws() == expected


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    weights = torch.randn(3, 5)
    save_checkpoint(
        tmp_path / "last.pt", {"model": {"w": weights, "tied": weights}, "progress": {"best": None, "n": 7}}
    )
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(loaded["model"]["w"], weights)
    assert loaded["progress"] == {"best": None, "n": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "old"])
def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": {"w": torch.randn(100)}})
    content = path.read_bytes()
    if damage == "old":
        torch.save({"format": 0}, path)
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"MThd\0\0\0\6"}[damage])
    with pytest.raises(UserError, match=r"last\.pt"):
        load_checkpoint(path)


def test_a_missing_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "last.pt")


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from dsmr.runs.checkpoint import save_checkpoint
from dsmr.console.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"w": torch.zeros(1_000_000)})
except UserError as error:
    assert "last.pt" in str(error) and "\\n" not in str(error), str(error)
    sys.exit(7)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.ones(3)})
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for step in range(1, 7):
        metrics.append({"kind": "train", "step": step, "loss": 0.1 * step})
        if step % 2 == 0:
            metrics.append({"kind": "validation", "step": step, "loss": 1.0})
    with open(metrics.path, "a") as file:
        file.write('{"kind": "train", "st')  # killed here
    metrics.cut(4, 2)
    assert [(r["kind"], r["step"]) for r in metrics.read()] == [
        ("train", 1),
        ("train", 2),
        ("validation", 2),
        ("train", 3),
        ("train", 4),
    ]
    metrics.cut(0, 0)
    assert metrics.read() == []


SETTINGS = {
    "tokenizer_hash": "a" * 64,
    "corpus": {"name": "songs", "digest": "d" * 64},
    "model": {"d_model": 8, "schedule": "full(layers=2)"},
    "train": {"data": "songs", "batch_size": 2, "segments_per_step": 1, "seed": 0, "augment": True, "lr": 1e-3},
    "dtype": "float32",
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokenizer_hash": "b" * 64}, "tokeniser aaaaaaaaaaaaaaaa"),
        ({"corpus": {"name": "others", "digest": "e" * 64}}, "trained on the corpus songs .* holds others"),
        ({"model": {"d_model": 16, "schedule": "full(layers=2)"}}, "its d_model is 8, but 16 was asked for"),
        ({"train": {**SETTINGS["train"], "batch_size": 3}}, "its batch_size is 2, but 3"),
        ({"dtype": "bfloat16"}, "its dtype is float32, but bfloat16"),
    ],
)
def test_a_run_is_not_resumed_with_what_it_does_not_fit(tmp_path: Path, change: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_same_run(RunDirectory(tmp_path), SETTINGS, {**SETTINGS, **change})


@pytest.mark.parametrize(
    "then",
    [{"dtype": "a\nb"}, {"tokenizer_hash": "a\nb"}, {"corpus": {"name": "a\nb", "digest": "e"}}],
)
def test_what_a_run_says_of_itself_stays_on_one_line(tmp_path: Path, then: dict) -> None:
    with pytest.raises(UserError, match=r"a\\nb"):
        check_same_run(RunDirectory(tmp_path), {**SETTINGS, **then}, SETTINGS)


def test_a_run_may_go_on_longer_and_slower(tmp_path: Path) -> None:
    now = {**SETTINGS, "train": {**SETTINGS["train"], "lr": 1e-4, "data": "moved/songs"}}
    check_same_run(RunDirectory(tmp_path), SETTINGS, now)


def test_settings_of_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no training run"):
        load_settings(RunDirectory(tmp_path))
    write_json(tmp_path / "train.json", {"format": 1, "train": {}})
    with pytest.raises(UserError, match=r"train\.json is damaged: it lacks model, dtype, corpus, tokenizer_hash"):
        load_settings(RunDirectory(tmp_path))
    write_json(tmp_path / "train.json", {"format": 99})
    with pytest.raises(UserError, match="not written by this version"):
        load_settings(RunDirectory(tmp_path))


def test_clearing_a_run_leaves_other_files_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for name in ("last.pt", "train.json", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert run.holds_run
    run.clear()
    assert not run.holds_run
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_killed_process_left_half_written_is_swept_up(tmp_path: Path) -> None:
    for name in ("last.pt", ".last-abc123.pt", ".model-x_1.safetensors", ".last-minute.txt", ".hidden"):
        (tmp_path / name).write_text("x")
    RunDirectory(tmp_path).sweep()
    assert sorted(file.name for file in tmp_path.iterdir()) == [".hidden", ".last-minute.txt", "last.pt"]
