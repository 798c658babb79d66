"""At planted returns: a copier saves what lies within its horizon, and the figures are those of the returns alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from copier import copier
from tiny_corpus import tiny_vocabulary
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.corpus.returns import Planter
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.evaluation.returns import LEAD, ReturnLoss, ReturnsReport, octaves, return_losses


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng = np.random.default_rng(0)
    records = []
    for number in range(6):
        notes = 700
        body = [rng.integers(low, high, notes) for low, high in ((3, 16), (16, 20), (20, 24), (24, 28))]
        tokens = np.stack(body, 1).flatten()[:-1].astype(np.uint16)
        records.append(PieceRecord(tokens, "validation", str(number), notes, 100.0))
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", records, tiny_vocabulary(), "fresh notes")


def test_what_is_saved_ends_at_the_horizon(corpus: Corpus) -> None:
    planter = Planter(corpus.vocabulary, seconds=(3.0, 4.0), distance=(64, 1024), kinds=("exact", "transposed"))
    report = return_losses(copier([256], 0, heard=6), corpus, "validation", planter, segments_per_call=8)
    assert [(row.start, row.end) for row in report.by_distance] == [(64, 128), (128, 256), (256, 512), (512, 1025)]
    near, middle, far, farthest = report.by_distance
    assert min(row.returns for row in report.by_distance) > 2
    exact, transposed = report.by_kind
    assert exact.returns + transposed.returns == report.returns
    assert exact.saved > transposed.saved + 0.5  # it copies tokens, so what is transposed it does not know
    assert min(near.saved, middle.saved) > 4
    assert max(abs(far.saved), abs(farthest.saved)) < 0.6
    for row in report.by_distance:
        assert row.saved == pytest.approx(row.first - row.nats_per_token)
        assert row.error > 0
    blind = return_losses(copier([0], 0, heard=6), corpus, "validation", planter, segments_per_call=8)
    assert blind.returns == report.returns
    assert max(abs(row.saved) for row in blind.by_distance) < 0.3


def test_octaves_cover_all_distances_once() -> None:
    assert octaves(1000, 16000) == [1000, 2000, 4000, 8000, 16001]
    assert octaves(500, 10000) == [500, 1000, 2000, 4000, 10001]
    assert octaves(10, 10) == [10, 11]
    assert octaves(10, 19) == [10, 20]
    assert LEAD > 0


def test_the_table_names_the_distances_that_were_measured() -> None:
    """A bin ends before the next begins; one return has no error; where there is none nothing was measured."""
    bins = (
        ReturnLoss("all", 4000, 8000, 0, 0, 0.0, 0.0, 0.0, 0.0),
        ReturnLoss("all", 8000, 12000, 1, 30, 2.0, 2.5, 0.5, 0.0),
        ReturnLoss("all", 12000, 16001, 2, 60, 2.0, 2.25, 0.25, 0.125),
    )
    kinds = (ReturnLoss("stretched", 4000, 16000, 0, 0, 0.0, 0.0, 0.0, 0.0),)
    table = ReturnsReport("model", "corpus", "test", 0, "", 1, 3, bins, kinds).table()
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("4,000 to 7,999 tokens back", "none there", "", "", ""),
        ("8,000 to 11,999 tokens back", "1", "2.000", "2.500", "0.500"),
        ("12,000 to 16,000 tokens back", "2", "2.000", "2.250", "0.250 ± 0.125"),
        ("stretched", "none there", "", "", ""),
    ]


@pytest.mark.slow
def test_eval_and_train_know_returns(tmp_path: Path) -> None:
    """Slow for its passages of 5 seconds and more: a small model over pieces of three minutes."""
    rng = np.random.default_rng(1)
    words = tiny_vocabulary()
    records = []
    for number in range(3):
        tokens = np.stack([rng.integers(3, 16, 900), *np.full((3, 900), [[16], [20], [26]])], 1).flatten()[:-1]
        split = ("train", "train", "validation")[number]
        records.append(PieceRecord(tokens.astype(np.uint16), split, str(number), 900, 180.0))
    write_corpus(tmp_path / "corpus", records, words, "long")
    run, folder = str(tmp_path / "run"), str(tmp_path / "corpus")
    arguments = ["--schedule", "none(layers=1)", "--d-model", "16", "--n-heads", "2", "--segment-length", "64"]
    returns = ["--returns", "0.3", "--returns-nearest", "200", "--returns-farthest", "900", "--steps", "3"]
    trained = CliRunner().invoke(app, ["train", "--data", folder, "--out", run, *arguments, *returns])
    assert trained.exit_code == 0, trained.stderr
    settings = json.loads((tmp_path / "run" / "train.json").read_text())["train"]
    assert (settings["returns"], settings["returns_farthest"]) == (0.3, 900)
    resumed = CliRunner().invoke(app, ["train", "--resume", "--out", run, "--returns", "0.2", "--steps", "5"])
    assert resumed.exit_code == 1
    assert "its returns is 0.3, but 0.2 was asked for" in resumed.stderr
    result = CliRunner().invoke(app, ["eval", run, "--returns"])
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "returns-validation.json").read_text())
    assert found["returns"] > 0
    assert "planted returns" in result.stdout
    assert (tmp_path / "run" / "returns-validation.png").stat().st_size > 100
