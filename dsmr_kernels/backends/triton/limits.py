"""How far a training call reaches, as the kernels count it: horizon, segment length and offset in 32 bits."""

import torch
from torch import Tensor

from dsmr_kernels.spec import AttentionSpec


def bounded(spec: AttentionSpec, tokens: int, capacity: int) -> tuple[int, int, int]:
    """Horizon, segment length (0 = one segment) and offset as the kernels count them, in 32 bits.

    None of them is larger than the tokens of call and memory together: beyond that they make no difference.
    """
    most = tokens + capacity
    horizon, length, offset = min(spec.horizon, most), spec.segment_length, spec.segment_offset
    if length is None or length - offset >= tokens:
        return horizon, 0, min(offset, capacity)
    if length > most:
        length, offset = most, offset - (length - most)
    return horizon, length, offset


def bounded_rows(offsets: Tensor, length: int | None, tokens: int, capacity: int) -> Tensor:
    """Each row's own offset, for a segment length of at most the tokens of call and memory together."""
    most = tokens + capacity
    if length is None or length <= most:
        return offsets.contiguous()
    left = length - offsets  # until the segment ends
    return torch.where(left >= tokens, offsets.clamp(max=capacity), most - left)


def distances_seen(limits: tuple[int, int, int], sliding: bool, tokens: int, capacity: int) -> int:
    """How many distances a pair of query and key may have, of a call that is limited so (`bounded`): 0 ... n - 1."""
    horizon, length, _ = limits
    if sliding:
        return min(horizon + 1, tokens + capacity)
    return min(horizon + length if length else tokens + capacity, tokens + capacity)


def limits_of(spec: AttentionSpec, has_offsets: bool, tokens: int, capacity: int) -> tuple[int, int, int]:
    """Horizon, segment length and offset of a call, the rows of which may have offsets of their own."""
    limits = bounded(spec, tokens, capacity)
    if has_offsets:  # a segment that ends in no row may end in one
        limits = (limits[0], min(spec.segment_length or 0, tokens + capacity), 0)
    return limits
