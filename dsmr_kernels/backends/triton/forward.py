"""The forward kernel: one online softmax over two sources, ring memory and current keys, read where they lie.

A program takes BM queries of one head. The keys that any of them sees form a stretch low ... p_last; the part below 0
lies in the ring. Blocks that all queries see are computed without a mask; only blocks on the slanted edges are masked.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import edge_block, key_blocks, load_rows, lowest_visible, memory_rows


@triton.jit
def _block(
    q, acc, top, total, start, stop, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim, scale_log2,
    slope,
    MASKED: tl.constexpr, RING: tl.constexpr, HAS_ALIBI: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One block of keys: updates acc [BM, BD], the running maximum and sum [BM] of base-2 exponentials."""
    j = start + tl.arange(0, BN)
    in_range = j < stop
    rows = memory_rows(j, position, capacity) if RING else j
    k = load_rows(K, rows, k_stride, d, in_range, head_dim, WHOLE_DIM, not MASKED)  # [BN, BD]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BM, BN]
    if HAS_ALIBI:
        s -= slope * (p[:, None] - j[None, :]).to(tl.float32)
    if MASKED:
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= p[:, None]) & in_range[None, :], s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))  # finite from the start, so a row that has seen nothing yet makes no NaN
    shrink = tl.exp2(top - new_top)
    w = tl.exp2(s - new_top[:, None])  # [BM, BN]
    total = total * shrink + tl.sum(w, 1)
    v = load_rows(V, rows, v_stride, d, in_range, head_dim, WHOLE_DIM, not MASKED)  # [BN, BD]
    acc = acc * shrink[:, None]
    acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _source(
    q, acc, top, total, begin, inner, outer, stop, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim,
    scale_log2, slope,
    RING: tl.constexpr, HAS_ALIBI: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All keys of one source: first the blocks that every query sees, then those on the edges (see `key_blocks`)."""
    for start in tl.range(inner, outer, BN):
        acc, top, total = _block(
            q, acc, top, total, start, outer, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim,
            scale_log2, slope, False, RING, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    before = tl.cdiv(inner - begin, BN)
    for i in tl.range(0, before + tl.cdiv(stop - outer, BN)):
        start, end = edge_block(i, before, begin, inner, outer, stop, BN)
        acc, top, total = _block(
            q, acc, top, total, start, end, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim,
            scale_log2, slope, True, RING, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=["queries", "tokens", "capacity", "horizon", "segment_length", "segment_offset"])
def forward_kernel(
    Q,
    K,
    V,
    MemoryK,
    MemoryV,
    Length,
    Position,
    PieceStart,
    Slopes,
    Out,
    Lse,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    mk_batch,
    mk_head,
    mk_token,
    mv_batch,
    mv_head,
    mv_token,
    o_batch,
    o_head,
    o_token,
    piece_stride,
    heads,
    group,
    head_dim,
    scale_log2,
    queries,
    tokens,
    capacity,
    horizon,
    segment_length,
    segment_offset,
    SLIDING: tl.constexpr,
    HAS_MEMORY: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    WHOLE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    # The last queries see the most: starting with them evens out the tail of the launch.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv = h // group
    b64 = b.to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    valid = row < queries
    shift = tokens - queries
    p = tl.minimum(row, queries - 1) + shift  # [BM]; rows out of range repeat the last query
    d = tl.arange(0, BD)

    held = 0
    position = 0
    if HAS_MEMORY:
        held = tl.minimum(tl.load(Length + b), capacity)
        position = (tl.load(Position + b) % capacity).to(tl.int32)
    low = lowest_visible(
        p, PieceStart, piece_stride, b, held, p >= 0, horizon, segment_length, segment_offset, SLIDING, HAS_PIECES
    )
    first, full = tl.min(low, 0), tl.max(low, 0)  # any query sees from `first` on, every query from `full` on
    p_first, p_last = tl.min(p, 0), tl.max(p, 0)

    q = load_rows(Q + b64 * q_batch + h.to(tl.int64) * q_head, p - shift, q_token, d, valid, head_dim, WHOLE_DIM)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
    acc = tl.zeros([BM, BD], dtype=tl.float32)
    top = tl.full([BM], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)

    if HAS_MEMORY:
        mk = MemoryK + b64 * mk_batch + kv.to(tl.int64) * mk_head
        mv = MemoryV + b64 * mv_batch + kv.to(tl.int64) * mv_head
        begin, inner, outer = key_blocks(first, full, p_first, first, 0, BN)
        acc, top, total = _source(
            q, acc, top, total, begin, inner, outer, 0, mk, mv, mk_token, mv_token, d, p, low, position, capacity,
            head_dim, scale_log2, slope, True, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    ck = K + b64 * k_batch + kv.to(tl.int64) * k_head
    cv = V + b64 * v_batch + kv.to(tl.int64) * v_head
    begin, inner, outer = key_blocks(first, full, p_first, 0, p_last + 1, BN)
    acc, top, total = _source(
        q, acc, top, total, begin, inner, outer, p_last + 1, ck, cv, k_token, v_token, d, p, low, 0, 1,
        head_dim, scale_log2, slope, False, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
    )  # fmt: skip

    out = acc / total[:, None]
    pointers = Out + b64 * o_batch + h.to(tl.int64) * o_head + row.to(tl.int64)[:, None] * o_token + d[None, :]
    tl.store(pointers, out.to(Out.dtype.element_ty), mask=valid[:, None] & (d < head_dim)[None, :])
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(Lse + tl.program_id(1).to(tl.int64) * queries + row, lse, mask=valid)
