"""What the kernels share: the visibility rule for a tile, where a token's row lies, the online softmax, and the walk
over a tile's keys.

Keys are counted as in `dsmr_kernels.visibility`: j >= 0 is token j of the call, j < 0 lies in memory, in slot
(position + j) % capacity. Shapes of tiles stand behind them: BM queries, BN keys, BD padded head_dim. Strides come in
units of UNIT elements, so that rows are known to be aligned without a kernel of its own for every stride.
"""

import triton
import triton.language as tl

# No value of these arguments compiles a kernel anew: neither 1 nor a multiple of 16 is a special case.
RUNTIME = (
    [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "mk", "mv", "g") for axis in ("batch", "head", "token")]
    + ["Length", "Position", "PieceStart", "Slopes", "piece_stride", "heads", "kv_heads", "group"]
    + ["queries", "tokens", "capacity", "horizon", "segment_length", "segment_offset"]
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
def query_tile(
    Length, Position, PieceStart, piece_stride, heads, queries, tokens, capacity, horizon, segment_length,
    segment_offset,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_PIECES: tl.constexpr, BM: tl.constexpr,
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
    low = lowest_visible(
        p, PieceStart + b * piece_stride, held, horizon, segment_length, segment_offset, SLIDING, HAS_PIECES
    )
    return line, b, line % heads, row, p, low, position


@triton.jit
def head_of(Base, b, h, batch_stride, head_stride, UNIT: tl.constexpr):
    """Where the (tokens, head_dim) matrix of batch index b (int64) and head h begins."""
    return Base + (b * batch_stride + h.to(tl.int64) * head_stride) * UNIT


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


@triton.jit
def _block(
    q, grad, acc, top, total, start, stop, K, V, k_stride, v_stride, d, p, low, position, capacity, scale_log2, slope,
    MASKED: tl.constexpr, RING: tl.constexpr, BACKWARD: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One block of keys, start ... stop - 1 or BN of them; see `visit_keys`.

    The forward without ALiBi leaves the scaling to `softmax_step`.
    """
    LATE: tl.constexpr = not (BACKWARD or HAS_ALIBI)
    j = start + tl.arange(0, BN)
    in_range = j < stop
    rows = memory_rows(j, position, capacity) if RING else j
    k = load_rows(K, rows, k_stride, d, in_range, HEAD_DIM, WHOLE_DIM, not MASKED, UNIT)  # [BN, BD]
    v = load_rows(V, rows, v_stride, d, in_range, HEAD_DIM, WHOLE_DIM, not MASKED, UNIT)  # [BN, BD]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if not LATE:
        s *= scale_log2
    if HAS_ALIBI:
        s -= slope * (p[:, None] - j[None, :]).to(tl.float32)
    if MASKED:
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= p[:, None]) & in_range[None, :], s, -float("inf"))
    if BACKWARD:
        w = tl.exp2(s - top[:, None])
        ds = w * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - total[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    else:
        w, shrink, top, total = softmax_step(s, top, total, scale_log2, LATE)
        acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _source(
    q, grad, acc, top, total, begin, inner, outer, stop, K, V, k_stride, v_stride, d, p, low, position, capacity,
    scale_log2, slope,
    RING: tl.constexpr, BACKWARD: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """All keys of one source: first the blocks that every query sees, then those on the edges (see `key_blocks`)."""
    for start in tl.range(inner, outer, BN, disable_licm=HEAD_DIM > 128):  # nothing more is held in registers there
        acc, top, total = _block(
            q, grad, acc, top, total, start, outer, K, V, k_stride, v_stride, d, p, low, position, capacity, scale_log2,
            slope, False, RING, BACKWARD, HAS_ALIBI, PRECISION, HEAD_DIM, WHOLE_DIM, UNIT, BN,
        )  # fmt: skip
    before = tl.cdiv(inner - begin, BN)
    for i in tl.range(0, before + tl.cdiv(stop - outer, BN), disable_licm=HEAD_DIM > 128):
        start, end = edge_block(i, before, begin, inner, outer, stop, BN)
        acc, top, total = _block(
            q, grad, acc, top, total, start, end, K, V, k_stride, v_stride, d, p, low, position, capacity, scale_log2,
            slope, True, RING, BACKWARD, HAS_ALIBI, PRECISION, HEAD_DIM, WHOLE_DIM, UNIT, BN,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def visit_keys(
    q, grad, acc, top, total, MK, MV, mk_stride, mv_stride, K, V, k_stride, v_stride, d, p, low, position, capacity,
    scale_log2, slope,
    BACKWARD: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_ALIBI: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, WHOLE_DIM: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Every key that a query of the tile sees, in memory and in the call; blocks that none of them sees are skipped.

    Forward: updates acc [BM, BD], the weighted sum of values, and the running maximum `top` and sum `total` [BM] of
    base-2 exponentials; `scale_log2` must be > 0. BACKWARD: adds to acc, the gradient of q; `top` is the base-2
    log-sum-exp and `total` the delta of the rows, and both stay as they are.
    """
    first, full = tl.min(low, 0), tl.max(low, 0)  # some query sees from `first` on, every query from `full` on
    p_first, p_last = tl.min(p, 0), tl.max(p, 0)
    if HAS_MEMORY:
        begin, inner, outer = key_blocks(first, full, p_first, first, 0, BN)
        acc, top, total = _source(
            q, grad, acc, top, total, begin, inner, outer, 0, MK, MV, mk_stride, mv_stride, d, p, low, position,
            capacity, scale_log2, slope, True, BACKWARD, HAS_ALIBI, PRECISION, HEAD_DIM, WHOLE_DIM, UNIT, BN,
        )  # fmt: skip
    begin, inner, outer = key_blocks(first, full, p_first, 0, p_last + 1, BN)
    return _source(
        q, grad, acc, top, total, begin, inner, outer, p_last + 1, K, V, k_stride, v_stride, d, p, low, 0, 1,
        scale_log2, slope, False, BACKWARD, HAS_ALIBI, PRECISION, HEAD_DIM, WHOLE_DIM, UNIT, BN,
    )  # fmt: skip
