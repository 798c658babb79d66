"""Streams read every piece whole, pack them without padding, and go on exactly where they were saved."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_corpus import tiny_corpus

from dsmr.console.errors import UserError
from dsmr.corpus.streams import IGNORE, Batch, StreamLoader


def reverse_some(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An augmentation that changes the length, as tempo stretching does."""
    keep = int(rng.integers(2, len(tokens)))
    return np.concatenate((tokens[:1], tokens[1:keep][::-1], tokens[-1:]))


def take(loader: StreamLoader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for x, y in zip(a, b, strict=True):
        for name in ("tokens", "targets", "piece_start"):
            torch.testing.assert_close(getattr(x, name), getattr(y, name), rtol=0, atol=0)
        assert x.pieces == y.pieces


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 1), (3, 17), (2, 500), (9, 64)])
def test_rows_read_whole_pieces_without_padding(tmp_path: Path, batch_size: int, tokens: int) -> None:
    corpus = tiny_corpus(tmp_path)
    loader = StreamLoader(corpus, "train", batch_size, tokens, seed=3)
    batches = take(loader, 1 + 900 // tokens)
    read = torch.cat([b.tokens for b in batches], 1).numpy()
    targets = torch.cat([b.targets for b in batches], 1).numpy()
    starts = torch.cat([b.piece_start + i * tokens for i, b in enumerate(batches)], 1).numpy()
    assert read.shape == targets.shape == starts.shape == (batch_size, tokens * len(batches))
    known = {tuple(corpus.piece(i)) for i in corpus.pieces_of("train")}
    for b in range(batch_size):
        begins = np.flatnonzero(read[b] == corpus.vocabulary.bos_id)
        assert begins[0] == 0
        for begin, end in itertools.pairwise(begins):
            assert tuple(read[b, begin:end]) in known
            assert (starts[b, begin:end] == begin).all()
            assert (targets[b, begin : end - 1] == read[b, begin + 1 : end]).all()
            assert targets[b, end - 1] == IGNORE
    assert all(b.predicted == int((b.targets != IGNORE).sum()) for b in batches)
    assert all(b.piece_start.dtype == torch.int32 and b.tokens.dtype == torch.int64 for b in batches)


@pytest.mark.parametrize(("tokens", "excerpt"), [(6, 16), (50, 16), (7, 1), (40, 10_000)])
def test_a_piece_cut_into_excerpts_counts_as_a_new_one_after_each(tmp_path: Path, tokens: int, excerpt: int) -> None:
    corpus = tiny_corpus(tmp_path)
    whole = take(StreamLoader(corpus, "train", 2, tokens, seed=3), 40)
    cut = [batch.cut(excerpt) for batch in whole]
    for now, then in zip(cut, whole, strict=True):
        assert (now.tokens == then.tokens).all()
        assert (now.targets == then.targets).all()
        assert now.piece_start.dtype == torch.int32
        assert now.pieces == then.pieces
    starts = torch.cat([batch.piece_start + i * tokens for i, batch in enumerate(whole)], 1)
    begins = torch.cat([batch.piece_start + i * tokens for i, batch in enumerate(cut)], 1)
    index = torch.arange(begins.shape[1])
    assert ((begins - starts) % excerpt == 0).all()
    assert ((index - begins >= 0) & (index - begins < excerpt) & (begins >= starts)).all()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_epoch_covers_every_piece_once(tmp_path: Path, batch_size: int) -> None:
    corpus = tiny_corpus(tmp_path)
    loader = StreamLoader(corpus, "train", batch_size, 1, seed=5)  # one token at a time: pieces open in dealt order
    opened: list[int] = []
    while len(opened) < 21:
        batch = next(loader)
        fresh = batch.tokens[:, 0] == corpus.vocabulary.bos_id
        opened += [batch.pieces[b][0] for b in range(batch_size) if fresh[b]]
    epochs = [opened[k : k + 7] for k in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(epoch) == list(corpus.pieces_of("train"))
    assert epochs[0] != epochs[1]
    assert loader.steps_per_epoch == -(-loader.epoch_tokens // batch_size)


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    first, again, other = (take(StreamLoader(corpus, "train", 2, 64, seed=s), 3) for s in (1, 1, 2))
    assert_same(first, again)
    assert not all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("augment", [None, reverse_some])
@pytest.mark.parametrize("steps", [0, 1, 9, 40])
def test_a_restored_loader_goes_on_exactly(tmp_path: Path, augment, steps: int) -> None:
    corpus = tiny_corpus(tmp_path)
    loader = StreamLoader(corpus, "train", 3, 29, seed=4, augment=augment)
    take(loader, steps)
    saved = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 30)
    fresh = StreamLoader(corpus, "train", 3, 29, seed=4, augment=augment)
    fresh.load_state_dict(saved)
    assert_same(take(fresh, 30), expected)


def test_augmentation_differs_from_epoch_to_epoch(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path, train=1)
    loader = StreamLoader(corpus, "train", 1, 1, seed=0, augment=reverse_some)
    lengths, length = [], 0
    while len(lengths) < 6:
        if next(loader).targets.item() == IGNORE:
            lengths.append(length)
            length = 0
        length += 1
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("augment", [None, reverse_some])
def test_rows_that_are_read_apart_are_those_of_the_whole(tmp_path: Path, augment) -> None:
    """Each process follows all rows and reads its own; what is predicted is counted of all."""
    corpus = tiny_corpus(tmp_path)
    whole = StreamLoader(corpus, "train", 3, 29, seed=4, augment=augment)
    parts = [StreamLoader(corpus, "train", 3, 29, 4, augment, rows) for rows in (range(1), range(1, 2), range(2, 3))]
    for _ in range(30):
        expected, found = next(whole), [next(part) for part in parts]
        for name in ("tokens", "targets", "piece_start"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in found]), getattr(expected, name))
        assert sum((batch.pieces for batch in found), ()) == expected.pieces
        assert {batch.predicted for batch in found} == {expected.predicted}
    assert all(part.state_dict() == whole.state_dict() for part in parts)
    assert [row.tokens is None for row in parts[1]._rows] == [True, False, True]


def test_nothing_is_predicted_where_the_loss_of_pytorch_predicts_nothing() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


def test_a_batch_goes_to_a_device_whole(tmp_path: Path) -> None:
    batch = next(StreamLoader(tiny_corpus(tmp_path), "train", 2, 8, seed=0))
    moved = batch.to("meta")
    assert all(getattr(moved, name).is_meta for name in ("tokens", "targets", "piece_start"))
    assert (moved.pieces, moved.predicted) == (batch.pieces, batch.predicted)


def test_bad_use_is_refused_in_a_sentence(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    with pytest.raises(UserError, match="no pieces in its split 'test'"):
        StreamLoader(corpus, "test", 1, 8, seed=0)
    with pytest.raises(ValueError, match="at least 1, but they are 0 and 8"):
        StreamLoader(corpus, "train", 0, 8, seed=0)
    with pytest.raises(ValueError, match="at least 1, but they are 1 and 0"):
        StreamLoader(corpus, "train", 1, 0, seed=0)
    for rows in (range(0), range(-1, 1), range(1, 3), range(2, 3)):
        with pytest.raises(ValueError, match="some of the 2 rows of a batch, but they are range"):
            StreamLoader(corpus, "train", 2, 8, seed=0, rows=rows)
    saved = StreamLoader(corpus, "train", 2, 8, seed=0).state_dict()
    with pytest.raises(ValueError, match="has seed 1 and 2 rows, but the saved one has seed 0"):
        StreamLoader(corpus, "train", 2, 8, seed=1).load_state_dict(saved)
    with pytest.raises(ValueError, match="3 rows"):
        StreamLoader(corpus, "train", 3, 8, seed=0).load_state_dict(saved)
