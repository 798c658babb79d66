"""A run of seconds: its settings, training it in silence, and what it left behind."""

from io import StringIO
from pathlib import Path

import torch
from rich.console import Console

from dsmr.runs.checkpoint import Metrics, load_checkpoint
from dsmr.training.loop import TrainConfig, TrainResult, train


def tiny_config(corpus: Path, out: Path, **more) -> TrainConfig:
    settings = {
        "data": str(corpus),
        "out": str(out),
        "schedule": "two_scale(layers=2, long=24, short=8, n_long=1)",
        "d_model": 16,
        "n_heads": 2,
        "segment_length": 8,
        "dropout": 0.2,
        "batch_size": 3,
        "segments_per_step": 2,
        "steps": 24,
        "lr": 1e-2,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "eval_every": 10,
        "save_every": 5,
        "augment": False,
    }
    return TrainConfig(**{**settings, **more})


def quiet(config: TrainConfig, **more) -> TrainResult:
    return train(config, console=Console(file=StringIO()), **more)


def losses(out: Path, kind: str = "train") -> list[tuple[int, float]]:
    return [
        (record["step"], record["loss"]) for record in Metrics(out / "metrics.jsonl").read() if record["kind"] == kind
    ]


def assert_same_run(out: Path, expected: Path) -> None:
    assert losses(out) == losses(expected)
    assert losses(out, "validation") == losses(expected, "validation")
    ours, theirs = load_checkpoint(out / "last.pt"), load_checkpoint(expected / "last.pt")
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight), name
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert {file.name for file in out.iterdir()} == {file.name for file in expected.iterdir()}
