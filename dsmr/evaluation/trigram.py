"""A trigram baseline: interpolated Kneser-Ney, counted and looked up with sorted arrays, so that 20 million tokens take
seconds. A model that reads whole pieces should beat it by far; one that does not has learnt nothing beyond two tokens.

Each order discounts its counts by D = n1 / (n1 + 2 n2) and gives what it took to the next lower order; the lower orders
count in how many different contexts a token was seen, not how often (Kneser and Ney, 1995; Chen and Goodman, 1999,
section 2.7). The unigram falls back on the uniform distribution, so no token is impossible.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsmr.console.errors import UserError
from dsmr.corpus.store import Corpus
from dsmr.evaluation.report import EvaluationReport, report_losses


@dataclass(frozen=True)
class _Order:
    """Counts of one order: of grams (context and token) and of their contexts, by sorted codes."""

    grams: np.ndarray  # (G,) int64 sorted codes
    gram_counts: np.ndarray  # (G,) int64
    contexts: np.ndarray  # (C,) int64 sorted codes
    context_counts: np.ndarray  # (C,) int64, sum of the counts of the grams of each context
    context_types: np.ndarray  # (C,) int64, number of different grams of each context
    discount: float

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, size: int) -> "_Order":
        """Count the contexts of sorted, distinct `grams`, coded as the context's code times `size` plus a token."""
        contexts, first, types = np.unique(grams // size, return_index=True, return_counts=True)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # Where nothing was seen once (artificial data) the formula gives 0, and unseen grams would be impossible.
        discount = once / (once + 2 * twice) if once else 0.5
        return cls(grams, counts, contexts, np.add.reduceat(counts, first), types, min(discount, 0.95))

    def interpolate(self, grams: np.ndarray, size: int, lower: np.ndarray) -> np.ndarray:
        """Probabilities of `grams`, given the `lower` order's; where the context is unknown, the lower order's."""
        counts = _look_up(self.grams, self.gram_counts, grams)
        totals = _look_up(self.contexts, self.context_counts, grams // size)
        types = _look_up(self.contexts, self.context_types, grams // size)
        known = np.maximum(totals, 1)
        mixed = (np.maximum(counts - self.discount, 0.0) + self.discount * types * lower) / known
        return np.where(totals > 0, mixed, lower)


class Trigram:
    """Interpolated Kneser-Ney over `size` tokens; a piece's second token has the first (BOS) as context twice."""

    def __init__(self, pieces: Sequence[np.ndarray], size: int) -> None:
        if size < 1 or size >= 2**20:
            raise ValueError(f"size must lie between 1 and 2**20 - 1 for trigrams to fit in 64 bits, but it is {size}")
        codes = [_codes(piece, size) for piece in pieces]
        if not sum(map(len, codes)):
            raise ValueError("a trigram model needs at least one piece of two tokens")
        self.size = size
        grams, counts = np.unique(np.concatenate(codes), return_counts=True)
        self.third = _Order.of(grams, counts, size)
        # A distinct trigram is one more context in which its last two tokens were seen; likewise below.
        grams, counts = np.unique(grams % size**2, return_counts=True)
        self.second = _Order.of(grams, counts, size)
        grams, counts = np.unique(grams % size, return_counts=True)
        self.first = _Order.of(grams, counts, size)

    def probabilities(self, piece: np.ndarray) -> np.ndarray:
        """The probability of each token of `piece` after its first: (n - 1,) float64."""
        codes, size = _codes(piece, self.size), self.size
        uniform = np.full(len(codes), 1.0 / size)
        unigram = self.first.interpolate(codes % size, size, uniform)
        bigram = self.second.interpolate(codes % size**2, size, unigram)
        return self.third.interpolate(codes, size, bigram)

    def losses(self, piece: np.ndarray) -> np.ndarray:
        """The loss in nats of each token of `piece` after its first: (n - 1,) float64."""
        return -np.log(self.probabilities(piece))


def evaluate_trigram(corpus: "Corpus", split: str = "validation") -> "EvaluationReport":
    """Count the training split of `corpus` and report the losses on `split`, as for a model."""
    pieces = {name: np.asarray(corpus.pieces_of(name), dtype=np.int64) for name in ("train", split)}
    for name, found in pieces.items():
        if not len(found):
            raise UserError(f"the corpus {corpus.name} has no pieces in its split '{name}'")
    model = Trigram([np.asarray(corpus.piece(int(i))) for i in pieces["train"]], corpus.vocabulary.size)
    losses = [model.losses(np.asarray(corpus.piece(int(i)))) for i in pieces[split]]
    return report_losses(corpus, split, pieces[split], losses, name="trigram")


def _codes(piece: np.ndarray, size: int) -> np.ndarray:
    """The trigrams that end at each token after the first: (n - 1,) int64."""
    tokens = np.asarray(piece, dtype=np.int64)
    if not len(tokens):
        return tokens
    if tokens.min() < 0 or tokens.max() >= size:
        raise ValueError(f"tokens must lie in 0 … {size - 1}, but they reach from {tokens.min()} to {tokens.max()}")
    before = np.concatenate((tokens[:1], tokens[:-2]))
    return (before[: len(tokens) - 1] * size + tokens[:-1]) * size + tokens[1:]


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is missing; `keys` are sorted."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
