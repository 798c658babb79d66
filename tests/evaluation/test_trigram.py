"""The trigram baseline equals interpolated Kneser-Ney written out with dictionaries."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import tiny_corpus

from dsmr.evaluation.trigram import Trigram, evaluate_trigram

SIZE = 6


class PlainKneserNey:
    """The definition, one dictionary for each count."""

    def __init__(self, pieces: list[list[int]]) -> None:
        trigrams = Counter(g for piece in pieces for g in self.grams(piece))
        bigrams = Counter(g[1:] for g in trigrams)
        unigrams = Counter(g[1:] for g in bigrams)
        self.orders = [unigrams, bigrams, trigrams]

    @staticmethod
    def grams(piece: list[int]) -> list[tuple[int, ...]]:
        padded = [piece[0], *piece]
        return [tuple(padded[i : i + 3]) for i in range(len(piece) - 1)]

    def probability(self, gram: tuple[int, ...]) -> float:
        if not gram:
            return 1 / SIZE
        counts, lower = self.orders[len(gram) - 1], self.probability(gram[1:])
        once, twice = (sum(c == n for c in counts.values()) for n in (1, 2))
        discount = min(once / (once + 2 * twice), 0.95) if once else 0.5
        followers = defaultdict(int, {g: c for g, c in counts.items() if g[:-1] == gram[:-1]})
        if not followers:
            return lower
        total = sum(followers.values())
        return (max(followers[gram] - discount, 0) + discount * sum(c > 0 for c in followers.values()) * lower) / total


@pytest.mark.parametrize("seed", range(4))
def test_probabilities_equal_the_plain_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pieces = [rng.choice(SIZE - 1, size=n, p=[0.5, 0.2, 0.15, 0.1, 0.05]) for n in (1, 2, 3, 30, 17)]
    plain = PlainKneserNey([piece.tolist() for piece in pieces])
    fast = Trigram(pieces, SIZE)
    for piece in [*pieces, rng.integers(0, SIZE, size=40)]:
        expected = [plain.probability(gram) for gram in plain.grams(piece.tolist())]
        np.testing.assert_allclose(fast.probabilities(piece), expected, rtol=1e-12)


def test_probabilities_of_all_successors_sum_to_one() -> None:
    rng = np.random.default_rng(9)
    model = Trigram([rng.integers(0, 4, size=25), rng.integers(2, 5, size=9)], SIZE)
    for a in range(SIZE):
        for b in range(SIZE):
            last = [model.probabilities(np.array([a, b, c]))[-1] for c in range(SIZE)]
            assert sum(last) == pytest.approx(1.0, abs=1e-12)
            assert min(last) > 0


def test_it_reports_like_a_model(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path, train=20)
    report = evaluate_trigram(corpus, "validation")
    assert report.model == "trigram"
    assert report.tokens == sum(len(corpus.piece(i)) - 1 for i in corpus.pieces_of("validation"))
    assert report.nats_per_token < np.log(corpus.vocabulary.size) / 2


def test_bad_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 … 5, but they reach from 0 to 6"):
        Trigram([np.array([0, 6])], SIZE)
    with pytest.raises(ValueError, match="at least one piece of two tokens"):
        Trigram([np.array([0])], SIZE)
