"""What is measured of a model whose layers keep other than the newest tokens does not depend on batch and calls."""

import numpy as np
import pytest
import torch
from made_up import ROUNDING, SEGMENT, model_with, random_pieces

from dsmr.evaluation.losses import piece_losses
from dsmr.evaluation.memory_use import Bins, keeping_only, memory_use
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

schedules = pytest.mark.parametrize(
    "schedule",
    [f"two_scale(layers=2, long=20, short=6, n_long=1, retention={name})" for name in ("uniform", "random")],
    ids=["uniform", "random"],
)


@schedules
def test_losses_do_not_depend_on_batch_and_calls(schedule: str) -> None:
    model, pieces = model_with(schedule, recall=2), random_pieces(130, 47, 90, 9, 61)
    expected = piece_losses(model, pieces, range(5), batch_size=1)
    for batch, segments in ((1, 4), (3, 1), (2, 100)):
        found = piece_losses(model, pieces, range(5), batch_size=batch, segments_per_call=segments)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=ROUNDING)
    piece = torch.from_numpy(pieces.piece(0))[None]
    with torch.no_grad():
        whole = model(piece[:, :-1], targets=piece[:, 1:], reduction="none").loss
    np.testing.assert_allclose(expected[0], whole[0], atol=ROUNDING)


@schedules
def test_forgetting_is_reading_on_with_nothing_behind(schedule: str) -> None:
    """Without positions, what is read after a reset is what a piece of its own would be."""
    model, pieces = model_with(schedule, position="none"), random_pieces(150, 120)
    rest = random_pieces()
    rest.pieces = [piece[40:] for piece in pieces.pieces]
    found = piece_losses(model, pieces, range(2), begin=40, segments_per_call=2)
    for mine, theirs in zip(found, piece_losses(model, rest, range(2)), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=ROUNDING)


@schedules
def test_krcu_and_retain_k_are_measured(schedule: str) -> None:
    model, pieces = model_with(schedule), random_pieces(150, 120)
    losses = piece_losses(model, pieces, range(2))
    use = memory_use(model, pieces, "test", range(2), losses, bins=Bins(5 * SEGMENT, 16, 3), retain=(4, 64))
    assert use.krcu is not None
    assert abs(use.krcu.reset_bin.mean) > 1e-4
    newest = DSMRModel(DSMRConfig.from_dict({**model.config.to_dict(), "schedule": "explicit([20, 6], [None, None])"}))
    newest.load_state_dict(model.state_dict())
    assert keeping_only(model, 64).config.schedule == newest.config.schedule
    more = np.concatenate(piece_losses(newest, pieces, range(2))) - np.concatenate(losses)
    assert use.retain[1].delta.mean == pytest.approx(more.mean(), abs=1e-6)
    assert keeping_only(model, 4).config.schedule.horizons == (4, 4)
