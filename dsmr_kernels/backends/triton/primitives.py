"""What the kernels share: the visibility rule for a tile, and the address of a token in ring or call.

Keys are counted as in `dsmr_kernels.visibility`: j >= 0 is token j of the call, j < 0 lies in memory, in slot
(position + j) % capacity. Shapes of tiles stand behind them: BM queries, BN keys, BD padded head_dim.
"""

import triton
import triton.language as tl


@triton.jit
def lowest_visible(
    p,
    PieceStart,
    piece_stride,
    b,
    held,
    in_range,
    horizon,
    segment_length,
    segment_offset,
    SLIDING: tl.constexpr,
    HAS_PIECES: tl.constexpr,
):
    """The first key that each query of a tile sees, given that the row's memory holds `held` tokens.

    p: [BM] token indices. Returns [BM] int32. `segment_length` 0 stands for a call within one segment. Non-decreasing,
    also for the tokens out of range at the end of a tile, which repeat the last piece start.
    """
    if SLIDING:
        low = p - horizon
    else:
        segment = tl.where(segment_length > 0, (p + segment_offset) // tl.maximum(segment_length, 1), 0)
        low = segment * segment_length - segment_offset - horizon
    if HAS_PIECES:
        start = tl.load(PieceStart + b.to(tl.int64) * piece_stride + p, mask=in_range, other=-1)
        low = tl.where(start >= 0, tl.maximum(low, start), low)
    return tl.maximum(low, -held)


@triton.jit
def memory_rows(j, position, capacity):
    """Slots of the memory tokens j < 0: [BN] int32; position is already reduced modulo the capacity."""
    slot = position + j
    return tl.where(slot < 0, slot + capacity, slot)


@triton.jit
def load_rows(Base, rows, stride, d, in_range, head_dim, WHOLE_DIM: tl.constexpr, WHOLE_ROWS: tl.constexpr = False):
    """Rows of a (tokens, head_dim) matrix: [N] -> [N, BD]; zeros where out of range. WHOLE_ROWS: none is."""
    pointers = Base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE_ROWS:
        if WHOLE_DIM:
            return tl.load(pointers)
        return tl.load(pointers, mask=(d < head_dim)[None, :], other=0.0)
    if WHOLE_DIM:
        return tl.load(pointers, mask=in_range[:, None], other=0.0)
    return tl.load(pointers, mask=in_range[:, None] & (d < head_dim)[None, :], other=0.0)


@triton.jit
def key_blocks(first, full, p_first, low_end, high_end, BN: tl.constexpr):
    """How the keys low_end ... high_end - 1 of one source fall into blocks of BN.

    Some queries see keys from `first` on, all see them from `full` on, and all of them see up to `p_first`. Returns
    begin, inner, outer: [begin, inner) and [outer, high_end) need a mask, [inner, outer) is whole blocks that do not.
    """
    begin = tl.minimum(tl.maximum(first, low_end), high_end)
    inner = begin + tl.cdiv(tl.maximum(tl.minimum(full, high_end) - begin, 0), BN) * BN
    inner = tl.minimum(inner, high_end)
    outer = inner + tl.maximum(tl.minimum(p_first + 1, high_end) - inner, 0) // BN * BN
    return begin, inner, outer


@triton.jit
def edge_block(i, before, begin, inner, outer, high_end, B: tl.constexpr):
    """Start and end of the i-th masked block: `before` of them lie in [begin, inner), the others in [outer, ...)."""
    start = tl.where(i < before, begin + i * B, outer + (i - before) * B)
    return start, tl.where(i < before, inner, high_end)
