"""Several processes train as one does: the same losses, the same files, on any number of ranks after another."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from several_ranks import ends, free_port, start_ranks
from soak import BY_HAND
from tiny_corpus import tiny_corpus, tiny_piece, tiny_vocabulary
from tiny_run import losses, quiet, tiny_config
from warm_start import Forked, WarmStart

from dsmr.console.errors import UserError
from dsmr.console.ranks import PATIENCE
from dsmr.corpus.store import PieceRecord, write_corpus
from dsmr.corpus.streams import StreamLoader
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel
from dsmr.runs.checkpoint import load_checkpoint
from dsmr.training import joining
from dsmr.training.joining import joined
from dsmr.training.loop import TrainConfig
from dsmr.training.ranks import TrainingRanks

CHILD = """
import json, os, signal, sys, torch
from dsmr.console.errors import UserError
from dsmr.model.transformer import DSMRModel
from dsmr.training import loop
from dsmr.training.loop import TrainConfig, train

torch.set_num_threads(1)
config, resume, break_at, way = json.loads(sys.argv[1]), sys.argv[2] == "resume", int(sys.argv[3]), sys.argv[4]
if break_at and os.environ["RANK"] == "1":
    forward, calls = DSMRModel.forward, []
    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(self.training)
        if sum(calls) == break_at:
            output.logits[0] = float("nan")
            output.loss = output.loss * float("nan")
        return output
    DSMRModel.forward = broken
if way == "fsdp":
    step, world = loop._Training._train_step, int(os.environ["WORLD_SIZE"])
    def checked(self):
        step(self)
        moments = [held[name] for held in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        for kind in (list(self.model.parameters()), moments):
            here, whole = sum(x.to_local().numel() for x in kind), sum(x.numel() for x in kind)
            assert here * world == whole, (here, whole)
    loop._Training._train_step = checked
try:
    sys.exit(train(TrainConfig.from_dict(config), resume=resume, parallel=way).exit_code)
except UserError as error:
    sys.exit(f"said: {error}")
"""


def config_of(data: Path, out: Path, **more) -> TrainConfig:
    return tiny_config(data, out, **{"batch_size": 4, "dropout": 0.0, "steps": 20, "threads": None, **more})


Start = Callable[..., list[Forked]]
Run = Callable[..., None]


@pytest.fixture
def start(warm_start: WarmStart) -> Start:
    """Ranks that train, under way."""

    def started(
        config: TrainConfig, ranks: int = 2, resume: bool = False, break_at: int = 0, way: str = "ddp"
    ) -> list[Forked]:
        asked = [json.dumps(config.to_dict()), "resume" if resume else "new", str(break_at), way]
        return start_ranks(warm_start, asked, ranks, CHILD)

    return started


@pytest.fixture
def run(start: Start) -> Run:
    """Ranks that train, to the end."""

    def ended(config: TrainConfig, ranks: int = 2, resume: bool = False, way: str = "ddp") -> None:
        found = ends(start(config, ranks, resume, way=way))
        assert [code for code, _ in found] == [0] * ranks, found
        assert all(text == "" for _, text in found[1:]), found  # only the first rank speaks

    return ended


def wait_for(out: Path, step: int) -> None:
    """Until this step has been trained."""
    until = time.monotonic() + 90
    while time.monotonic() < until and not (losses(out) and losses(out)[-1][0] >= step):
        time.sleep(0.002)


def assert_like(out: Path, expected: Path, rel: float = 1e-5) -> None:
    for kind in ("train", "validation"):
        ours, theirs = losses(out, kind), losses(expected, kind)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=rel)
    ours, theirs = load_checkpoint(out / "last.pt"), load_checkpoint(expected / "last.pt")
    assert ours["loader"] == theirs["loader"]
    for name, tensor in theirs["state"]["layers"][0].items():
        assert ours["state"]["layers"][0][name].shape == tensor.shape
    assert list(ours["model"]) == list(theirs["model"])
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    for number, moments in theirs["optimizer"]["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(ours["optimizer"]["state"][number][name], tensor, rtol=1e-2, atol=1e-5)


AUGMENTED = {"augment": True, "recall": 1, "segments_per_step": 1, "checkpoint_layers": True, "clip": 0.1}
RANDOM = {"schedule": "uniform(layers=2, horizon=24, retention=random)"}
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.mark.slow  # two processes that meet
@pytest.mark.parametrize(
    ("more", "way"),
    [
        ({"augment": False, "clip": 0.1}, "ddp"),
        (AUGMENTED, "ddp"),
        (RANDOM, "ddp"),
        ({**AUGMENTED, **RANDOM, "segments_per_step": 2}, "fsdp"),
        pytest.param({"compile": True, "steps": 6, "eval_every": 3}, "fsdp", marks=[BY_HAND, COMPILER]),
    ],
    ids=["plain", "augmented", "random", "augmented-random-fsdp", "compiled-fsdp"],
)
def test_two_ranks_have_the_losses_of_one_process(data: Path, tmp_path: Path, run: Run, more: dict, way: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / "ranks"
    quiet(config_of(data, whole, **more))
    run(config_of(data, out, **more), way=way)
    assert len(losses(out)) == more.get("steps", 20)
    assert_like(out, whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


@pytest.mark.slow  # two processes that meet
def test_pieces_of_different_lengths_keep_nobody_waiting(tmp_path: Path, run: Run) -> None:
    """One piece of 1,600 tokens beside one of 8: whichever row is free takes the next, as in one process."""
    lengths = [(400, "train"), (2, "train"), (6, "validation")]
    records = [
        PieceRecord(tiny_piece(notes, i), split, f"{i}.mid", notes, notes / 4)
        for i, (notes, split) in enumerate(lengths)
    ]
    write_corpus(tmp_path / "corpus", records, tiny_vocabulary(), "uneven")
    whole, out = tmp_path / "whole", tmp_path / "ranks"
    quiet(config_of(tmp_path / "corpus", whole, batch_size=2))
    run(config_of(tmp_path / "corpus", out, batch_size=2))
    assert_like(out, whole)


@pytest.mark.slow  # two processes that meet, three times
def test_a_run_goes_on_with_another_number_of_ranks_and_the_other_way(data: Path, tmp_path: Path, run: Run) -> None:
    whole, out = tmp_path / "whole", tmp_path / "ranks"
    steps = {"warmup": 3, "min_lr": 1e-2, "eval_every": 5}  # the rate does not depend on the length of the run
    quiet(config_of(data, whole, **steps))
    run(config_of(data, out, **{**steps, "steps": 6}))
    run(config_of(data, out, **{**steps, "steps": 11}), resume=True, way="fsdp")
    quiet(config_of(data, out, **{**steps, "steps": 15}), resume=True)
    assert "rngs" not in load_checkpoint(out / "last.pt")
    run(config_of(data, out, **steps), resume=True)
    ours, theirs = dict(losses(out)), dict(losses(whole))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(ours) == 20


@pytest.mark.slow  # two processes that meet, four times
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=BY_HAND)])
def test_as_many_ranks_go_on_bit_for_bit_also_with_dropout(
    data: Path, tmp_path: Path, start: Start, run: Run, way: str
) -> None:
    """After a signal in one of them, which ends both after the same step; and after both are killed."""
    whole, out = tmp_path / "whole", tmp_path / "ranks"
    more = {"dropout": 0.2, "save_every": 9, "steps": 60}
    run(config_of(data, whole, **more), way=way)
    processes = start(config_of(data, out, **more), way=way)
    wait_for(out, 3)
    processes[1].send(signal.SIGTERM)
    assert [code for code, _ in ends(processes)] == [143, 143]
    stopped = losses(out)[-1][0]
    assert load_checkpoint(out / "last.pt")["pace"]["step"] == stopped < 60
    processes = start(config_of(data, out, **more), resume=True, way=way)
    wait_for(out, stopped + 1)
    for process in processes:
        process.send(signal.SIGKILL)
    ends(processes)
    run(config_of(data, out, **more), resume=True, way=way)
    assert losses(out) == losses(whole)
    assert losses(out, "validation") == losses(whole, "validation")


@pytest.mark.slow  # two processes that meet
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_trouble_in_one_rank_is_named_and_the_checkpoint_stands(
    data: Path, tmp_path: Path, start: Start, way: str
) -> None:
    out = tmp_path / "ranks"
    (code, lost), (other, reason) = ends(start(config_of(data, out), break_at=8, way=way))
    assert code == other == 1
    assert "said: rank 1 of 2: the loss is nan at step 8, in 'train piece" in reason
    assert "the checkpoint of step 5 is kept" in reason
    assert "rank 0 of 2 ends because another one did" in lost
    assert load_checkpoint(out / "last.pt")["pace"]["step"] == 5


@pytest.mark.soak  # torchrun, and two ranks, on up to two cores: PyTorch starts three times
@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=BY_HAND)])
def test_a_killed_rank_ends_the_job_and_the_checkpoint_stands(data: Path, tmp_path: Path, way: str) -> None:
    """Killed by the system, as where memory runs out; torchrun then ends the others."""
    out = tmp_path / "ranks"
    options = ["--segment-length", "8", "--d-model", "16", "--n-heads", "2", "--batch-size", "2", "--steps", "100000"]
    schedule = ["--schedule", "uniform(layers=1, horizon=8)", "--save-minutes", "0.001", "--device", "cpu"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "dsmr", "train", "--data", str(data), "--out", str(out), "--parallel", way]
    job = subprocess.Popen(
        [sys.executable, *command, *options, *schedule], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (out / "last.pt").exists() and job.poll() is None:
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, said = job.communicate(timeout=45)
    finally:
        job.kill()
    assert job.returncode == 1, said
    assert load_checkpoint(out / "last.pt")["pace"]["step"] >= 1
    assert not (out / ".lock").exists() or quiet(config_of(data, tmp_path / "other", steps=1)).finished


def test_what_cannot_train_together_is_refused_in_a_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data, tmp_path / "run")
    with pytest.raises(UserError, match="needs processes that torchrun started: torchrun --nproc"):
        quiet(config, parallel="ddp")
    with pytest.raises(UserError, match="unknown way to train together 'mpi'"):
        quiet(config, parallel="mpi")
    with pytest.raises(UserError, match="needs processes that torchrun started: torchrun --nproc"):
        quiet(config, parallel="fsdp")
    place = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 3 processes: say how"):
        quiet(config)
    with pytest.raises(UserError, match="a batch of 4 rows cannot be dealt evenly to 3 ranks"):
        quiet(config, parallel="ddp")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="each rank takes a GPU of its own: use --device cuda or cpu, not cuda:1"):
        quiet(config_of(data, tmp_path / "run", device="cuda:1"), parallel="ddp")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun started rank 1 on this machine, but PyTorch finds 1 GPUs"):
        quiet(config_of(data, tmp_path / "run", device="cuda"), parallel="ddp")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="nccl backend, which this PyTorch was built without"):
        quiet(config_of(data, tmp_path / "run", device="cuda"), parallel="ddp")
    monkeypatch.setattr("torch.distributed.is_gloo_available", lambda: False)
    with pytest.raises(UserError, match="gloo backend, which this PyTorch was built without"):
        quiet(config, parallel="ddp")
    assert not (tmp_path / "run").exists()


def test_ranks_share_a_batch_and_every_piece_once(tmp_path: Path) -> None:
    """Rows, targets and the count of what is predicted are those of the whole, also where lengths change."""
    corpus = tiny_corpus(tmp_path, train=9)

    def shorten(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate((tokens[: int(rng.integers(2, len(tokens)))], tokens[-1:]))

    for augment in (None, shorten):
        whole = StreamLoader(corpus, "train", 6, 17, seed=1, augment=augment)
        parts = [StreamLoader(corpus, "train", 6, 17, 1, augment, TrainingRanks(rank, 3).rows(6)) for rank in range(3)]
        for _ in range(40):
            expected, found = next(whole), [next(part) for part in parts]
            for name in ("tokens", "targets", "piece_start"):
                assert torch.equal(torch.cat([getattr(batch, name) for batch in found]), getattr(expected, name))
            assert sum((batch.pieces for batch in found), ()) == expected.pieces
            assert {batch.predicted for batch in found} == {int((expected.targets >= 0).sum())}
            assert all(part.state_dict() == whole.state_dict() for part in parts)


def test_random_samples_are_those_of_the_rows_in_one_process() -> None:
    model = DSMRModel(
        DSMRConfig(28, "uniform(layers=2, horizon=8, retention=random)", d_model=8, n_heads=1, segment_length=4)
    )
    whole = TrainingRanks().new_state(model, 6, aligned=True, apart=True)
    parts = [TrainingRanks(rank, 3).new_state(model, 6, aligned=True, apart=True) for rank in range(3)]
    for layer, memory in enumerate(whole.memories):
        assert torch.equal(torch.cat([part.memories[layer].seeds for part in parts]), memory.seeds)


def test_one_process_is_a_world_of_one() -> None:
    with joined(None, 4, "cpu") as ranks:
        assert (ranks.alone, ranks.first, ranks.device) == (True, True, "cpu")
        assert ranks.rows(4) == range(4)
        assert ranks.meet(0.5) == 0.5


def test_two_processes_do_not_train_side_by_side_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(*_: object, **more: object) -> None:
        raise AssertionError("they were joined")

    monkeypatch.setattr(joining, "started", lambda: 2)
    monkeypatch.setattr(joining, "together", together)
    with pytest.raises(UserError, match="torchrun started 2 processes: say how"), joined(None, 4, "cpu"):
        pass


@pytest.mark.parametrize(
    ("parallel", "world", "kind"),
    [
        *((None, world, "TrainingRanks") for world in (0, 1)),
        *(("ddp", world, "TrainingRanks") for world in (1, 2)),
        *(("fsdp", world, kind) for world, kind in ((1, "TrainingRanks"), (2, "ShardedRanks"))),
    ],
)
def test_weights_are_cut_up_only_where_that_was_asked_for_and_there_are_ranks_to_hold_them(
    monkeypatch: pytest.MonkeyPatch, parallel: str | None, world: int, kind: str
) -> None:
    @contextlib.contextmanager
    def together(asked: type, device: str, **more):
        assert more == {"nccl": True, "patience": PATIENCE}
        yield asked.__name__, device

    monkeypatch.setattr(joining, "started", lambda: world)
    monkeypatch.setattr(joining, "together", together)
    with joined(parallel, 4, "cuda") as found:
        assert found == (kind, "cuda")
