"""A run goes on after any end, a signal, a kill, a full disk, as if it had never stopped."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import assert_same_run, losses, quiet, tiny_config
from warm_start import Forked, WarmStart

from dsmr.console.errors import UserError
from dsmr.model.transformer import DSMRModel
from dsmr.runs.checkpoint import load_checkpoint
from dsmr.training.loop import TrainConfig

CHILD = """
import json, os, signal, sys
from pathlib import Path
from dsmr.training.loop import TrainConfig, train

config, resume, die_at = json.loads(sys.argv[1]), sys.argv[2] == "resume", sys.argv[3]
if die_at:  # "last.pt:2" dies when last.pt is written for the second time, before it is put in its place
    name, count = die_at.split(":")
    replace, seen = os.replace, []
    def deadly(source, target):
        seen.append(Path(target).name)
        if seen.count(name) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = deadly
sys.exit(train(TrainConfig.from_dict(config), resume=resume).exit_code)
"""


Start = Callable[..., Forked]


@pytest.fixture
def start(warm_start: WarmStart) -> Start:
    """A run in a process of its own."""

    def begun(config: TrainConfig, resume: bool = False, die_at: str = "") -> Forked:
        return warm_start.start([json.dumps(config.to_dict()), "resume" if resume else "new", die_at], code=CHILD)

    return begun


def signal_at(process: Forked, out: Path, step: int, number: int) -> int:
    """Send a signal once `step` has been trained, and wait for the end."""
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        done = losses(out)
        if done and done[-1][0] >= step:
            os.kill(process.pid, number)
            break
        time.sleep(0.002)
    return process.wait().returncode


@pytest.mark.slow  # processes, to be killed
@pytest.mark.parametrize("augment", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, augment: bool, start: Start) -> None:
    """SIGKILL in the middle of a step; of writing the first checkpoint, a later one, and the best weights."""
    more = {"steps": 80, "save_every": 7, "eval_every": 20, "augment": augment}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    config = tiny_config(data, out, **more)
    if augment:
        assert start(config, die_at="last.pt:1").wait().returncode == -signal.SIGKILL
        assert len(losses(out)) == 7
        assert start(config, resume=True, die_at="model.safetensors:2").wait().returncode == -signal.SIGKILL
        assert 40 <= len(losses(out)) < 80
    else:
        assert signal_at(start(config), out, 24, signal.SIGKILL) == -signal.SIGKILL
        assert 24 <= len(losses(out)) < 80
        assert start(config, resume=True, die_at="last.pt:4").wait().returncode == -signal.SIGKILL
    assert quiet(config, resume=True).finished
    quiet(tiny_config(data, whole, **more))
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_saves_and_goes_on(data: Path, tmp_path: Path, start: Start) -> None:
    more = {"steps": 80, "save_every": 1000, "eval_every": 25}
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    config = tiny_config(data, out, **more)
    assert signal_at(start(config), out, 12, signal.SIGTERM) == 143
    stopped_at = load_checkpoint(out / "last.pt")["pace"]["step"]
    assert losses(out)[-1][0] == stopped_at < 80
    assert (out / "loss.png").exists()
    assert quiet(TrainConfig.of_run(out), resume=True).finished
    quiet(tiny_config(data, whole, **more))
    assert_same_run(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("during", ["train", "validation"])
def test_ctrl_c_finishes_the_step_and_saves(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """A validation that is cut short is made up for when the run goes on."""
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    forward, calls = DSMRModel.forward, []
    before = signal.getsignal(signal.SIGINT)  # a shell lets its background jobs ignore it

    def interrupted(self, *args, **kwargs):
        calls.append(self.training)
        if self.training == (during == "train") and calls.count(during == "train") == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DSMRModel, "forward", interrupted)
        result = quiet(tiny_config(data, out))
    assert (result.finished, result.signal, result.exit_code) == (False, signal.SIGINT, 130)
    assert result.step == (2 if during == "train" else 10)
    assert losses(out, "validation") == []
    assert signal.getsignal(signal.SIGINT) is before
    assert quiet(tiny_config(data, out), resume=True).finished
    quiet(tiny_config(data, whole))
    assert_same_run(out, whole)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A full disk, as far as one file can meet it: writing past `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "name"), [(12_000, r"model\.safetensors"), (40_000, r"last\.pt")])
def test_a_disk_that_fills_up_ends_in_a_sentence_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, size: int, name: str
) -> None:
    """The weights are 20 kB, the checkpoint 110 kB."""
    out = tmp_path / "run"
    quiet(tiny_config(data, out, steps=7))
    kept = (out / "last.pt").read_bytes()
    config = tiny_config(data, out, save_every=None)
    with pytest.raises(UserError, match=rf"^cannot write \S+{name}: .*too large") as caught, largest_file(size):
        quiet(config, resume=True)
    assert "\n" not in str(caught.value)
    assert (out / "last.pt").read_bytes() == kept
    assert not [file for file in out.iterdir() if file.name.startswith(".")]
    assert quiet(config, resume=True).finished
    assert [step for step, _ in losses(out)] == list(range(1, 25))


def test_a_finished_run_has_nothing_left_to_do_until_it_is_made_longer(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=6)
    quiet(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert quiet(config, resume=True).step == 6
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert quiet(dataclasses.replace(config, steps=9), resume=True).step == 9
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 10))


@pytest.mark.soak  # the compiler works for half a minute
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_killed_compiled_run_goes_on_bit_for_bit(data: Path, tmp_path: Path, start: Start) -> None:
    more = {"steps": 12, "save_every": 4, "compile": True}
    whole, out = tmp_path / "whole", tmp_path / "killed"
    config = tiny_config(data, out, **more)
    assert start(config, die_at="last.pt:2").wait().returncode == -signal.SIGKILL
    assert quiet(config, resume=True).finished
    quiet(tiny_config(data, whole, **more))
    assert_same_run(out, whole)
