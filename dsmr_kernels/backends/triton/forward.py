"""The forward kernel: one online softmax over two sources, ring memory and current keys, read where they lie.

A program takes BM queries of one head. The keys that any of them sees form a stretch low ... p_last; the part below 0
lies in the ring. Blocks that all queries see are computed without a mask; only blocks on the slanted edges are masked.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import (
    RUNTIME,
    head_of,
    load_rows,
    move_of,
    query_tile,
    scales_of,
    share_of_keys,
    store_rows,
)
from dsmr_kernels.backends.triton.walk import visit_keys


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    Q, K, V, MemoryK, MemoryV, KScale, VScale, Length, Position, PieceStart, Slopes, Offsets, Out, Lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mk_batch, mk_head, mk_token, mv_batch, mv_head, mv_token, ks_batch, ks_head, vs_batch, vs_head,
    piece_stride, heads, group, scale_log2, queries, tokens, capacity, horizon, segment_length, segment_offset,
    width,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, QUANTISED: tl.constexpr, HAS_PIECES: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSETS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    UNROLLED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Out (B, Hq, T, V_DIM) and the natural log-sum-exp Lse (B, Hq, T), both contiguous.

    With SPLIT share `program_id(1)` of the keys alone, for `splits.merge_kernel`: Out (splits, B, Hq, T, V_DIM) float32
    and Lse (splits, B, Hq, T) in base 2, minus infinity where a query sees none of them.
    """
    line, b, h, row, p, low, position = query_tile(
        Length, Position, PieceStart, Offsets, piece_stride, heads, queries, tokens, capacity, horizon, segment_length,
        segment_offset, SLIDING, HAS_MEMORY, HAS_PIECES, HAS_OFFSETS, BM,
    )  # fmt: skip
    until = 0
    if SPLIT:
        low, until = share_of_keys(p, low, BN)
    kv = h // group
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    q = head_of(Q, b, h, q_batch, q_head, UNIT)
    q = load_rows(q, row, q_token, d, row < queries, HEAD_DIM, HEAD_DIM == BD, False, UNIT)  # [BM, BD]
    move = move_of(Slopes, h, width, HAS_ALIBI, HAS_BIAS)
    k_scale, v_scale = scales_of(KScale, VScale, b, kv, ks_batch, ks_head, vs_batch, vs_head, QUANTISED)
    acc, top, total = visit_keys(
        q, q, tl.zeros([BM, BV], dtype=tl.float32), tl.full([BM], -1.0e30, dtype=tl.float32),
        tl.zeros([BM], dtype=tl.float32),
        head_of(MemoryK, b, kv, mk_batch, mk_head, UNIT), head_of(MemoryV, b, kv, mv_batch, mv_head, UNIT),
        k_scale, v_scale, mk_token, mv_token,
        head_of(K, b, kv, k_batch, k_head, UNIT), head_of(V, b, kv, v_batch, v_head, UNIT),
        k_token, v_token,
        d, e, p, low, position, capacity, until, scale_log2, move,
        SPLIT, False, HAS_MEMORY, QUANTISED, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN, UNROLLED,
    )  # fmt: skip
    if SPLIT:
        line += tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(queries, BM))
        sum_or_one = tl.where(total > 0, total, 1.0)
        store_rows(Out, line, row, queries, e, acc / sum_or_one[:, None], V_DIM)
        lse = tl.where(total > 0, top + tl.log2(sum_or_one), -float("inf"))
    else:
        store_rows(Out, line, row, queries, e, acc / total[:, None], V_DIM)
        lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(Lse + line.to(tl.int64) * queries + row, lse, mask=row < queries)
