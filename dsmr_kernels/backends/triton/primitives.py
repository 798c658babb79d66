"""What the kernels share: the visibility rule for a tile, where a token's row lies, and the online softmax.

Keys are counted as in `dsmr_kernels.visibility`: j >= 0 is token j of the call, j < 0 lies in memory, in slot
(position + j) % capacity. Shapes of tiles stand behind them: BM queries, BN keys, BD and BV the padded head_dim of keys
and of values. Strides come in units of UNIT elements, so that rows are known to be aligned without a kernel of its own
for every stride.
"""

import triton
import triton.language as tl

# Distances of the table of a learned bias (`bias`) beyond those that are seen, on either side: at least the queries and
# keys of a tile together.
MARGIN = tl.constexpr(512)

# No value of these arguments compiles a kernel anew: neither 1 nor a multiple of 16 is a special case.
RUNTIME = (
    [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "mk", "mv", "g") for axis in ("batch", "head", "token")]
    + [f"{tensor}_{axis}" for tensor in ("ks", "vs") for axis in ("batch", "head")]
    + ["Length", "Position", "PieceStart", "Slopes", "Offsets", "KScale", "VScale", "GradLse"]
    + ["piece_stride", "width", "blocks", "heads", "kv_heads", "group", "queries", "tokens", "capacity"]
    + ["horizon", "segment_length", "segment_offset"]
)


@triton.jit
def lowest_visible(
    p, Start, held, horizon, segment_length, segment_offset, SLIDING: tl.constexpr, HAS_PIECES: tl.constexpr
):
    """The first key that each query of a tile sees, given that the row's memory holds `held` tokens.

    p: [BM] token indices of the call, Start: the row's piece starts. Returns [BM] int32, which never decreases.
    `segment_length` 0 stands for a call within one segment.
    """
    if SLIDING:
        low = p - horizon
    else:
        segment = tl.where(segment_length > 0, (p + segment_offset) // tl.maximum(segment_length, 1), 0)
        low = segment * segment_length - segment_offset - horizon
    if HAS_PIECES:
        start = tl.load(Start + p)
        low = tl.where(start >= 0, tl.maximum(low, start), low)
    return tl.maximum(low, -held)


@triton.jit
def offset_of(Offsets, b, capacity, segment_length, segment_offset, HAS_OFFSETS: tl.constexpr):
    """The segment offset of row b: its own, or the call's. In an endless segment none beyond the memory's capacity
    makes a difference, and only there may it be too large for 32 bits (see `training.bounded`)."""
    if HAS_OFFSETS:
        own = tl.load(Offsets + b)
        segment_offset = tl.where(segment_length > 0, own, tl.minimum(own, capacity)).to(tl.int32)
    return segment_offset


@triton.jit
def query_tile(
    Length, Position, PieceStart, Offsets, piece_stride, heads, queries, tokens, capacity, horizon, segment_length,
    segment_offset,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_PIECES: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """The queries of a program of the forward or dq kernel, and what they see.

    Returns the tile's row of the (batch * heads, queries) grid, batch index (int64) and head, the rows [BM] of q, their
    token indices p [BM] and lowest visible keys [BM], and the ring's write position. Rows past the end repeat the last.
    """
    tiles = tl.cdiv(queries, BM)
    # The last queries see the most: starting with them evens out the tail of the launch.
    tile = tiles - 1 - tl.program_id(0) % tiles
    line = tl.program_id(0) // tiles
    b = (line // heads).to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    p = tl.minimum(row, queries - 1) + tokens - queries
    held = 0
    position = 0
    if HAS_MEMORY:
        held = tl.minimum(tl.load(Length + b), capacity)
        position = (tl.load(Position + b) % capacity).to(tl.int32)
    segment_offset = offset_of(Offsets, b, capacity, segment_length, segment_offset, HAS_OFFSETS)
    low = lowest_visible(
        p, PieceStart + b * piece_stride, held, horizon, segment_length, segment_offset, SLIDING, HAS_PIECES
    )
    return line, b, line % heads, row, p, low, position


@triton.jit
def share_of_keys(p, low, BN: tl.constexpr):
    """Of the keys that a tile of queries sees, those of share `program_id(1)`: the lowest one for each query, [BM], and
    the end. A share is whole blocks, and may be empty."""
    first = tl.min(low, 0)
    share = tl.cdiv(tl.cdiv(tl.max(p, 0) + 1 - first, tl.num_programs(1)), BN) * BN
    begin = first + tl.program_id(1) * share
    return tl.maximum(low, begin), begin + share


@triton.jit
def head_of(Base, b, h, batch_stride, head_stride, UNIT: tl.constexpr):
    """Where the (tokens, head_dim) matrix of batch index b (int64) and head h begins."""
    return Base + (b * batch_stride + h.to(tl.int64) * head_stride) * UNIT


@triton.jit
def scales_of(KScale, VScale, b, kv, ks_batch, ks_head, vs_batch, vs_head, QUANTISED: tl.constexpr):
    """Where the scales of one head of a memory in int8 begin."""
    if QUANTISED:
        KScale += b * ks_batch + kv.to(tl.int64) * ks_head
        VScale += b * vs_batch + kv.to(tl.int64) * vs_head
    return KScale, VScale


@triton.jit
def memory_rows(j, position, capacity):
    """Slots of the memory tokens j < 0: [BN] int32; position is already reduced modulo the capacity."""
    slot = position + j
    return tl.where(slot < 0, slot + capacity, slot)


@triton.jit
def load_rows(
    Base, rows, stride, d, in_range, head_dim, WHOLE_DIM: tl.constexpr, WHOLE_ROWS: tl.constexpr = False,
    UNIT: tl.constexpr = 1,
):  # fmt: skip
    """Rows of a (tokens, head_dim) matrix: [N] -> [N, BD]; zeros where out of range. WHOLE_ROWS: none is.

    The stride, in units of UNIT elements, stays in 32 bits: the product of two such numbers is one instruction.
    """
    pointers = Base + (rows.to(tl.int64) * stride * UNIT)[:, None] + d[None, :]
    if WHOLE_ROWS:
        if WHOLE_DIM:
            return tl.load(pointers)
        return tl.load(pointers, mask=(d < head_dim)[None, :], other=0.0)
    if WHOLE_DIM:
        return tl.load(pointers, mask=in_range[:, None], other=0.0)
    return tl.load(pointers, mask=in_range[:, None] & (d < head_dim)[None, :], other=0.0)


@triton.jit
def store_rows(Base, line, rows, count, d, x, HEAD_DIM: tl.constexpr):
    """Write x [N, BD] to rows below `count` of matrix `line` of a contiguous (lines, count, head_dim) tensor."""
    pointers = Base + ((line.to(tl.int64) * count + rows) * HEAD_DIM)[:, None] + d[None, :]
    tl.store(pointers, x.to(Base.dtype.element_ty), mask=(rows < count)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def move_of(Slopes, h, width, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What moves the scores of head h by distance: its slope in base 2, or where its row of the table of `bias`, which
    then stands in the place of the slopes, has distance 0."""
    move = 0.0
    if HAS_BIAS:
        move = Slopes + h.to(tl.int64) * width + MARGIN
    elif HAS_ALIBI:
        move = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
    return move


@triton.jit
def moved(s, move, distance, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scores s in base 2 with what the distances of their keys add; `move` is that of `move_of`."""
    if HAS_BIAS:
        s += tl.load(move + distance)
    elif HAS_ALIBI:
        s -= move * distance.to(tl.float32)
    return s


@triton.jit
def nan_of(k_scale, v_scale):
    """The scales of keys [BN], and NaN for those whose values' scales are: where a value is no number the score is
    none, and a mask over the scores keeps it from whoever does not see it."""
    return tl.where(v_scale == v_scale, k_scale, v_scale)


@triton.jit
def numbers_of(scale):
    """Scales [BN] with 0 for those that are NaN, of which the scores know (`nan_of`)."""
    return tl.where(scale == scale, scale, 0.0)


@triton.jit
def shares(scale):
    """Scales [BN] as shares of the largest of them, and that one: what is rounded to sixteen bits does not underflow,
    however small the scales are."""
    largest = tl.max(scale, 0)
    return scale / tl.where(largest > 0, largest, 1.0), largest


@triton.jit
def softmax_step(s, top, total, scale_log2, LATE: tl.constexpr):
    """Take a block of scores s [BM, BN] into a softmax in base 2 whose maximum `top` and sum `total` [BM] run on.

    Returns the block's weights [BM, BN], the factor [BM] by which the sums so far shrink, and the new maximum and sum.
    With LATE it also scales the scores by `scale_log2` > 0. Scaling then costs nothing: of a row only the largest score
    is scaled, and for the others it becomes one instruction with the subtraction before the exponential.
    """
    block_top = tl.max(s, 1)
    if LATE:
        block_top *= scale_log2
        s *= scale_log2
    new_top = tl.maximum(top, block_top)  # finite from the start: a row that has seen nothing yet makes no NaN
    shrink = tl.exp2(top - new_top)
    w = tl.exp2(s - new_top[:, None])
    return w, shrink, new_top, total * shrink + tl.sum(w, 1)
