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
def load_rows(Base, rows, stride, d, in_range, head_dim, WHOLE_DIM: tl.constexpr):
    """Rows of a (tokens, head_dim) matrix: [N] -> [N, BD]; zeros where out of range."""
    pointers = Base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if WHOLE_DIM:
        return tl.load(pointers, mask=in_range[:, None], other=0.0)
    return tl.load(pointers, mask=in_range[:, None] & (d < head_dim)[None, :], other=0.0)
