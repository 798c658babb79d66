"""A corpus of a few made-up pieces over a vocabulary of 28 tokens, for tests that need no MidiTok."""

from pathlib import Path

import numpy as np

from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.music.vocabulary import Vocabulary

TOKENS = (
    *("PAD_None", "BOS_None", "EOS_None"),
    *(f"Pitch_{pitch}" for pitch in range(57, 70)),
    *(f"Velocity_{velocity}" for velocity in (40, 64, 88, 112)),
    *(f"Duration_0.{ticks}.4" for ticks in (1, 2, 3)),
    "Duration_1.0.4",
    *(f"TimeShift_0.{ticks}.4" for ticks in (1, 2, 3)),
    "TimeShift_1.0.4",
)


def tiny_vocabulary(**params: object) -> Vocabulary:
    """A TSD vocabulary with a grid of 8 ticks a second."""
    return Vocabulary(scheme="TSD", tokens=TOKENS, ticks_per_second=8, tokenizer_params=dict(params))


def tiny_piece(notes: int, seed: int) -> np.ndarray:
    """Tokens (without BOS and EOS) of a short motif, repeated with a changed note now and then."""
    rng = np.random.default_rng(seed)
    motif = rng.integers(0, 13, size=5)
    tokens: list[int] = []
    for i in range(notes):
        pitch = int(motif[i % 5]) if rng.random() < 0.9 else int(rng.integers(0, 13))
        tokens += [3 + pitch, 16 + i % 4, 20 + i % 4, 24 + i % 2]
    return np.array(tokens, dtype=np.uint16)


def tiny_corpus(
    path: Path, train: int = 7, validation: int = 3, *, labels: bool = False, seed: int = 0, **params: object
) -> Corpus:
    """Write and open a corpus of pieces of 3 to 30 notes."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(train + validation):
        notes = int(rng.integers(3, 31))
        tokens = tiny_piece(notes, seed * 1000 + i)
        split = "train" if i < train else "validation"
        marks = (np.arange(len(tokens)) // 8 % 3).astype(np.uint8) if labels else None
        records.append(PieceRecord(tokens, split, f"{split} piece {i}.mid", notes, notes / 4, marks))
    return write_corpus(path, records, tiny_vocabulary(**params), "tiny")
