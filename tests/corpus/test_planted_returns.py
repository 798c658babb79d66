"""Planted returns: what was put in is what was taken out, where it says, and nothing else of the piece is changed."""

from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import tiny_corpus, tiny_piece, tiny_vocabulary

from dsmr.console.errors import UserError
from dsmr.corpus.returns import FIRST, KINDS, RETURN, Planted, Planter, planted_corpus
from dsmr.corpus.store import PieceRecord, write_corpus
from dsmr.corpus.streams import StreamLoader

WORDS = tiny_vocabulary()
NEAR, FAR = 60, 400


def piece(notes: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    i = np.arange(notes)
    body = np.stack([rng.integers(3, 16, notes), 16 + i % 4, 20 + i % 4, rng.integers(24, 28, notes)], 1)
    return np.array([1, *body.flatten()[:-1], 2], dtype=np.int64)  # no time passes after the last note


def planter(**more) -> Planter:
    return Planter(WORDS, **{"seconds": (1.0, 4.0), "distance": (NEAR, FAR), **more})


def fresh(planted: Planted) -> np.ndarray:
    return planted.tokens[planted.labels != RETURN]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_but_the_returns_is_put_in(seed: int) -> None:
    tokens = piece(400, seed)
    planted = planter().plant(tokens, np.random.default_rng(seed))
    assert len(planted.returns) > 3
    np.testing.assert_array_equal(fresh(planted), tokens)
    assert len(planted.labels) == len(planted.tokens)
    share = (planted.labels == RETURN).mean()
    assert 0.1 < share < 0.35
    grammar = WORDS.grammar()
    for token in planted.tokens[1:]:
        assert grammar.allowed()[token]
        grammar.push(int(token))


@pytest.mark.parametrize("kind", KINDS)
def test_returns_are_what_they_say_and_where(kind: str) -> None:
    clock_of = WORDS.clock
    for seed in range(5):
        planted = planter(kinds=(kind,)).plant(piece(500, seed), np.random.default_rng(seed))
        for found in planted.returns:
            again, source = planted.tokens[found.begin : found.end], planted.tokens[found.source : found.source_end]
            assert found.source_end <= found.begin
            assert NEAR <= found.distance <= FAR
            assert (planted.labels[found.begin : found.end] == RETURN).all()
            assert (planted.labels[found.source : found.source_end] == FIRST).all()
            assert found.kind == kind or kind == "transposed"  # where no interval keeps all notes, it stays
            pitches = WORDS.pitch[again[WORDS.is_note[again]]], WORDS.pitch[source[WORDS.is_note[source]]]
            np.testing.assert_array_equal(pitches[0], pitches[1] + found.interval)
            if found.kind == "exact":
                np.testing.assert_array_equal(again, source)
            elif found.kind == "transposed":
                assert found.interval != 0
            else:
                assert abs(found.factor - 1) > 0.04
                assert clock_of(again)[-1] == pytest.approx(clock_of(source)[-1] * found.factor, abs=0.2)
            assert clock_of(source)[-1] <= 4.0 + 1.0  # up to the end of its last moment
        starts = [found.begin for found in planted.returns]
        assert starts == sorted(starts)
        marked = sum(found.end - found.begin for found in planted.returns)
        assert (planted.labels == RETURN).sum() == marked


def test_distances_reach_over_the_whole_range() -> None:
    distances = [
        found.distance
        for seed in range(12)
        for found in planter().plant(piece(600, seed), np.random.default_rng(seed)).returns
    ]
    shares = np.histogram(distances, [NEAR, 100, 170, 280, FAR + 1])[0] / len(distances)
    assert shares.min() > 0.1


def test_the_same_seed_plants_the_same_whatever_else_there_is(tmp_path: Path) -> None:
    def write(name: str, lengths: list[int]):
        records = [
            PieceRecord(piece(n, i)[1:-1].astype(np.uint16), "validation", f"{i}", n, n / 4.0)
            for i, n in enumerate(lengths)
        ]
        return write_corpus(tmp_path / name, records, WORDS, name)

    few, more = write("few", [300, 5, 200]), write("more", [300, 5, 200, 250])
    (one, found), (other, also) = (planted_corpus(corpus, "validation", planter(), seed=3) for corpus in (few, more))
    assert found == also[:3]
    assert [len(returns) > 0 for returns in found] == [True, False, True]
    for i in range(3):
        np.testing.assert_array_equal(one.piece(i), other.piece(i))
        assert one.n_notes[i] == WORDS.count_notes(one.piece(i))
    assert one.seconds[1] == few.seconds[1]
    assert one.seconds[0] > few.seconds[0]
    np.testing.assert_array_equal(one.piece(1), few.piece(1))
    assert one.digest != planted_corpus(few, "validation", planter(), seed=4)[0].digest
    with pytest.raises(UserError, match="no piece of few, split 'validation', is long enough for a return after 9,000"):
        planted_corpus(few, "validation", planter(distance=(9000, 9000)), seed=3)


def test_a_stream_of_planted_pieces_goes_on_where_it_stopped(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    make = planter(distance=(16, 64), seconds=(0.5, 1.0))
    streams = [StreamLoader(corpus, "train", 2, 24, 5, make) for _ in range(2)]
    for _ in range(4):
        next(streams[0])
    streams[1].load_state_dict(streams[0].state_dict())
    assert (next(streams[0]).tokens == next(streams[1]).tokens).all()
    assert any(make.plant(corpus.piece(i), np.random.default_rng(0)).returns for i in range(corpus.n_pieces))


def test_short_pieces_stay_and_what_cannot_be_is_a_sentence() -> None:
    tokens = np.concatenate([[1], tiny_piece(4, 0), [2]]).astype(np.int64)
    planted = planter().plant(tokens, np.random.default_rng(0))
    np.testing.assert_array_equal(planted.tokens, tokens)
    assert planted.returns == ()
    assert planter().plant(np.array([1, 2]), np.random.default_rng(0)).returns == ()
    for wrong, sentence in (
        ({"share": 0.0}, "share of returns"),
        ({"seconds": (3.0, 1.0)}, "seconds of a return"),
        ({"distance": (5, 1)}, "distances of returns"),
        ({"kinds": ("upside down",)}, "kinds of returns"),
    ):
        with pytest.raises(UserError, match=sentence):
            planter(**wrong)


def test_a_tokeniser_whose_passages_cannot_be_taken_out_is_refused() -> None:
    pytest.importorskip("miditok")
    from dsmr.music.tokenizer import vocabulary_of

    for scheme in ("midilike", "remi", "tsd_pedal"):
        with pytest.raises(UserError, match="tokeniser tsd alone"):
            Planter(vocabulary_of(scheme))
    Planter(vocabulary_of("tsd"))
