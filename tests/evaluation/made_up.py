"""Pieces at random and small models with large weights, for what is measured of losses."""

from types import SimpleNamespace

import numpy as np
import torch
from tiny_corpus import TOKENS

from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

SEGMENT = 8
ROUNDING = 2e-5


class Pieces:
    """A corpus of given pieces, as far as losses ask."""

    name = "made up"
    vocabulary = SimpleNamespace(pad_id=0, hash="0" * 64)

    def __init__(self, pieces: list[np.ndarray]) -> None:
        self.pieces = pieces

    def piece(self, i: int) -> np.ndarray:
        return self.pieces[i]


def random_pieces(*lengths: int, seed: int = 0) -> Pieces:
    rng = np.random.default_rng(seed)
    return Pieces([np.append(1, rng.integers(3, len(TOKENS), n - 1)) for n in lengths])


def model_with(schedule: str, **more) -> DSMRModel:
    torch.manual_seed(2)
    config = {"d_model": 16, "n_heads": 2, "segment_length": SEGMENT, "init_std": 0.5}
    return DSMRModel(DSMRConfig(len(TOKENS), schedule, **{**config, **more}))
