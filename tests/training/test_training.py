"""Training learns, writes what it promises, and refuses in a sentence what cannot be trained."""

import dataclasses
import math
import os
import re
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_corpus import tiny_corpus
from tiny_run import losses, quiet, tiny_config

from dsmr.console.devices import resolve_device, resolve_dtype
from dsmr.console.errors import UserError
from dsmr.console.files import read_json
from dsmr.console.locks import alone_in
from dsmr.evaluation.losses import evaluate, evaluate_run
from dsmr.model.transformer import DSMRModel
from dsmr.runs.checkpoint import RunDirectory, load_checkpoint
from dsmr.training.loop import train


@pytest.mark.slow
def test_a_run_learns_and_leaves_everything_behind(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    log = StringIO()
    result = train(tiny_config(data, out, steps=80, eval_every=40, dropout=0.0), console=Console(file=log))
    assert result.finished
    assert (result.exit_code, result.step, result.tokens) == (0, 80, 80 * 48)
    steps = losses(out)
    assert [step for step, _ in steps] == list(range(1, 81))
    assert steps[0][1] > 2.5
    assert sum(loss for _, loss in steps[-10:]) / 10 < 0.7 * steps[0][1]
    assert [step for step, _ in losses(out, "validation")] == [40, 80]
    names = {"config.json", "model.safetensors", "tokenizer.json", "last.pt", "train.json", "metrics.jsonl", "loss.png"}
    assert {file.name for file in out.iterdir()} == names
    report = evaluate_run(out, device="cpu")
    assert result.best == pytest.approx(report.nats_per_note, abs=1e-4)
    text = log.getvalue()
    for part in ("memory", "tokens/s", "left", "nats a note", "finished at step 80"):
        assert part in text


def test_the_best_weights_are_kept_apart_from_the_last(data: Path, tmp_path: Path) -> None:
    """After the rate is raised far too high, the validation loss rises and the best weights stay."""
    out = tmp_path / "run"
    first = quiet(tiny_config(data, out, steps=20, eval_every=10, dropout=0.0))
    worse = quiet(tiny_config(data, out, steps=40, eval_every=10, dropout=0.0, lr=3.0, warmup=0), resume=True)
    assert worse.best == first.best
    assert worse.best_step is not None
    assert worse.best_step <= 20
    last = load_checkpoint(out / "last.pt")
    best = DSMRModel.from_pretrained(out)
    assert any(not torch.equal(weight, last["model"][name]) for name, weight in best.state_dict().items())


def test_a_run_directory_is_not_overwritten_unasked(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2)
    quiet(config)
    with pytest.raises(UserError, match="already holds a training run"):
        quiet(config)
    assert quiet(config, overwrite=True).step == 2
    assert len(losses(tmp_path / "run")) == 2
    with pytest.raises(UserError, match="holds no training run"):
        quiet(tiny_config(data, tmp_path / "nothing"), resume=True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_corpus_is_never_trained_into(data: Path, tmp_path: Path, finished: bool) -> None:
    """Its tokenizer.json was replaced by the run's, and the corpus was damaged; nor may a run that is there go on."""
    corpus = tiny_corpus(tmp_path / "out", beat_res=12)
    if not finished:
        corpus.path.joinpath("manifest.json").unlink()
    before = {file.name: file.read_bytes() for file in corpus.path.iterdir()}
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"out holds a prepared corpus \(.*\), which training would damage"):
            quiet(tiny_config(data, tmp_path / "out"), **options)
    assert {file.name: file.read_bytes() for file in corpus.path.iterdir()} == before
    quiet(tiny_config(data, tmp_path / "run", steps=2))
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a prepared corpus \(manifest\.json\)"):
        quiet(tiny_config(data, tmp_path / "run", steps=4), resume=True)


@pytest.mark.parametrize(
    "names", [("config.json", "model.safetensors", "tokenizer.json"), ("export.json", "model.onnx", "tokenizer.json")]
)
def test_a_model_of_other_origin_is_not_replaced(data: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "model").mkdir()
    for name in names:
        (tmp_path / "model" / name).write_text("mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"holds files that training would replace .*, but no training run: choose"):
            quiet(tiny_config(data, tmp_path / "model"), **options)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == sorted(names)
    assert {file.read_text() for file in (tmp_path / "model").iterdir()} == {"mine"}


def test_an_overwriting_that_was_killed_can_be_begun_again(data: Path, tmp_path: Path) -> None:
    """Killed while it deleted the former run, whose metrics go last."""
    config = tiny_config(data, tmp_path / "run", steps=2)
    quiet(config)
    for file in RunDirectory(config.out).files[:-1]:
        file.unlink()
        if not RunDirectory(config.out).holds_run:
            with pytest.raises(UserError, match="but no training run: overwrite it, or choose another --out"):
                quiet(config)
    assert quiet(config, overwrite=True).step == 2


def test_a_run_that_is_past_its_steps_says_so(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=6)
    quiet(config)
    for steps in (6, 4):
        log = StringIO()
        result = train(dataclasses.replace(config, steps=steps), resume=True, console=Console(file=log, width=400))
        assert (result.finished, result.exit_code, result.step) == (True, 0, 6)
        assert log.getvalue() == f"already at step 6 of {steps} asked for: nothing to train; {tmp_path / 'run'}\n"
    assert quiet(dataclasses.replace(config, steps=8), resume=True).step == 8
    log = StringIO()
    train(dataclasses.replace(config, steps=None, minutes=1e-6), resume=True, console=Console(file=log, width=400))
    assert re.match(r"already at step 8, after 0:\d\d of 1e-06 minutes asked for: nothing to train", log.getvalue())


def test_a_run_is_not_resumed_with_what_it_does_not_fit(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", steps=2)
    quiet(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    tiny_corpus(tmp_path / "songs", seed=5)
    tiny_corpus(tmp_path / "retokenised", beat_res=12)
    for change, sentence in (
        ({"data": str(tmp_path / "songs")}, "trained on the corpus"),
        ({"data": str(tmp_path / "retokenised")}, "trained with tokeniser"),
        ({"d_model": 32}, "its d_model is 16, but 32"),
        ({"schedule": "two_scale(layers=2, long=16, short=8, n_long=1)"}, "its schedule is"),
        ({"dtype": "bfloat16"}, "its dtype is float32"),
        ({"seed": 1}, "its seed is 0, but 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            quiet(dataclasses.replace(config, **change), resume=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_a_loss_that_is_not_finite_names_the_step_and_the_pieces(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data, tmp_path / "run", batch_size=2)
    forward, calls = DSMRModel.forward, []

    def broken(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(self.training)
        if sum(calls) == 8:
            output.logits[1] = math.nan
            output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(DSMRModel, "forward", broken)
    with pytest.raises(UserError, match=r"loss is nan at step 8, in 'train piece \d\.mid'") as caught:
        quiet(config)
    assert "checkpoint of step 5 is kept" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["pace"]["step"] == 5


def test_two_trainings_do_not_share_a_directory(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with alone_in(out, "a training is running"):
        for options in ({}, {"overwrite": True}):
            with pytest.raises(UserError, match=rf"a training is running in {out} \(process {os.getpid()}\)"):
                quiet(tiny_config(data, out), **options)
        assert [path.name for path in out.iterdir()] == [".lock"]


def test_bad_settings_are_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for change, sentence in (
        ({"batch_size": 0}, "batch_size must be at least 1, but it is 0"),
        ({"lr": -1.0}, "lr must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"seed": 2**63}, "seed must be below"),
        ({"curriculum": 1.5}, "curriculum must be at least 0 and at most 1"),
        ({"rope_base": 0.0}, "rope_base must be above 0"),
        ({"init_std": -1.0}, "init_std must not be negative"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"schedule": "two_scales(layers=2)"}, "two_scales"),
        ({"schedule": "uniform(layers=2, horizon=-8)"}, "-8"),
        ({"n_heads": 3}, "3"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"data": str(tmp_path / "nothing")}, "nothing"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            quiet(tiny_config(data, out, **change))
        assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused_in_a_sentence(data: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        quiet(tiny_config(data, tmp_path / "run"))


def test_an_output_that_is_a_file_is_refused_in_a_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(UserError, match="run"):
        quiet(tiny_config(data, tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "not a folder"


def test_layers_computed_again_give_the_same_losses(data: Path, tmp_path: Path) -> None:
    for name, again in (("kept", False), ("again", True)):
        quiet(tiny_config(data, tmp_path / name, steps=4, checkpoint_layers=again))
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    quiet(tiny_config(data, tmp_path / "again", steps=6), resume=True)  # either way goes on with the other


def test_compiling_without_a_compiler_is_refused_in_a_sentence(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler: 'no-such-compiler' is not installed.*without --compile"):
        quiet(tiny_config(data, tmp_path / "run", compile=True, device="cpu"))
    assert not (tmp_path / "run" / "train.json").exists()


def test_only_matrices_decay(data: Path, tmp_path: Path) -> None:
    quiet(tiny_config(data, tmp_path / "run", steps=1, weight_decay=0.3))
    groups = load_checkpoint(tmp_path / "run" / "last.pt")["optimizer"]["param_groups"]
    shapes = [p.dim() for p in DSMRModel.from_pretrained(tmp_path / "run").parameters()]
    assert {group["weight_decay"]: len(group["params"]) for group in groups} == {
        0.3: sum(d >= 2 for d in shapes),
        0.0: sum(d < 2 for d in shapes),
    }


@pytest.mark.slow
def test_the_run_ends_at_the_first_of_its_limits(data: Path, tmp_path: Path) -> None:
    result = quiet(tiny_config(data, tmp_path / "run", steps=None, minutes=0.02, eval_every=None))
    assert result.finished
    assert 1.2 <= result.seconds < 10
    assert losses(tmp_path / "run", "validation")[-1][0] == result.step


def test_a_curriculum_begins_without_memory_and_grows_into_it(data: Path, tmp_path: Path) -> None:
    one = {"batch_size": 1, "segments_per_step": 1, "steps": 6, "dropout": 0.0}  # one row, from its piece's first token
    quiet(tiny_config(data, tmp_path / "grows", curriculum=1.0, **one))  # cut after 8, 8, 16, 16, 32, 32 tokens
    quiet(tiny_config(data, tmp_path / "none", schedule="none(layers=2)", **one))
    quiet(tiny_config(data, tmp_path / "all", **one))
    grows, none, whole = (losses(tmp_path / name) for name in ("grows", "none", "all"))
    assert grows[:3] == none[:3]  # the third step begins at token 16
    assert none[1] != whole[1]
    assert grows[3] != none[3]


@pytest.mark.slow
def test_a_longer_run_is_validated_on_the_way(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", eval_every=None, steps=10)
    quiet(config)
    quiet(dataclasses.replace(config, steps=60), resume=True)
    steps = [step for step, _ in losses(tmp_path / "run", "validation")]
    assert steps[0] == 10
    assert len(steps) >= 3
    assert steps[-1] == 60


def test_a_corpus_without_validation_keeps_the_latest_weights(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "corpus", validation=0)
    result = quiet(tiny_config(tmp_path / "corpus", tmp_path / "run", steps=7))
    assert result.finished
    assert result.best is None
    last = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    for name, weight in DSMRModel.from_pretrained(tmp_path / "run").state_dict().items():
        assert torch.equal(weight, last[name])


@pytest.mark.slow
def test_bfloat16_trains_with_a_bfloat16_memory(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", dtype="bfloat16", steps=30, dropout=0.0)
    quiet(config)
    full = tiny_config(data, tmp_path / "full", steps=30, dropout=0.0)
    quiet(full)
    assert losses(tmp_path / "run")[-1][1] == pytest.approx(losses(tmp_path / "full")[-1][1], abs=0.1)
    tensors = [t for t in _tensors(load_checkpoint(tmp_path / "run" / "last.pt")["state"]) if t.is_floating_point()]
    assert tensors
    assert all(t.dtype == torch.bfloat16 for t in tensors)
    assert read_json(tmp_path / "run" / "train.json")["dtype"] == "bfloat16"


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for inner in values for tensor in _tensors(inner)]


def test_training_state_equals_evaluation_from_fresh_memory(data: Path, tmp_path: Path) -> None:
    """The validation line in the metrics is what `evaluate` finds with the saved weights."""
    from dsmr.corpus.store import Corpus

    quiet(tiny_config(data, tmp_path / "run", steps=10))
    corpus = Corpus.open(data)
    report = evaluate(DSMRModel.from_pretrained(tmp_path / "run"), corpus)
    assert losses(tmp_path / "run", "validation") == [(10, pytest.approx(report.nats_per_token, abs=1e-5))]


def test_devices_and_dtypes_resolve() -> None:
    cpu = resolve_device("cpu")
    assert resolve_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU"):
            resolve_device("cuda")
