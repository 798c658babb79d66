"""A step that is recorded as a CUDA graph waits for nothing and moves nothing; replayed, it is the step as ever."""

import contextlib
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_corpus import tiny_corpus
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr.console.errors import UserError
from dsmr.corpus.streams import Batch
from dsmr.model.transformer import DSMRModel
from dsmr.runs.checkpoint import Metrics, load_checkpoint
from dsmr.runs.settings import TrainConfig
from dsmr.training import captured
from dsmr.training.captured import CapturedStep, unrecordable, without_graph
from dsmr.training.loop import train
from dsmr.training.update import clip_gradients, clip_on_device, optimizer_of


def config(data: str, out: str, **more) -> TrainConfig:
    settings = {
        "schedule": "two_scale(layers=2, long=64, short=16, n_long=1)",
        "d_model": 32,
        "n_heads": 2,
        "segment_length": 16,
        "batch_size": 2,
        "recall": 3,
        "dropout": 0.0,
        "steps": 12,
        "lr": 1e-2,
        "warmup": 1,
        "eval_every": 6,
        "save_every": 7,
    }
    return TrainConfig(data, out, **{**settings, **more})


class NothingLooks(TorchDispatchMode):
    """Fails where the host would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "_to_cpu")), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "schedule",
    [
        "two_scale(layers=2, long=64, short=16, n_long=1)",
        "uniform(layers=2, horizon=24)",
        "none(layers=2)",
        "uniform(layers=2, horizon=32, retention=random)",
    ],
)
def test_a_recorded_step_looks_at_nothing_and_leaves_every_memory_in_its_place(schedule: str) -> None:
    """On PyTorch's device without data, where a look raises; in a process of its own, since what other tests have
    PyTorch import may change that device's kernels."""
    code = (
        f"import pytest, test_captured\nwith pytest.MonkeyPatch.context() as m: test_captured.a_step({schedule!r}, m)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def a_step(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMR_BACKEND", "reference")
    monkeypatch.setattr(captured, "clip_on_device", lambda parameters, longest: torch.zeros((), device="meta"))
    settings = config("data", "out", schedule=schedule)
    with torch.device("meta"):
        model = DSMRModel(settings.model_config(90))
        state = model.new_state(2, dtype=torch.float32, device="meta", aligned=True, apart=True)
        tokens, starts = torch.zeros(2, 16, dtype=torch.int64), torch.zeros(2, 16, dtype=torch.int32)
    optimizer = optimizer_of(model, settings)
    monkeypatch.setattr(optimizer, "step", lambda: None)  # fused: not for this device
    step = CapturedStep(model, state, optimizer, 1.0, contextlib.nullcontext)
    step._take_in(Batch(tokens, tokens, starts, (), 32), 1e-3)
    held = [x for memory in state.memories for x in memory.tensors().values()] + [state.recent]
    with NothingLooks():
        for _ in range(2):
            step._step()
    now = [x for memory in state.memories for x in memory.tensors().values()] + [state.recent]
    assert all(x is y for x, y in zip(now, held, strict=True))
    assert [memory.seen for memory in state.memories] == [32, 32]


def test_gradients_are_clipped_on_the_device_as_ever() -> None:
    torch.manual_seed(0)
    for longest in (0.1, 100.0, float("inf")):
        ours, theirs = ([torch.zeros(3, 2, requires_grad=True), torch.zeros(5, requires_grad=True)] for _ in range(2))
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn(x.shape)
            y.grad = x.grad.clone()
        assert clip_on_device(ours, longest).item() == clip_gradients(theirs, longest)
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x.grad, y.grad)


def test_an_optimiser_is_saved_as_any_run_can_load_it() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = optimizer_of(model, config("data", "out"))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    plain = optimizer.state_dict()
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = torch.tensor(1e-2), True
    groups = without_graph(optimizer.state_dict())["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-2, 1e-2])
    for group, former in zip(groups, plain["param_groups"], strict=True):
        assert {**group, "lr": former["lr"]} == former


@pytest.mark.parametrize(
    ("more", "alone", "words"),
    [
        ({}, False, "where several ranks train together"),
        ({"compile": True}, True, "with --compile"),
        ({"checkpoint_layers": True}, True, "with --checkpoint-layers"),
        ({}, True, None),
    ],
)
def test_what_a_graph_does_not_go_with_is_known(more: dict, alone: bool, words: str | None) -> None:
    assert unrecordable(config("data", "out", **more), torch.device("cuda"), alone) == words


def test_a_graph_without_a_gpu_is_refused_in_a_sentence(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "corpus")
    settings = config(str(tmp_path / "corpus"), str(tmp_path / "run"), graph=True, device="cpu")
    with pytest.raises(UserError, match="on cpu, only on a GPU; train without --graph"):
        train(settings, console=Console(file=StringIO()))
    assert not (tmp_path / "run" / "train.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "schedule", ["two_scale(layers=2, long=64, short=16, n_long=1)", "uniform(layers=2, horizon=32, retention=random)"]
)
def test_replayed_steps_have_the_losses_of_steps_as_ever(tmp_path: Path, schedule: str, dtype: str) -> None:
    """Over a stop, too: the second half goes on from the first one's checkpoint, recorded anew."""
    tiny_corpus(tmp_path / "corpus", train=9)

    def losses(name: str, **more) -> list[float]:
        out = tmp_path / name
        given = config(
            str(tmp_path / "corpus"), str(out), schedule=schedule, dtype=dtype, device="cuda", augment=False, **more
        )
        train(given, console=Console(file=StringIO()), resume=out.exists())
        return [row["loss"] for row in Metrics(out / "metrics.jsonl").read() if row["kind"] == "train"]

    eager = losses("eager", steps=20)
    replayed = losses("replayed", steps=20, graph=True)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert replayed == pytest.approx(eager, abs=tolerance)
    losses("stopped", steps=10, graph=True, min_lr=1e-2)
    assert losses("stopped", steps=20, graph=True, min_lr=1e-2) == pytest.approx(
        losses("whole", steps=20, graph=True, min_lr=1e-2), abs=tolerance
    )
    saved = load_checkpoint(tmp_path / "replayed" / "last.pt")
    assert all(isinstance(group["lr"], float) for group in saved["optimizer"]["param_groups"])
