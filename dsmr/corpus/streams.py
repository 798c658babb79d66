"""Streams of whole pieces for training: every batch row reads pieces one after another, packed without padding.

The pieces of a split are shuffled anew in every epoch and dealt to whichever row is free, so that an epoch covers every
piece once and no row waits for another. Everything that is random follows from (seed, epoch, piece): the loader's state
is a handful of integers, and a restored loader goes on exactly where the saved one stood, augmentation included.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on `device`."""
        return Batch(self.tokens.to(device), self.targets.to(device), self.piece_start.to(device), self.pieces)


@dataclass
class _Row:
    """Where one row stands: `offset` tokens into its piece of an epoch."""

    piece: int
    epoch: int
    offset: int
    tokens: np.ndarray


class StreamLoader:
    """An endless iterator of batches over the pieces of one split.

    `tokens_per_step` is the number of tokens of each row in a batch. `augment(tokens, rng)` is applied to each piece
    when a row opens it. A piece of n tokens gives n inputs and n - 1 targets: its last token (EOS) predicts nothing.
    """

    def __init__(
        self,
        corpus: "Corpus",
        split: str,
        batch_size: int,
        tokens_per_step: int,
        seed: int,
        augment: Augment | None = None,
    ) -> None:
        if batch_size < 1 or tokens_per_step < 1:
            raise ValueError(
                f"batch_size and tokens_per_step must be at least 1, but they are {batch_size} and {tokens_per_step}"
            )
        self.corpus, self.split = corpus, split
        self.batch_size, self.tokens_per_step = batch_size, tokens_per_step
        self.seed, self.augment = seed, augment
        self.pieces = np.asarray(corpus.pieces_of(split), dtype=np.int64)
        if not len(self.pieces):
            raise UserError(f"the corpus {corpus.name} has no pieces in its split '{split}'")
        lengths = np.diff(np.asarray(corpus.offsets))[self.pieces]
        if lengths.min() < 1:
            raise UserError(f"piece '{corpus.source[int(self.pieces[lengths.argmin()])]}' has no tokens")
        self.epoch_tokens = int(lengths.sum())
        self._dealt = 0
        self._shuffled: tuple[int, np.ndarray] = (-1, self.pieces)
        self._rows = [self._open(*self._deal()) for _ in range(batch_size)]

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold one epoch's tokens (before augmentation), rounded up."""
        return -(-self.epoch_tokens // (self.batch_size * self.tokens_per_step))

    def __iter__(self) -> "StreamLoader":
        return self

    def __next__(self) -> Batch:
        shape = (self.batch_size, self.tokens_per_step)
        tokens = np.empty(shape, dtype=np.int64)
        targets = np.empty(shape, dtype=np.int64)
        piece_start = np.empty(shape, dtype=np.int32)
        pieces = tuple(self._read(b, tokens[b], targets[b], piece_start[b]) for b in range(self.batch_size))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(piece_start), pieces)

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
        self._rows = [self._open(int(piece), int(epoch), int(offset)) for piece, epoch, offset in state["rows"]]

    def _deal(self) -> tuple[int, int]:
        """The next piece that nobody has read in this epoch, and the epoch."""
        epoch, place = divmod(self._dealt, len(self.pieces))
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.pieces))
        self._dealt += 1
        return int(self._shuffled[1][place]), epoch

    def _open(self, piece: int, epoch: int, offset: int = 0) -> _Row:
        tokens = np.asarray(self.corpus.piece(piece))
        if self.augment is not None:
            tokens = self.augment(tokens, np.random.default_rng((self.seed, epoch, piece)))
        return _Row(piece, epoch, offset, tokens)

    def _read(self, b: int, tokens: np.ndarray, targets: np.ndarray, piece_start: np.ndarray) -> tuple[int, ...]:
        """Fill one row's arrays, opening pieces as the earlier ones end; return the pieces read."""
        filled, pieces = 0, []
        while filled < self.tokens_per_step:
            row = self._rows[b]
            if row.offset >= len(row.tokens):
                row = self._rows[b] = self._open(*self._deal())
            begin, end = row.offset, min(row.offset + self.tokens_per_step - filled, len(row.tokens))
            here = slice(filled, filled + end - begin)
            tokens[here] = row.tokens[begin:end]
            following = row.tokens[begin + 1 : end + 1]
            targets[here] = IGNORE
            targets[filled : filled + len(following)] = following
            piece_start[here] = filled - begin
            pieces.append(row.piece)
            row.offset = end
            filled += end - begin
        return tuple(pieces)
