"""Streams of whole pieces for training: every batch row reads pieces one after another, packed without padding.

The pieces of a split are shuffled anew in every epoch and dealt to whichever row is free, so that an epoch covers every
piece once and no row waits for another. Everything that is random follows from (seed, epoch, piece): the loader's state
is a handful of integers, and a restored loader goes on exactly where the saved one stood, augmentation included.
Several processes may read a batch's rows among them: each follows all rows, and reads those that are its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dsmr.console.errors import UserError
from dsmr.corpus.store import Corpus

IGNORE = -100
"""Target of a token after which nothing is to be predicted; the model leaves it out of the loss."""

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Batch:
    """One step's tokens for all rows, and which pieces they come from."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE at the last token of each piece
    piece_start: torch.Tensor  # (B, T) int32, index in this batch of the piece's first token; negative: it began before
    pieces: tuple[tuple[int, ...], ...]  # for each row, the corpus's numbers of the pieces read in this batch
    predicted: int  # targets that are not IGNORE, of all rows of the stream: also of those that are read elsewhere

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        tokens, targets, piece_start = (x.to(device) for x in (self.tokens, self.targets, self.piece_start))
        return Batch(tokens, targets, piece_start, self.pieces, self.predicted)

    def cut(self, tokens: int) -> "Batch":
        """The same tokens and targets, but every piece counts as a new one after each `tokens` of its tokens."""
        index = torch.arange(self.tokens.shape[1], dtype=torch.int32, device=self.piece_start.device)
        return replace(self, piece_start=index - (index - self.piece_start) % tokens)


@dataclass
class _Row:
    """Where one row stands: `offset` tokens into its piece of an epoch."""

    piece: int
    epoch: int
    offset: int
    length: int
    tokens: np.ndarray | None  # None where another process reads the row


class StreamLoader:
    """An endless iterator of batches over the pieces of one split.

    `tokens_per_step` is the number of tokens of each row in a batch. `augment(tokens, rng)` is applied to each piece
    when a row opens it. A piece of n tokens gives n inputs and n - 1 targets: its last token (EOS) predicts nothing.
    Batches hold the rows of `rows` (all of them by default) of the `batch_size`; where the others stand is followed
    without reading them, save that augmenting tells how long a piece becomes.
    """

    def __init__(
        self,
        corpus: "Corpus",
        split: str,
        batch_size: int,
        tokens_per_step: int,
        seed: int,
        augment: Augment | None = None,
        rows: range | None = None,
    ) -> None:
        if batch_size < 1 or tokens_per_step < 1:
            raise ValueError(
                f"batch_size and tokens_per_step must be at least 1, but they are {batch_size} and {tokens_per_step}"
            )
        self.corpus, self.split = corpus, split
        self.batch_size, self.tokens_per_step = batch_size, tokens_per_step
        self.seed, self.augment = seed, augment
        self.rows = range(batch_size) if rows is None else rows
        if not (len(self.rows) and 0 <= self.rows[0] <= self.rows[-1] < batch_size):
            raise ValueError(f"rows must be some of the {batch_size} rows of a batch, but they are {self.rows}")
        self.pieces = np.asarray(corpus.pieces_of(split), dtype=np.int64)
        if not len(self.pieces):
            raise UserError(f"the corpus {corpus.name} has no pieces in its split '{split}'")
        self.epoch_tokens = int(np.diff(corpus.offsets)[self.pieces].sum())
        self._dealt = 0
        self._shuffled: tuple[int, np.ndarray] | None = None  # of an epoch, once one has begun
        self._rows = [self._open(b, *self._deal()) for b in range(batch_size)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold one epoch's tokens (before augmentation), rounded up."""
        return -(-self.epoch_tokens // (self.batch_size * self.tokens_per_step))

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        shape = (len(self.rows), self.tokens_per_step)
        tokens = np.empty(shape, dtype=np.int64)
        targets = np.full(shape, IGNORE, dtype=np.int64)
        piece_start = np.empty(shape, dtype=np.int32)
        pieces: list[tuple[int, ...]] = []
        predicted = 0
        for b in range(self.batch_size):
            read, filled = [], 0
            for row, begin, end in self._stretches(b):
                predicted += end - begin - (end == row.length)
                if row.tokens is not None:
                    here, i = slice(filled, filled + end - begin), len(pieces)
                    following = row.tokens[begin + 1 : end + 1]
                    tokens[i, here] = row.tokens[begin:end]
                    targets[i, filled : filled + len(following)] = following
                    piece_start[i, here] = filled - begin
                read.append(row.piece)
                filled += end - begin
            if b in self.rows:
                pieces.append(tuple(read))
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(piece_start),
            tuple(pieces),
            predicted,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain integers."""
        rows = [[row.piece, row.epoch, row.offset] for row in self._rows]
        return {"seed": self.seed, "dealt": self._dealt, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, from a loader over the same corpus with the same settings."""
        if state["seed"] != self.seed or len(state["rows"]) != self.batch_size:
            raise ValueError(
                f"this loader has seed {self.seed} and {self.batch_size} rows, "
                f"but the saved one has seed {state['seed']} and {len(state['rows'])} rows"
            )
        self._dealt = int(state["dealt"])
        self._rows = [self._open(b, *map(int, row)) for b, row in enumerate(state["rows"])]

    def _deal(self) -> tuple[int, int]:
        """The next piece that nobody has read in this epoch, and the epoch."""
        epoch, place = divmod(self._dealt, len(self.pieces))
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.pieces))
        self._dealt += 1
        return int(self._shuffled[1][place]), epoch

    def _open(self, b: int, piece: int, epoch: int, offset: int = 0) -> _Row:
        """Row `b` at `offset` of a piece."""
        own = b in self.rows
        if self.augment is None and not own:
            length = int(self.corpus.offsets[piece + 1]) - int(self.corpus.offsets[piece])
            return _Row(piece, epoch, offset, length, None)
        tokens = np.asarray(self.corpus.piece(piece))
        if self.augment is not None:
            tokens = self.augment(tokens, np.random.default_rng((self.seed, epoch, piece)))
        return _Row(piece, epoch, offset, len(tokens), tokens if own else None)

    def _stretches(self, b: int) -> Iterator[tuple[_Row, int, int]]:
        """Move row `b` on by a step, opening pieces as the earlier ones end: each piece's row, first token and end."""
        left = self.tokens_per_step
        while left:
            row = self._rows[b]
            if row.offset >= row.length:
                row = self._rows[b] = self._open(b, *self._deal())
            begin, row.offset = row.offset, min(row.offset + left, row.length)
            left -= row.offset - begin
            yield row, begin, row.offset
