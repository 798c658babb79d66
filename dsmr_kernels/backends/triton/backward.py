"""The backward kernels, without atomics: the same inputs give the same bits.

`dq_kernel` runs over all visible keys, as the forward does, and leaves behind what `dkv_kernel` needs of the output;
where nobody asks for the gradient of q, it does only that.
`dkv_kernel` runs over the call's keys alone, nothing is computed for memory; with segments detached it takes queries of
the key's own segment only. That leaves three of a split backward's seven products for keys outside the segment. The
gradients of a KV head are summed over its query group in registers.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import (
    RUNTIME,
    head_of,
    load_rows,
    move_of,
    moved,
    offset_of,
    query_tile,
    scales_of,
    share_of_keys,
    store_rows,
)
from dsmr_kernels.backends.triton.walk import visit_keys


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    Q, K, V, MemoryK, MemoryV, KScale, VScale, Length, Position, PieceStart, Slopes, Offsets,
    Grad, GradLse, Out, Lse, Delta, DQ,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mk_batch, mk_head, mk_token, mv_batch, mv_head, mv_token, ks_batch, ks_head, vs_batch, vs_head,
    g_batch, g_head, g_token,
    piece_stride, heads, group, scale_log2, scale, queries, tokens, capacity, horizon, segment_length, segment_offset,
    width,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, QUANTISED: tl.constexpr, HAS_PIECES: tl.constexpr,
    HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSETS: tl.constexpr, HAS_LSE_GRAD: tl.constexpr,
    NEEDS_Q: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    UNROLLED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """DQ (B, Hq, T, HEAD_DIM) if it is needed, and Delta (B, Hq, T), by which every weight's gradient is lowered: the
    sums over V_DIM of Out * Grad less the gradient of the log-sum-exp. Out and GradLse, too, are contiguous.

    With SPLIT share `program_id(1)` of the keys alone: DQ (splits, B, Hq, T, HEAD_DIM) float32, whose sum is wanted.
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
    valid = row < queries
    at = line.to(tl.int64) * queries + row
    g_base = head_of(Grad, b, h, g_batch, g_head, UNIT)
    delta = tl.zeros([BM], dtype=tl.float32)
    if HAS_LSE_GRAD:
        delta -= tl.load(GradLse + at, mask=valid, other=0.0)
    for column in tl.static_range(0, BV, min(BV, 64)):  # by parts: two whole tiles in float32 fill the registers
        part = column + tl.arange(0, min(BV, 64))
        out = load_rows(Out, at, V_DIM, part, valid, V_DIM, V_DIM == BV)  # [BM, 64]
        grad = load_rows(g_base, row, g_token, part, valid, V_DIM, V_DIM == BV, False, UNIT)  # [BM, 64]
        delta += tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if SPLIT:
        tl.store(Delta + at, delta, mask=valid & (tl.program_id(1) == 0))
    else:
        tl.store(Delta + at, delta, mask=valid)
    if NEEDS_Q:
        grad = load_rows(g_base, row, g_token, e, valid, V_DIM, V_DIM == BV, False, UNIT)  # [BM, BV]
        lse = tl.load(Lse + at, mask=valid, other=0.0) * 1.4426950408889634
        q = head_of(Q, b, h, q_batch, q_head, UNIT)
        q = load_rows(q, row, q_token, d, valid, HEAD_DIM, HEAD_DIM == BD, False, UNIT)  # [BM, BD]
        move = move_of(Slopes, h, width, HAS_ALIBI, HAS_BIAS)
        k_scale, v_scale = scales_of(KScale, VScale, b, kv, ks_batch, ks_head, vs_batch, vs_head, QUANTISED)
        dq, _, _ = visit_keys(
            q, grad, tl.zeros([BM, BD], dtype=tl.float32), lse, delta,
            head_of(MemoryK, b, kv, mk_batch, mk_head, UNIT), head_of(MemoryV, b, kv, mv_batch, mv_head, UNIT),
            k_scale, v_scale, mk_token, mv_token,
            head_of(K, b, kv, k_batch, k_head, UNIT), head_of(V, b, kv, v_batch, v_head, UNIT),
            k_token, v_token,
            d, e, p, low, position, capacity, until, scale_log2, move,
            SPLIT, True, HAS_MEMORY, QUANTISED, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN, UNROLLED,
        )  # fmt: skip
        if SPLIT:
            line += tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(queries, BM))
        store_rows(DQ, line, row, queries, d, dq * scale, HEAD_DIM)


@triton.jit
def _blind_from(
    j, Start, shift, tokens, horizon, segment_length, segment_offset,
    SLIDING: tl.constexpr, DETACH: tl.constexpr, HAS_PIECES: tl.constexpr,
):  # fmt: skip
    """For each key j [BN] >= 0 of the call, the first token after it that does not take part in its gradient.

    `lowest_visible` turned round: it never decreases along the keys either. `Start`: the row's piece starts.
    """
    length = tl.maximum(segment_length, 1)
    until = j * 0 + tokens
    if SLIDING:
        until = tl.minimum(until, j + horizon + 1)
    else:
        end = ((j + segment_offset + horizon) // length + 1) * length - segment_offset
        until = tl.where(segment_length > 0, tl.minimum(until, end), until)
    if DETACH:
        end = ((j + segment_offset) // length + 1) * length - segment_offset
        until = tl.where(segment_length > 0, tl.minimum(until, end), until)
    if HAS_PIECES:  # the first token of a later piece: piece starts never decrease, so halve the stretch
        low = tl.maximum(j, shift)
        while tl.max(until - low, 0) > 0:
            middle = (low + until) // 2
            open = low < until
            later = tl.load(Start + middle, mask=open, other=0) > j
            low = tl.where(open & ~later, middle + 1, low)
            until = tl.where(open & later, middle, until)
    return until


@triton.jit
def _dkv_block(
    k, v, dk, dv, j, until, start, stop, edge, Q, Grad, Lse, Delta, q_stride, g_stride, d, e, shift, scale_log2, move,
    HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A block of queries from start on: adds its share to dk [BN, BD], dv [BN, BV]. Scores are transposed, [BN, BM]."""
    p = start + tl.arange(0, BM)
    valid = p < stop
    q = load_rows(Q, p - shift, q_stride, d, valid, HEAD_DIM, d.shape[0] == HEAD_DIM, False, UNIT)  # [BM, BD]
    grad = load_rows(Grad, p - shift, g_stride, e, valid, V_DIM, e.shape[0] == V_DIM, False, UNIT)  # [BM, BV]
    lse = tl.load(Lse + (p - shift), mask=valid, other=0.0) * 1.4426950408889634
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2  # [BN, BM]
    s = moved(s, move, p[None, :] - j[:, None], HAS_ALIBI, HAS_BIAS)
    if edge:
        seen = (j[:, None] <= p[None, :]) & (p[None, :] < until[:, None])
        s = tl.where(seen, s, -float("inf"))
    w = tl.exp2(s - lse[None, :])
    if NEEDS_V:
        dv = tl.dot(w.to(grad.dtype), grad, dv, input_precision=PRECISION)
    if NEEDS_K:
        delta = tl.load(Delta + (p - shift), mask=valid, other=0.0)
        dw = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [BN, BM]
        ds = w * (dw - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def dkv_kernel(
    Q, K, V, PieceStart, Slopes, Offsets, Grad, Lse, Delta, DK, DV,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    g_batch, g_head, g_token,
    piece_stride, kv_heads, group, scale_log2, scale, queries, tokens, horizon, segment_length, segment_offset,
    width,
    SLIDING: tl.constexpr, DETACH: tl.constexpr, HAS_PIECES: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OFFSETS: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_V: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """DK (B, Hkv, S, HEAD_DIM) and DV (B, Hkv, S, V_DIM), contiguous, those of them that are needed.

    With SPLIT share `program_id(1)` of the blocks of queries of all heads of the group alone: DK and DV are float32,
    with a first dimension of splits, and their sums are wanted.
    """
    tiles = tl.cdiv(tokens, BN)
    line = tl.program_id(0) // tiles
    b, kv = (line // kv_heads).to(tl.int64), line % kv_heads
    j_first = tl.program_id(0) % tiles * BN
    j = j_first + tl.arange(0, BN)
    j_last = tl.minimum(j_first + BN, tokens) - 1
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    shift = tokens - queries
    segment_offset = offset_of(Offsets, b, 0, segment_length, segment_offset, HAS_OFFSETS)
    until = _blind_from(
        j, PieceStart + b * piece_stride, shift, tokens, horizon, segment_length, segment_offset,
        SLIDING, DETACH, HAS_PIECES,
    )  # fmt: skip
    # Queries begin ... stop - 1 see one of the keys; those from j_last to every - 1 see them all.
    begin, every = tl.maximum(j_first, shift), tl.min(until, 0)
    stop = tl.maximum(tl.max(until, 0), begin)
    k, v = head_of(K, b, kv, k_batch, k_head, UNIT), head_of(V, b, kv, v_batch, v_head, UNIT)
    k = load_rows(k, j, k_token, d, j < tokens, HEAD_DIM, HEAD_DIM == BD, False, UNIT)  # [BN, BD]
    v = load_rows(v, j, v_token, e, j < tokens, V_DIM, V_DIM == BV, False, UNIT)  # [BN, BV]
    dk = tl.zeros([BN, BD], dtype=tl.float32)
    dv = tl.zeros([BN, BV], dtype=tl.float32)
    blocks, share = 0, 0
    if SPLIT:
        blocks = tl.cdiv(stop - begin, BM)
        share = tl.cdiv(group * blocks, tl.num_programs(1))
    for g in range(group):
        h = kv * group + g
        q_base, g_base = head_of(Q, b, h, q_batch, q_head, UNIT), head_of(Grad, b, h, g_batch, g_head, UNIT)
        at = ((b * kv_heads * group) + h) * queries
        move = move_of(Slopes, h, width, HAS_ALIBI, HAS_BIAS)
        low, high = begin, stop
        if SPLIT:
            skipped = tl.program_id(1) * share - g * blocks
            low = begin + tl.minimum(tl.maximum(skipped, 0), blocks) * BM
            high = tl.minimum(begin + tl.minimum(tl.maximum(skipped + share, 0), blocks) * BM, stop)
        for start in tl.range(low, high, BM, disable_licm=max(HEAD_DIM, V_DIM) > 64):
            edge = (start < j_last) | (start + BM > every)  # masked; in the blocks between, every query sees every key
            dk, dv = _dkv_block(
                k, v, dk, dv, j, until, start, stop, edge, q_base, g_base, Lse + at, Delta + at, q_token, g_token,
                d, e, shift, scale_log2, move, HAS_ALIBI, HAS_BIAS, NEEDS_K, NEEDS_V, PRECISION, HEAD_DIM, V_DIM, UNIT,
                BM,
            )  # fmt: skip
    if SPLIT:
        line += tl.program_id(1) * (tl.num_programs(0) // tiles)
    if NEEDS_K:
        store_rows(DK, line, j, tokens, d, dk * scale, HEAD_DIM)
    if NEEDS_V:
        store_rows(DV, line, j, tokens, e, dv, V_DIM)
