"""Composed pieces, and among those for training also études, fragments repeated at once: what the demo trains on.

To foretell a refrain's return a model must remember the refrain and must know how to copy. Copying is slow to learn
from returns alone, as each comes once, thousands of tokens after what it repeats. Études teach it in minutes, to both
models alike, since all of an étude fits into a segment. At the returns, then, the models differ in memory alone.
Validation and test pieces are untouched.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dsmr.corpus.prepare import prepare_composed
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus

SHORTEST, LONGEST = 16, 96  # tokens of a fragment, about 4 to 24 notes


def compose_with_etudes(
    out: str | os.PathLike[str], *, pieces: int, piece_minutes: float, etude_share: float, etude_tokens: int, seed: int
) -> Corpus:
    """Compose a corpus into the folder `out`, with so large a share (0 to below 1) of training tokens in études.

    Each étude is about `etude_tokens` long, its fragment drawn from the training pieces.
    """
    if not 0 <= etude_share < 1:
        raise ValueError(f"etude_share must be at least 0 and below 1, got {etude_share}")
    folder = Path(out)
    plain = folder if etude_share == 0 else folder / "pieces"
    prepare_composed(plain, pieces, seed, minutes=piece_minutes)
    corpus = Corpus.open(plain)
    if etude_share == 0:
        return corpus
    rng = np.random.default_rng(seed)
    return write_corpus(
        folder / "with-etudes",
        _records(corpus, etude_share / (1 - etude_share), etude_tokens, rng),
        corpus.vocabulary,
        f"{corpus.name}, with études",
    )


def _records(corpus: Corpus, ratio: float, etude_tokens: int, rng: np.random.Generator) -> Iterator[PieceRecord]:
    """Every piece, and after each training piece `ratio` times its tokens in études of fragments of it."""
    assert corpus.labels is not None
    owed, number = 0.0, 0
    for i in range(corpus.n_pieces):
        tokens = np.asarray(corpus.piece(i))[1:-1]
        labels = np.asarray(corpus.labels[corpus.offsets[i] + 1 : corpus.offsets[i + 1] - 1])
        split, source = str(corpus.split[i]), str(corpus.source[i])
        yield PieceRecord(
            tokens.astype(np.uint16), split, source, int(corpus.n_notes[i]), float(corpus.seconds[i]), labels
        )
        if split != "train":
            continue
        owed += ratio * len(tokens)
        while owed > 0:
            etude = repeated_fragment(tokens, corpus.vocabulary.of_type("TimeShift"), etude_tokens, rng)
            owed -= len(etude)
            number += 1
            yield PieceRecord(
                etude.astype(np.uint16),
                "train",
                f"etude-{number:05d}",
                corpus.vocabulary.count_notes(etude),
                float(corpus.vocabulary.clock(etude)[-1]),
                np.zeros(len(etude), dtype=np.uint8),
            )


def repeated_fragment(tokens: np.ndarray, moves_time: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """A fragment of `tokens`, from one moment to another, repeated until there are about `length` tokens.

    Its length is drawn between `SHORTEST` and `LONGEST`, evenly in the logarithm: short ones show sooner what copying
    is, long ones that what is copied may lie far back. `moves_time` (vocabulary) marks the tokens that end a moment.
    """
    wanted = round(SHORTEST * (LONGEST / SHORTEST) ** float(rng.random()))
    borders = np.flatnonzero(moves_time[tokens]) + 1
    begins = borders[borders + wanted <= borders[-1]]
    begin = int(rng.choice(begins)) if len(begins) else int(borders[0])
    end = int(borders[min(int(np.searchsorted(borders, begin + wanted)), len(borders) - 1)])
    fragment = tokens[begin:end]
    return np.tile(fragment, max(2, -(-length // len(fragment))))
