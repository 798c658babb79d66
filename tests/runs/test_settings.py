"""What the settings of a training run say of its length, its learning rate, its validations and its curriculum."""

from pathlib import Path

import pytest
from tiny_corpus import tiny_corpus

from dsmr.runs.settings import TrainConfig, validation_pieces


def test_the_length_is_the_first_of_its_limits() -> None:
    assert TrainConfig("d", "o").total_steps(7) == 70
    assert TrainConfig("d", "o", epochs=0.5).total_steps(7) == 4
    assert TrainConfig("d", "o", epochs=3, steps=5).total_steps(7) == 5
    assert TrainConfig("d", "o", minutes=1).total_steps(7) is None


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    config = TrainConfig("data", "out", lr=1.0, min_lr=0.2, warmup=4)
    assert [config.learning_rate(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert config.learning_rate(50, 0.5) == pytest.approx(0.6)
    assert config.learning_rate(99, 1.0) == pytest.approx(0.2)
    usual = TrainConfig("data", "out", lr=1.0)
    assert 0 < usual.learning_rate(0, 0.0) < 0.1
    assert usual.learning_rate(50, 0.03) > 0.99
    assert usual.learning_rate(99, 1.0) == pytest.approx(0.1)


def test_validations_take_a_small_part_of_a_run() -> None:
    config = TrainConfig("data", "out", batch_size=2, segment_length=50)
    assert config.evaluations(1000, tokens=100) == 20
    assert config.evaluations(1000, tokens=6_000) == 5  # 30,000 of 100,000 tokens, read three times as fast
    assert config.evaluations(10, tokens=6_000) == 1


def test_validation_pieces_are_whole_few_and_always_the_same(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path, train=2, validation=12)
    lengths = {int(i): len(corpus.piece(i)) for i in corpus.pieces_of("validation")}
    chosen = validation_pieces(corpus, 300)
    assert 0 < sum(lengths[int(i)] for i in chosen) <= 300
    assert list(chosen) == list(validation_pieces(corpus, 300))
    assert [lengths[int(i)] for i in validation_pieces(corpus, 1)] == [min(lengths.values())]
    assert len(validation_pieces(corpus, 10**6)) == 12


def test_what_is_heard_at_a_stretch_doubles_until_nothing_is_cut() -> None:
    config = TrainConfig("data", "out", segment_length=256, curriculum=0.5)
    at = [config.excerpt(done, longest=1024) for done in (0.0, 0.16, 0.17, 0.33, 0.34, 0.49, 0.5, 1.0)]
    assert at == [256, 256, 512, 512, 1024, 1024, None, None]
    assert config.excerpt(0.4, longest=1025) == 2048  # up to what the longest memory holds
    assert config.excerpt(0.0, longest=100) == 256
    assert config.excerpt(0.0, longest=0) is None  # nothing is remembered anyway
    assert TrainConfig("data", "out").excerpt(0.0, longest=1024) is None
