"""The forward kernel: one online softmax over two sources, ring memory and current keys, read where they lie.

A program takes BM queries of one head. The keys that any of them sees form a stretch low ... p_last; the part below 0
lies in the ring. Blocks that all queries see are computed without a mask; only blocks on the slanted edges are masked.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import RUNTIME, head_of, load_rows, query_tile, store_rows, visit_keys


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    Q, K, V, MemoryK, MemoryV, Length, Position, PieceStart, Slopes, Out, Lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mk_batch, mk_head, mk_token, mv_batch, mv_head, mv_token,
    piece_stride, heads, group, scale_log2, queries, tokens, capacity, horizon, segment_length, segment_offset,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, HAS_PIECES: tl.constexpr, HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Out (B, Hq, T, D) and the natural log-sum-exp Lse (B, Hq, T), both contiguous."""
    line, b, h, row, p, low, position = query_tile(
        Length, Position, PieceStart, piece_stride, heads, queries, tokens, capacity, horizon, segment_length,
        segment_offset, SLIDING, HAS_MEMORY, HAS_PIECES, BM,
    )  # fmt: skip
    kv = h // group
    d = tl.arange(0, BD)
    q = head_of(Q, b, h, q_batch, q_head, UNIT)
    q = load_rows(q, row, q_token, d, row < queries, HEAD_DIM, HEAD_DIM == BD, False, UNIT)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
    acc, top, total = visit_keys(
        q, q, tl.zeros([BM, BD], dtype=tl.float32), tl.full([BM], -1.0e30, dtype=tl.float32),
        tl.zeros([BM], dtype=tl.float32),
        head_of(MemoryK, b, kv, mk_batch, mk_head, UNIT), head_of(MemoryV, b, kv, mv_batch, mv_head, UNIT),
        mk_token, mv_token,
        head_of(K, b, kv, k_batch, k_head, UNIT), head_of(V, b, kv, v_batch, v_head, UNIT),
        k_token, v_token,
        d, p, low, position, capacity, scale_log2, slope,
        False, HAS_MEMORY, HAS_ALIBI, PRECISION, HEAD_DIM, HEAD_DIM == BD, UNIT, BN,
    )  # fmt: skip
    store_rows(Out, line, row, queries, d, acc / total[:, None], HEAD_DIM)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(Lse + line.to(tl.int64) * queries + row, lse, mask=row < queries)
