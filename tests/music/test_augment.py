"""Augmented pieces are pieces: grammatical, with the same notes, moved by one interval and one factor, no drift."""

import itertools

import numpy as np
import pytest
from small_scores import random_score, score_of
from tiny_corpus import tiny_piece, tiny_vocabulary

from dsmr.music.augment import Augmenter
from dsmr.music.tokenizer import SCHEMES, build_tokenizer, decode, encode_score, vocabulary_of

ALL = pytest.mark.parametrize("name", list(SCHEMES))


def piece_of(name: str, seed: int = 0, n: int = 400) -> np.ndarray:
    words = vocabulary_of(name)
    tokens, _ = encode_score(random_score(seed, n), build_tokenizer(name))
    return np.concatenate([[words.bos_id], tokens, [words.eos_id]]).astype(np.int64)


def middle_of(name: str) -> np.ndarray:
    """A piece that can be transposed by an octave both ways."""
    words = vocabulary_of(name)
    notes = [(i * 0.11, 0.3, 48 + i * 7 % 24) for i in range(200)]
    tokens, _ = encode_score(score_of(notes), build_tokenizer(name))
    return np.concatenate([[words.bos_id], tokens, [words.eos_id]]).astype(np.int64)


@ALL
def test_augmented_pieces_are_grammatical_and_keep_every_note(name: str) -> None:
    words, augment = vocabulary_of(name), Augmenter(vocabulary_of(name))
    rng = np.random.default_rng(0)
    for piece in (piece_of(name), piece_of(name, 1, 3), middle_of(name)):
        before = piece.copy()
        for _ in range(5):
            made = augment(piece, rng)
            np.testing.assert_array_equal(piece, before)
            assert made.dtype == piece.dtype
            assert words.count_notes(made) == words.count_notes(piece)
            assert len(decode(made, words).tracks[0].notes) == words.count_notes(piece)
            grammar = words.grammar()
            for previous, token in itertools.pairwise(made.tolist()):
                assert words.allowed_after(previous)[token]
                assert grammar.allowed()[token]
                grammar.push(token)


@ALL
@pytest.mark.parametrize("factor", [0.9, 0.97, 1.1])
def test_stretched_onsets_do_not_drift(name: str, factor: float) -> None:
    words, piece = vocabulary_of(name), piece_of(name, 2, 2000)
    made = Augmenter(words).stretched(piece, factor)
    old, new = (words.clock(tokens)[words.is_note[tokens]] for tokens in (piece, made))
    assert old[-1] > 600
    # Half a tick, and what moments one tick apart push each other aside when time is pressed together.
    assert np.abs(new - factor * old).max() <= (0.0051 if factor > 1 else 0.02)
    assert np.abs(new - factor * old)[-100:].mean() < 0.004
    np.testing.assert_array_equal(words.pitch[piece[words.is_note[piece]]], words.pitch[made[words.is_note[made]]])


@ALL
def test_writing_a_piece_anew_without_a_change_gives_the_same_tokens(name: str) -> None:
    """So what is written is what MidiTok writes, long pauses too."""
    piece = piece_of(name, 3)
    np.testing.assert_array_equal(Augmenter(vocabulary_of(name)).stretched(piece, 1 + 1e-12), piece)


@ALL
def test_dense_moments_stay_apart_and_in_order(name: str) -> None:
    words = vocabulary_of(name)
    tokens, _ = encode_score(score_of([(0.01 * i, 0.01, 40 + i % 40) for i in range(100)]), build_tokenizer(name))
    piece = np.concatenate([[words.bos_id], tokens, [words.eos_id]]).astype(np.int64)
    made = Augmenter(words).stretched(piece, 0.5)
    assert np.all(np.diff(words.clock(made)[words.is_note[made]]) > 0)
    assert all(note.duration >= 1 for note in decode(made, words).tracks[0].notes)


@ALL
def test_a_transposed_piece_is_the_piece_encoded_in_another_key(name: str) -> None:
    augment = Augmenter(vocabulary_of(name))
    notes = [(i * 0.11, 0.3, 48 + i * 7 % 24) for i in range(200)]
    for interval in (-5, 3):
        moved = [(onset, duration, pitch + interval) for onset, duration, pitch in notes]
        expected, _ = encode_score(score_of(moved), build_tokenizer(name))
        np.testing.assert_array_equal(augment.transposed(middle_of(name), interval)[1:-1], expected)


def test_intervals_that_would_leave_the_keyboard_are_not_drawn() -> None:
    words = vocabulary_of("tsd")
    augment = Augmenter(words, transpose=(-5, 6), stretch=(1.0, 1.0))

    def piece(*pitches: int) -> np.ndarray:
        return encode_score(score_of([(0.0, 1.0, pitch) for pitch in pitches]), build_tokenizer())[0].astype(np.int64)

    assert augment.interval_range(piece(60)) == (-5, 6)
    assert augment.interval_range(piece(23, 60)) == (-2, 6)
    assert augment.interval_range(piece(60, 105)) == (-5, 3)
    assert augment.interval_range(piece(21, 108)) == (0, 0)
    rng = np.random.default_rng(0)
    drawn = {int(words.pitch[augment(piece(23), rng)].max()) for _ in range(200)}
    assert drawn == set(range(21, 30))
    with pytest.raises(ValueError, match="-3 semitones"):
        augment.transposed(piece(23), -3)


def test_the_same_generator_gives_the_same_piece() -> None:
    augment, piece = Augmenter(vocabulary_of("tsd")), middle_of("tsd")
    one, two, other = (augment(piece, np.random.default_rng(seed)) for seed in (7, 7, 8))
    np.testing.assert_array_equal(one, two)
    assert len(one) != len(other) or np.any(one != other)


def test_pieces_of_any_vocabulary_and_any_dtype_are_served() -> None:
    words = tiny_vocabulary()
    piece = np.concatenate([[1], tiny_piece(20, 0), [2]]).astype(np.uint16)
    made = Augmenter(words)(piece, np.random.default_rng(1))
    assert made.dtype == np.uint16
    assert words.count_notes(made) == 20
    for short in ([1, 2], [1], []):
        tokens = np.array(short, dtype=np.int64)
        np.testing.assert_array_equal(Augmenter(words)(tokens, np.random.default_rng(0)), tokens)


def test_two_pieces_at_once_and_bad_ranges_are_refused() -> None:
    words = vocabulary_of("tsd")
    with pytest.raises(ValueError, match="one piece"):
        Augmenter(words).stretched(np.array([1, 3, 2, 1, 3, 2]), 1.1)
    with pytest.raises(ValueError, match="transpose"):
        Augmenter(words, transpose=(3, -3))
    with pytest.raises(ValueError, match="stretch"):
        Augmenter(words, stretch=(0.0, 1.0))
