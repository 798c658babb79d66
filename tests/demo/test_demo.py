"""The demo, in a version of seconds: everything is made, and the table agrees with the reports."""

import json

import numpy as np
import pytest

from dsmr.console.errors import UserError
from dsmr.demo.figures import refrains, smoothed
from dsmr.demo.run import WITH, WITHOUT, DemoSize, run_demo, training_configs
from dsmr.training.side_by_side import last_record, train_side_by_side

pytest.importorskip("miditok")

TINY = DemoSize(
    pieces=6, piece_minutes=1.0, layers=2, n_long=1, long=512, short=64, d_model=32, n_heads=2,
    segment_length=128, prompt_seconds=5.0, seconds=3.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from rich.console import Console

    folder = tmp_path_factory.mktemp("demo") / "out"
    with open(folder.parent / "said.txt", "w", encoding="utf-8") as file:
        result = run_demo(folder, minutes=0.1, size=TINY, console=Console(file=file, width=120))
    return folder, result, (folder.parent / "said.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_demo_writes_what_it_promises(demo):
    folder, result, said = demo
    for name in ("comparison.png", "prompt.mid", "continued.mid", "continued-continuation.mid", "continued.png"):
        assert (folder / name).stat().st_size > 40
    assert set(json.loads((folder / "results.json").read_text())["models"]) == {WITH, WITHOUT}
    assert "refrain return" in (folder / "summary.md").read_text()
    assert "memory saves" in said
    assert set(result.seconds) == {"compose", "train", "evaluate", "continue and draw"}


@pytest.mark.slow
def test_the_two_models_differ_in_their_memory_only(demo):
    _, result, _ = demo
    with_memory, without = result.models[WITH], result.models[WITHOUT]
    assert with_memory.parameters == without.parameters
    assert with_memory.memory_bytes == 2 * 4 * 32 * (512 + 64)
    assert without.memory_bytes == 0
    assert min(with_memory.trained_tokens, without.trained_tokens) > 0


def test_the_table_says_what_the_evaluations_found(demo):
    folder, result, _ = demo
    for name, model in result.models.items():
        report = json.loads((folder / "runs" / name.replace(" ", "-") / "eval-validation.json").read_text())
        assert model.nats_per_note == pytest.approx(report["nats_per_note"])
        assert model.by_label == {loss["label"]: pytest.approx(loss["nats_per_token"]) for loss in report["by_label"]}
    assert set(result.advantage) == {"elsewhere", "first refrain", "refrain return"}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        run_demo(tmp_path, minutes=0.1, size=TINY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.soak
def test_training_that_fails_is_a_sentence(tmp_path):
    from rich.console import Console

    # No corpus was composed here, so both workers fail at once.
    with pytest.raises(UserError, match=r"training the model with .* failed: .*corpus"):
        train_side_by_side(
            training_configs(tmp_path / "demo", tmp_path / "corpus", TINY, 0, 5.0), 5.0, Console(quiet=True)
        )


def test_etudes_repeat_fragments_and_leave_validation_alone(demo):
    from dsmr.corpus.store import Corpus

    folder, _, _ = demo
    plain, corpus = Corpus.open(folder / "corpus" / "pieces"), Corpus.open(folder / "corpus" / "with-etudes")
    etudes = [i for i in range(corpus.n_pieces) if corpus.source[i].startswith("etude")]
    assert {str(corpus.split[i]) for i in etudes} == {"train"}
    share = sum(len(corpus.piece(i)) for i in etudes) / sum(len(corpus.piece(i)) for i in corpus.pieces_of("train"))
    assert share == pytest.approx(0.5, abs=0.1)
    for i in etudes[:5]:
        tokens = corpus.piece(i)[1:-1]
        period = next(p for p in range(1, len(tokens)) if (tokens[p:] == tokens[:-p]).all())
        assert period <= len(tokens) / 2
    for ours, theirs in zip(corpus.pieces_of("validation"), plain.pieces_of("validation"), strict=True):
        assert (corpus.piece(ours) == plain.piece(theirs)).all()


def test_stretches_and_running_means_of_a_piece():
    labels = np.array([1, 1, 0, 0, 2, 2, 2])
    clock = np.arange(7.0)
    found = refrains(labels, clock)
    assert [(stretch.start, stretch.end, stretch.returns) for stretch in found] == [(0, 1, False), (4, 6, True)]
    losses = np.array([1.0, 1, 4, 4, 2, 2, 2])
    np.testing.assert_allclose(smoothed(clock, losses, np.array([0.0, 2.5, 6.0]), window=1.0), [1, 4, 2])
    assert np.isnan(smoothed(clock, losses, np.array([100.0]))).all()


def test_the_last_record_of_an_unfinished_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_record(path, "train") is None
    first = {"kind": "train", "step": 1, "loss": 2.5}
    path.write_text(
        f'{json.dumps(first)}\n{{"kind": "train", "step": 2}}\n{{"kind": "validation", "step": 1}}\n{{"kind": "tra'
    )
    assert last_record(path, "train") == first  # the last one that says all
