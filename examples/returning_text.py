"""Text whose passages return beyond the segment: what only a memory can know.

Every row reads passages of 48 random letters, each heard eight times before the next one begins. In a segment of 32
letters nothing returns, so without a memory every letter is a surprise; with one, only those heard for the first time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LETTERS, PASSAGE, TIMES, SEGMENT = 16, 48, 8, 32


def text(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """(rows, tokens) int64: streams that begin with a passage."""
    generator = torch.Generator().manual_seed(seed)
    pieces = -(-tokens // (PASSAGE * TIMES))
    passages = torch.randint(LETTERS, (rows, pieces, 1, PASSAGE), generator=generator)
    return passages.expand(-1, -1, TIMES, -1).reshape(rows, -1)[:, :tokens]


def segments(rows: int, count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`count` segments of all rows: letters and the letter after each, (rows, 32), and which rows begin a passage."""
    whole = text(rows, count * SEGMENT + 1, seed)
    for begin in range(0, count * SEGMENT, SEGMENT):
        part = whole[:, begin : begin + SEGMENT + 1]
        yield part[:, :-1], part[:, 1:], torch.full((rows,), begin % (PASSAGE * TIMES) == 0)
