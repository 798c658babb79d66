"""The scales of an eight-bit memory: how large each channel of a layer's keys and values gets, in music that is heard.

The scales are fixed when a model is exported, one for each channel. They are taken from music that the model plays by
itself, and from MIDI files where some are given; what gets larger later than a quarter beyond it is cut off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dsmr.export.attention import Scales
from dsmr.export.weights import MOST
from dsmr.generation.player import Player
from dsmr.generation.prompts import read_prompt
from dsmr.generation.sampling import Sampling
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary

PIECES = 4  # of the model's own music
SEGMENTS, LEAST, MOST_TOKENS = 4, 256, 1024  # of each
MARGIN = 1.25
SMALLEST = 1e-6


def scales_of(model: DSMRModel, vocabulary: Vocabulary, pieces: Sequence[str | os.PathLike[str]] = ()) -> list[Scales]:
    """Scales of every layer's keys and values, (kv_heads, head_dim) each, by what the model remembers of its own music
    and of the MIDI files `pieces`."""
    largest: list[list[torch.Tensor]] | None = None
    for tokens in _music(model, vocabulary, pieces):
        for found in _sizes(model, tokens):
            if largest is None:
                largest = found
                continue
            largest = [[a.maximum(b) for a, b in zip(*both, strict=True)] for both in zip(largest, found, strict=True)]
    assert largest is not None
    return [(scale_of(k), scale_of(v)) for k, v in largest]


def scale_of(largest: torch.Tensor) -> np.ndarray:
    """The scales of channels whose largest magnitudes these are."""
    return (largest.numpy().clip(SMALLEST) * (MARGIN / MOST)).astype(np.float32)


def _music(
    model: DSMRModel, vocabulary: Vocabulary, pieces: Sequence[str | os.PathLike[str]]
) -> Iterator[torch.Tensor]:
    """Token ids (T,) of each piece."""
    player = Player.begin(model, [vocabulary.bos_id], Sampling(seed=0), vocabulary, variations=PIECES)
    for _ in player.play(min(max(SEGMENTS * model.config.segment_length, LEAST), MOST_TOKENS)):
        pass
    for heard in player.tokens:
        yield torch.from_numpy(np.array(heard, dtype=np.int64))
    for piece in pieces:
        yield torch.from_numpy(read_prompt(piece, vocabulary, None).tokens)


@torch.no_grad()
def _sizes(model: DSMRModel, tokens: torch.Tensor) -> Iterator[list[list[torch.Tensor]]]:
    """The largest magnitudes of each channel in every layer's memory, again and again while `tokens` are read."""
    state = model.new_state(1)
    for segment in tokens.split(model.config.segment_length):
        model(segment[None], state)
        yield [
            [x[0, :, : int(memory.length[0])].abs().amax(1) for x in (memory.k, memory.v)] for memory in state.memories
        ]
