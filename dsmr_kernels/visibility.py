"""Who sees whom: the one rule that every backend follows.

In a call, tokens are counted from 0 and memory lies at -1, -2, ... backwards, newest first. Token p lies in segment
s = (p + o) // L, where o (`segment_offset`) is how far into its segment the call begins. It attends to every key j with
low(p) <= j <= p, where

    visibility="segment"   low(p) = s * L - o - horizon     every query of a segment sees the same past
    visibility="sliding"   low(p) = p - horizon             every query sees exactly `horizon` tokens before itself

and low(p) never lies before the start of p's piece or before the oldest token that the memory holds. Without an L
(`segment_length=None`) the whole call lies in one segment. `low` never decreases along a row, so the visible keys of
consecutive queries form a band with two slanted edges, and a kernel masks nothing but the blocks on these edges.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Visibility = Literal["segment", "sliding"]
VISIBILITIES: tuple[str, ...] = ("segment", "sliding")


def segment_of(tokens: Tensor, segment_length: int | None, segment_offset: int | Tensor) -> Tensor:
    """Number of the segment of each token index in `tokens`; 0 is the segment that the call begins in. With a
    `segment_offset` (B, 1) for each row: (B, T)."""
    if segment_length is None:
        return torch.zeros_like(tokens + segment_offset)
    return torch.div(tokens + segment_offset, segment_length, rounding_mode="floor")


def lowest_visible(
    tokens: Tensor,
    *,
    horizon: int,
    segment_length: int | None,
    segment_offset: int | Tensor,
    visibility: str,
    piece_start: Tensor | None = None,
) -> Tensor:
    """low(p) of the module's docstring, leaving aside how much the memory holds.

    Args:
        tokens: (T,) int64, token indices p in the call.
        segment_offset: of all rows, or (B, 1) int64 of each.
        piece_start: (B, T), for these tokens; negative = the piece began before the call.

    Returns:
        (1, T) or (B, T) int64.
    """
    if visibility == "sliding":
        low = tokens - horizon
    else:
        segment = segment_of(tokens, segment_length, segment_offset)
        low = segment * (segment_length or 0) - segment_offset - horizon
    low = low if low.dim() == 2 else low.unsqueeze(0)
    if piece_start is not None:
        start = piece_start.to(torch.int64)
        low = torch.where(start >= 0, torch.maximum(low, start), low)
    return low


class Run(NamedTuple):
    """Consecutive queries of one row that share segment and piece, and hence one lower bound on what they see.

    Query p of the run, `start` <= p < `stop`, sees the keys max(`floor`, p - `window`) ... p; without a window
    (`None`, segment visibility) all queries see the same past, `floor` ... `start` - 1, unmasked, and the run itself
    causally. Keys from `own` on lie in the run's own segment; earlier ones are detached if segments are.
    """

    start: int
    stop: int
    floor: int
    own: int
    window: int | None

    def low(self, token: int) -> int:
        """The first key that query `token` of this run sees."""
        return self.floor if self.window is None else max(self.floor, token - self.window)


def runs_of_row(
    queries: range,
    piece_starts: list[tuple[int, int]],
    held: int,
    *,
    horizon: int,
    segment_length: int | None,
    segment_offset: int,
    visibility: str,
) -> tuple[Run, ...]:
    """Cut one row's queries into runs.

    Args:
        queries: token indices of the queries in the call.
        piece_starts: (first token, piece start) for each piece that the call touches, in order; the first begins at
            token 0, and a negative piece start means that the piece began before the call.
        held: tokens that the row's memory holds.
    """
    runs = []
    for index, (first, piece) in enumerate(piece_starts):
        last = piece_starts[index + 1][0] if index + 1 < len(piece_starts) else queries.stop
        token, end = max(first, queries.start), min(last, queries.stop)
        while token < end:
            if segment_length is None:
                begin, stop = -segment_offset, end
            else:
                begin = (token + segment_offset) // segment_length * segment_length - segment_offset
                stop = min(end, begin + segment_length)
            bound = piece if piece >= 0 else -held
            if visibility == "segment":
                runs.append(Run(token, stop, max(begin - horizon, bound), max(begin, 0), None))
            else:
                runs.append(Run(token, stop, bound, max(begin, 0), horizon))
            token = stop
    return tuple(runs)
