"""KRCU and Retain-k see what is there: nothing without a memory, else as far as horizons reach and no further."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from copier import copier
from made_up import ROUNDING, SEGMENT, Pieces, model_with, random_pieces
from tiny_corpus import tiny_corpus
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.evaluation.losses import piece_losses
from dsmr.evaluation.memory_use import Bins, MemoryUse, keeping_only, memory_use, parse_tokens
from dsmr.model.transformer import DSMRModel


def measured(model: DSMRModel, pieces: Pieces, bins: Bins | None = None, **more) -> MemoryUse:
    which = range(len(pieces.pieces))
    return memory_use(
        model, pieces, "validation", which, piece_losses(model, pieces, which, batch_size=3), bins=bins, **more
    )


@pytest.mark.parametrize("settings", [{}, {"position": "sinusoidal"}, {"position": "alibi"}, {"recall": 3}])
def test_a_model_without_memory_scores_nothing(settings: dict) -> None:
    found = measured(
        model_with("none(layers=2)", **settings), random_pieces(90, 70, 31, 20), Bins(24, 8, 5), retain=[8, 16]
    )
    assert found.krcu is not None
    assert (found.krcu.pieces, found.krcu.too_short, found.krcu.reached) == (3, 1, 5)
    assert [b.pieces for b in found.krcu.bins] == [3, 2, 2, 2, 2]
    for bin in found.krcu.bins:
        assert abs(bin.delta.mean) < ROUNDING
    for value in (found.krcu.auc, found.krcu.reset_bin, found.krcu.tail):
        assert max(abs(value.mean), abs(value.low), abs(value.high)) < ROUNDING
    for kept in found.retain:
        assert kept.delta.mean == kept.beyond.mean == 0


@pytest.mark.parametrize("horizons", [[16], [16, 0], [16, 8], [0, 16, 16], [8, 16, 24]])
@pytest.mark.parametrize("position", ["rope", "sinusoidal"])
def test_a_reset_is_felt_as_far_as_the_horizons_reach_together(horizons: list[int], position: str) -> None:
    """Layer by layer a token sees its segment's past `horizon` tokens, so a reset is felt for their sum, no longer."""
    found = measured(
        model_with(f"explicit(horizons={horizons})", position=position), random_pieces(150, 140), Bins(64, SEGMENT, 9)
    )
    assert found.krcu is not None
    for bin in found.krcu.bins:
        if bin.start < 64 + sum(horizons):
            assert abs(bin.delta.mean) > 10 * ROUNDING
        else:
            assert abs(bin.delta.mean) < ROUNDING


RESET, PASSAGE = 128, 16


def with_a_return(distance: int, seed: int) -> np.ndarray:
    """A piece of fresh tokens, save that at the reset what was `distance` tokens earlier returns."""
    (piece,) = random_pieces(220, seed=seed).pieces
    piece[RESET : RESET + PASSAGE] = piece[RESET - distance : RESET - distance + PASSAGE]
    return piece


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("horizon", [0, 64, 112])
def test_a_horizon_sees_returns_nearer_than_itself_and_none_beyond(horizon: int, layer: int) -> None:
    horizons = [0, 0]
    horizons[layer] = horizon
    model = copier(horizons, layer)
    for distance in (40, 56, 80, 96):
        pieces = Pieces([with_a_return(distance, seed) for seed in range(4)])
        found = measured(model, pieces, Bins(RESET, PASSAGE, 5), retain=[32, 72])
        assert found.krcu is not None
        at_return = found.krcu.reset_bin.mean
        # A few nats where all is forgotten; a little where a copier with nothing to copy finds what is only alike.
        assert at_return > 5 if distance < horizon else abs(at_return) < 0.5
        assert abs(found.krcu.tail.mean) < 0.2
        of_return = found.krcu.bins[0].delta
        assert of_return.low <= of_return.mean <= of_return.high
        for kept in found.retain:
            lost = kept.delta.mean * 219 / PASSAGE  # all of it is lost at the return
            assert lost > 5 if kept.k < distance < horizon else abs(lost) < 2


def test_forgetting_is_reading_on_with_nothing_behind(tmp_path: Path) -> None:
    """By hand: with rotary positions, which only tell distances, the tokens from the reset on are a piece of their
    own."""
    pieces = random_pieces(61, 40, 25)
    model = model_with("two_scale(layers=2, long=24, short=8, n_long=1)")
    losses = piece_losses(model, pieces, range(3), begin=24, batch_size=2)
    assert [len(loss) for loss in losses] == [36, 15, 0]
    alone = piece_losses(model, Pieces([piece[24:] for piece in pieces.pieces]), range(2))
    for late, own in zip(losses, alone, strict=False):
        np.testing.assert_allclose(late, own, atol=1e-5)
    many = piece_losses(model, pieces, range(3), begin=24, batch_size=1, segments_per_call=3)
    for one, other in zip(losses, many, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_keeping_the_last_k_is_a_model_of_shorter_horizons() -> None:
    pieces = random_pieces(120, 90)
    model = model_with("two_scale(layers=2, long=32, short=8, n_long=1)")
    found = measured(model, pieces, retain=[16, 32, 64])
    cut = keeping_only(model, 16)
    assert cut.config.schedule.horizons == (16, 8)
    before, after = (np.concatenate(piece_losses(m, pieces, range(2))) for m in (model, cut))
    assert found.retain[0].delta.mean == pytest.approx(float((after - before).mean()), abs=1e-6)
    assert found.retain[0].tokens_beyond == 119 + 89 - 32
    assert abs(found.retain[0].beyond.mean) > abs(found.retain[0].delta.mean)
    assert [kept.delta.mean for kept in found.retain[1:]] == [0, 0]
    assert found.krcu is None


def test_the_means_are_what_they_say() -> None:
    from dsmr.evaluation.memory_use import _krcu

    deltas = [np.array([4.0, 4, 1, 1, 2, 2]), np.array([2.0, 2, 3])]
    found = _krcu(Bins(10, 2, 4), deltas, too_short=5)
    assert [b.delta.mean for b in found.bins[:3]] == pytest.approx([3, 5 / 3, 2])
    assert math.isnan(found.bins[3].delta.mean)
    assert (found.reached, found.pieces, found.too_short) == (3, 2, 5)
    assert found.auc.mean == pytest.approx((3 + 5 / 3 + 2) / 3)
    assert found.reset_bin.mean == pytest.approx(3)
    assert found.tail.mean == pytest.approx((5 / 3 + 2) / 2)
    assert found.reset_bin.low == 2
    assert found.reset_bin.high == 4


def test_what_was_not_measured_is_no_number_in_the_table() -> None:
    found = measured(model_with("uniform(layers=1, horizon=8)"), random_pieces(30, 20), Bins(8, 64, 2))
    name, mean, interval = (list(column.cells) for column in found.table().columns)
    assert (name[2], mean[2], interval[2]) == ("tail, the bins after it", "none there", "")
    assert "nan" not in f"{mean}{interval}"
    assert float(str(mean[0])) == pytest.approx(float(str(mean[1])))


def test_what_cannot_be_measured_is_a_sentence() -> None:
    model, pieces = model_with("none(layers=1)"), random_pieces(30, 20)
    with pytest.raises(UserError, match="all 2 pieces of made up, split 'validation', are too short for a reset at"):
        measured(model, pieces, Bins(32))
    with pytest.raises(UserError, match="in the middle of a segment of 8 tokens: choose a multiple, such as 16"):
        measured(model, pieces, Bins(18))
    with pytest.raises(UserError, match="the width of KRCU must be at least 1"):
        Bins(8, 0)
    with pytest.raises(ValueError, match="multiple of the segment"):
        piece_losses(model, pieces, [0], begin=3)
    assert parse_tokens("1k, 4k,512") == (1024, 4096, 512)
    for text in ("1m", "0", "", "k"):
        with pytest.raises(UserError, match="tokens"):
            parse_tokens(text)


def test_eval_measures_what_a_run_remembers(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "corpus", validation=6)
    model_with("two_scale(layers=2, long=24, short=8, n_long=1)").save_pretrained(tmp_path / "run")
    corpus.vocabulary.save(tmp_path / "run" / "tokenizer.json")
    arguments = ["eval", tmp_path / "run", "--data", tmp_path / "corpus", "--krcu", "--reset", "16", "--bin", "8"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--bins", "3", "--retain", "8,1k"])
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "run" / "memory-validation.json").read_text())
    assert found["krcu"]["pieces"] + found["krcu"]["too_short"] == 6
    assert [kept["k"] for kept in found["retain"]] == [8, 1024]
    assert found["tokenizer_hash"] == corpus.vocabulary.hash
    for name in ("memory-validation.png", "eval-validation.json", "eval-validation.png"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert "KRCU-AUC" in result.stdout
    too_long = CliRunner().invoke(app, [*map(str, arguments[:4]), "--krcu"])
    assert too_long.exit_code == 1
    assert "too short for a reset at token 8,192" in too_long.stderr
