"""A piece's loss is its own: whatever the batch, from the first token to EOS, and counted per note."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from several_ranks import in_threads, start_ranks
from tiny_corpus import TOKENS, tiny_corpus, tiny_piece, tiny_vocabulary
from typer.testing import CliRunner
from warm_start import WarmStart

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.console.files import write_json
from dsmr.console.ranks import Ranks
from dsmr.console.screen import Screen
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.evaluation.losses import evaluate, evaluate_run, open_run, piece_losses
from dsmr.evaluation.report import report_losses
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel
from dsmr.runs.settings import TrainConfig, run_settings


class BigramModel(torch.nn.Module):
    """Predicts from the last token alone, and checks that the calls are what a recurrent model needs."""

    def __init__(self, segment_length: int = 8) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(TOKENS), segment_length=segment_length)
        table = torch.randn(len(TOKENS), len(TOKENS), generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table)
        self.read: np.ndarray | None = None

    def new_state(self, batch: int, device=None, dtype=None, aligned=False) -> None:
        assert aligned
        self.read = np.zeros(batch, dtype=int)

    def forward(self, tokens, state, *, targets, piece_start, reduction):
        assert reduction == "none"
        assert tokens.shape[1] % self.config.segment_length == 0
        starts = piece_start[:, 0].numpy()
        assert (piece_start == piece_start[:, :1]).all()
        assert ((starts == 0) | (starts == -self.read)).all()
        self.read = tokens.shape[1] - starts
        logits = self.table[tokens].transpose(1, 2)
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, targets, reduction="none"))


def real_model(segment_length: int = 8, **more) -> DSMRModel:
    torch.manual_seed(1)
    config = DSMRConfig(
        vocab_size=len(TOKENS),
        schedule="two_scale(layers=2, long=24, short=8, n_long=1)",
        d_model=16,
        n_heads=2,
        segment_length=segment_length,
        dropout=0.1,
        **more,
    )
    return DSMRModel(config)


def by_hand(model: BigramModel, corpus: Corpus, i: int) -> np.ndarray:
    piece = torch.from_numpy(corpus.piece(i))
    logits = model.table[piece[:-1]].log_softmax(-1)
    return -logits.gather(1, piece[1:, None])[:, 0].detach().numpy()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("segments", [1, 3])
def test_every_token_after_the_first_is_measured(tmp_path: Path, batch_size: int, segments: int) -> None:
    corpus, model = tiny_corpus(tmp_path), BigramModel()
    pieces = corpus.pieces_of("train")
    losses = piece_losses(model, corpus, pieces, batch_size=batch_size, segments_per_call=segments)
    for i, loss in zip(pieces, losses, strict=True):
        np.testing.assert_allclose(loss, by_hand(model, corpus, i), rtol=1e-5)


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_losses_do_not_depend_on_the_batch(tmp_path: Path, visibility: str) -> None:
    corpus, model = tiny_corpus(tmp_path), real_model(visibility=visibility)
    one = piece_losses(model, corpus, range(10), batch_size=1)
    for batch_size, segments in ((3, 1), (4, 2), (50, 1)):
        many = piece_losses(model, corpus, range(10), batch_size=batch_size, segments_per_call=segments)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
    assert model.training
    reports = [evaluate(model, corpus, batch_size=b) for b in (1, 3)]
    assert reports[0].nats_per_note == pytest.approx(reports[1].nats_per_note, abs=1e-5)


def test_streaming_in_segments_equals_one_call(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    torch.manual_seed(0)
    model = real_model(segment_length=8).eval()
    streamed = piece_losses(model, corpus, [0, 1], batch_size=2)
    for i in (0, 1):
        piece = torch.from_numpy(corpus.piece(i))[None]
        with torch.no_grad():
            whole = model(piece[:, :-1], targets=piece[:, 1:], reduction="none").loss[0]
        np.testing.assert_allclose(streamed[i], whole.numpy(), atol=1e-5)


def test_the_report_counts_what_it_says(tmp_path: Path) -> None:
    corpus, model = tiny_corpus(tmp_path, labels=True), BigramModel()
    report = evaluate(model, corpus, "validation")
    pieces = corpus.pieces_of("validation")
    losses = [by_hand(model, corpus, i).astype(float) for i in pieces]
    nats, tokens = sum(loss.sum() for loss in losses), sum(map(len, losses))
    assert report.pieces == len(pieces)
    assert report.tokens == tokens
    assert report.notes == corpus.n_notes[pieces].sum()
    assert report.nats_per_note == pytest.approx(nats / report.notes, rel=1e-5)
    assert report.nats_per_second == pytest.approx(nats / corpus.seconds[pieces].sum(), rel=1e-5)
    assert report.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert report.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert report.tokenizer_hash == corpus.vocabulary.hash
    assert sum(row.nats for row in report.by_piece) == pytest.approx(nats, rel=1e-5)
    every_loss = np.concatenate(losses)
    every_label = np.concatenate([corpus.piece_labels(i)[1:] for i in pieces])
    assert report.by_label is not None
    assert [row.label for row in report.by_label] == ["elsewhere", "first refrain", "refrain return"]
    for k, row in enumerate(report.by_label):
        assert row.tokens == (every_label == k).sum()
        assert row.nats_per_token == pytest.approx(every_loss[every_label == k].mean(), rel=1e-5)
    shown = str(list(report.table().columns[1].cells))
    assert f"{report.nats_per_note:.4f}" in shown


def test_position_bins_are_means_with_counts(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path, train=2)
    losses = [np.arange(2500, dtype=np.float32), np.full(1000, 3.0, dtype=np.float32)]
    bins = report_losses(corpus, "train", [0, 1], losses).by_position
    assert [(b.start, b.end, b.tokens) for b in bins] == [(0, 1024, 2024), (1024, 2048, 1024), (2048, 3072, 452)]
    assert bins[0].nats_per_token == pytest.approx((np.arange(1024).sum() + 3000) / 2024)
    assert bins[2].nats_per_token == pytest.approx(np.arange(2048, 2500).mean())


def test_the_report_is_written_as_json_and_picture(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "corpus")
    report = evaluate(BigramModel(), corpus)
    assert report.by_label is None
    report.write(tmp_path / "out" / "eval.json", tmp_path / "out" / "eval.png")
    saved = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert saved["nats_per_note"] == report.nats_per_note
    assert len(saved["by_piece"]) == 3
    assert (tmp_path / "out" / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    corpus = tiny_corpus(tmp_path)
    report = evaluate(BigramModel(), corpus, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.tokens, report.tokens)
    assert seen == sorted(seen)


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path: Path) -> None:
    corpus, model = tiny_corpus(tmp_path), BigramModel()
    with pytest.raises(UserError, match="no pieces in its split 'test'"):
        evaluate(model, corpus, "test")
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, corpus, batch_size=0)
    with pytest.raises(UserError, match=r"'train piece 0\.mid' is not finite at token 2"):
        report_losses(corpus, "train", [0], [np.array([1.0, np.nan, 1.0])])
    model.config.vocab_size = 5
    with pytest.raises(UserError, match=f"knows 5 tokens, but the corpus tiny has {len(TOKENS)}"):
        evaluate(model, corpus)


def saved_run(path: Path, corpus: Corpus) -> Path:
    real_model().save_pretrained(path)
    corpus.vocabulary.save(path / "tokenizer.json")
    return path


def test_a_run_is_evaluated_from_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tiny_corpus(tmp_path / "corpus")
    run = saved_run(tmp_path / "run", corpus)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*eval-validation\.json"):
        evaluate_run(run, tmp_path / "corpus", out=tmp_path / "file" / "x")
    with monkeypatch.context() as patch:
        patch.setattr("dsmr.evaluation.losses.available", lambda: False)
        evaluate_run(run, tmp_path / "corpus", out=tmp_path / "bare", device="cpu")
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["eval-validation.json"]
    with pytest.raises(UserError, match="unknown memory dtype 'int4': use one of auto, float32, bfloat16, int8"):
        evaluate_run(run, tmp_path / "corpus", device="cpu", memory_dtype="int4")
    report = evaluate_run(run, tmp_path / "corpus", device="cpu")
    rounded = evaluate_run(run, tmp_path / "corpus", out=tmp_path / "int8", device="cpu", memory_dtype="int8")
    assert 0 < abs(rounded.nats - report.nats) < 0.01 * report.nats
    assert report.nats_per_note == pytest.approx(evaluate(real_model(), corpus).nats_per_note, abs=1e-5)
    assert json.loads((run / "eval-validation.json").read_text())["model"] == "run"
    assert (run / "eval-validation.png").exists()


def test_a_run_and_a_corpus_of_another_tokeniser_do_not_meet(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", tiny_corpus(tmp_path / "corpus"))
    tiny_corpus(tmp_path / "other", beat_res=12)
    with pytest.raises(UserError, match="was trained with tokeniser"):
        evaluate_run(run, tmp_path / "other")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        evaluate_run(tmp_path / "corpus", tmp_path / "corpus")
    with pytest.raises(UserError, match="holds no training run"):  # nor does it say which corpus it was trained on
        evaluate_run(run)


def test_another_corpus_in_the_place_of_the_runs_is_measured_only_where_it_is_named(tmp_path: Path) -> None:
    data = tmp_path / "corpus"
    corpus = tiny_corpus(data)
    run = saved_run(tmp_path / "run", corpus)
    config = TrainConfig(data=str(data), out=str(run), schedule="none(layers=2)")
    settings = run_settings(config, corpus, config.model_config(len(TOKENS)), torch.float32)
    write_json(run / "train.json", settings, sealed=True)
    own = evaluate_run(run, device="cpu")
    shutil.rmtree(data)
    other = tiny_corpus(data, seed=5)
    for measure in (evaluate_run, open_run):
        with pytest.raises(
            UserError, match=rf"on the corpus tiny .*holds tiny \({other.digest[:16]}\): .* with --data"
        ):
            measure(run, device="cpu")
    assert evaluate_run(run, data, device="cpu").nats != own.nats


def test_no_figure_is_cut_on_a_narrow_terminal(tmp_path: Path) -> None:
    """A loss that ends in dots says another number."""
    report = evaluate(BigramModel(), tiny_corpus(tmp_path, labels=True), name="a-run-of-a-long-name")
    report = dataclasses.replace(report, nats_per_note=27.4123, tokens=12_345_678)
    file = StringIO()
    Screen(file=file, width=20).print(report.table())
    said = file.getvalue()
    for figure in (
        "27.4123",
        f"{report.perplexity:.3f}",
        "12,345,678",
        *(f"{x.nats_per_token:.4f}" for x in report.by_label),
    ):
        assert f" {figure} " in said
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 20


@pytest.mark.parametrize("world", [2, 3, 12])
def test_ranks_share_the_pieces_and_all_know_every_loss(tmp_path: Path, world: int) -> None:
    """Also where some have none."""
    corpus, model = tiny_corpus(tmp_path), real_model().eval()
    expected = piece_losses(model, corpus, range(10), batch_size=2)
    told: list[int] = []

    def work(ranks: Ranks) -> list[np.ndarray]:
        how = {"batch_size": 2, "progress": lambda done, total: told.append(total), "ranks": ranks}
        return piece_losses(model, corpus, range(10), **how)

    for found in in_threads(world, work):
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    lengths = sorted((len(loss) for loss in expected), reverse=True)
    assert set(told) == {sum(lengths[rank::world]) for rank in range(world)} - {0}


def test_ranks_that_find_different_runs_say_so(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "corpus")
    runs = [saved_run(tmp_path / f"run-{rank}", corpus) for rank in range(2)]
    other = DSMRModel.from_pretrained(runs[1])
    other.norm.weight.data[0] += 1e-6
    other.save_pretrained(runs[1])

    def work(ranks: Ranks) -> str:
        with pytest.raises(UserError) as error:
            evaluate_run(runs[ranks.rank], tmp_path / "corpus", device="cpu", ranks=ranks)
        return str(error.value)

    for said in in_threads(2, work):
        assert "the ranks were not asked for the same: the sum of all weights is" in said


@pytest.mark.slow  # two processes that meet
def test_processes_find_what_one_finds(tmp_path: Path, warm_start: WarmStart) -> None:
    """The whole program, every measurement; only the first one speaks and writes."""
    lengths = (40, 26, 33, 19, 21, 30)
    records = [PieceRecord(tiny_piece(n, n), "validation", f"{n}.mid", n, n / 4) for n in lengths]
    records += [PieceRecord(tiny_piece(20, 1), "train", "1.mid", 20, 5.0)]
    corpus = write_corpus(tmp_path / "corpus", records, tiny_vocabulary(), "uneven")
    run, alone, together = saved_run(tmp_path / "run", corpus), tmp_path / "alone", tmp_path / "together"
    options = ["--data", str(tmp_path / "corpus"), "--device", "cpu", "--batch-size", "2", "--baseline", "trigram"]
    options += ["--krcu", "--reset", "48", "--bin", "16", "--bins", "3", "--retain", "16"]
    command = ["eval", str(run), *options]
    said = CliRunner().invoke(app, [*command, "--out", str(alone)])
    assert said.exit_code == 0, said.output
    processes = start_ranks(warm_start, [*command, "--out", str(together)])
    ended = [process.wait() for process in processes]
    assert [process.returncode for process in ended] == [0, 0], ended
    assert ended[0].stdout == said.stdout
    assert (ended[1].stdout, ended[1].stderr) == ("", "")
    assert {file.name for file in together.iterdir()} == {file.name for file in alone.iterdir()}
    for file in ("eval-validation.json", "memory-validation.json"):
        ours, theirs = (dict(numbers(json.loads((out / file).read_text()))) for out in (together, alone))
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value, with where it stands."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(entry, f"{name}/{key}")
    elif isinstance(value, int | float):
        yield name, value
