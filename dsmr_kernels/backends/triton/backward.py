"""The backward kernels, without atomics: the same inputs give the same bits.

`dq_kernel` runs over all visible keys, as the forward does. `dkv_kernel` runs over the call's keys alone, nothing is
computed for memory; with segments detached it takes queries of the key's own segment only. That leaves three of a split
backward's seven products for keys outside the segment. The gradients of a KV head are summed over its query group in
registers.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import edge_block, key_blocks, load_rows, lowest_visible, memory_rows


@triton.jit
def delta_kernel(
    Out,
    Grad,
    Delta,
    o_batch,
    o_head,
    o_token,
    g_batch,
    g_head,
    g_token,
    heads,
    head_dim,
    queries,
    WHOLE_DIM: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Delta[b, h, t] = sum over the head_dim of Out * Grad, in float32."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    valid = row < queries
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    out = load_rows(Out + b64 * o_batch + h64 * o_head, row, o_token, d, valid, head_dim, WHOLE_DIM)
    grad = load_rows(Grad + b64 * g_batch + h64 * g_head, row, g_token, d, valid, head_dim, WHOLE_DIM)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(Delta + tl.program_id(1).to(tl.int64) * queries + row, delta, mask=valid)


@triton.jit
def _dq_block(
    q, grad, dq, lse, delta, start, stop, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim, scale_log2,
    slope,
    MASKED: tl.constexpr, RING: tl.constexpr, HAS_ALIBI: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One block of keys: adds its share to dq [BM, BD]; lse is in base 2."""
    j = start + tl.arange(0, BN)
    in_range = j < stop
    rows = memory_rows(j, position, capacity) if RING else j
    k = load_rows(K, rows, k_stride, d, in_range, head_dim, WHOLE_DIM, not MASKED)  # [BN, BD]
    v = load_rows(V, rows, v_stride, d, in_range, head_dim, WHOLE_DIM, not MASKED)  # [BN, BD]
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2 - lse[:, None]  # [BM, BN]
    if HAS_ALIBI:
        s -= slope * (p[:, None] - j[None, :]).to(tl.float32)
    if MASKED:
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= p[:, None]) & in_range[None, :], s, -float("inf"))
    w = tl.exp2(s)
    dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # [BM, BN]
    ds = w * (dw - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _dq_source(
    q, grad, dq, lse, delta, begin, inner, outer, stop, K, V, k_stride, v_stride, d, p, low, position, capacity,
    head_dim, scale_log2, slope,
    RING: tl.constexpr, HAS_ALIBI: tl.constexpr, WHOLE_DIM: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All keys of one source: first the blocks that every query sees, then those on the edges (see `key_blocks`)."""
    for start in tl.range(inner, outer, BN):
        dq = _dq_block(
            q, grad, dq, lse, delta, start, outer, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim,
            scale_log2, slope, False, RING, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    before = tl.cdiv(inner - begin, BN)
    for i in tl.range(0, before + tl.cdiv(stop - outer, BN)):
        start, end = edge_block(i, before, begin, inner, outer, stop, BN)
        dq = _dq_block(
            q, grad, dq, lse, delta, start, end, K, V, k_stride, v_stride, d, p, low, position, capacity, head_dim,
            scale_log2, slope, True, RING, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    return dq


@triton.jit(do_not_specialize=["queries", "tokens", "capacity", "horizon", "segment_length", "segment_offset"])
def dq_kernel(
    Q,
    K,
    V,
    MemoryK,
    MemoryV,
    Length,
    Position,
    PieceStart,
    Slopes,
    Grad,
    Lse,
    Delta,
    DQ,
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
    g_batch,
    g_head,
    g_token,
    dq_batch,
    dq_head,
    dq_token,
    piece_stride,
    heads,
    group,
    head_dim,
    scale_log2,
    scale,
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
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv = h // group
    b64, h64, kv64 = b.to(tl.int64), h.to(tl.int64), kv.to(tl.int64)
    row = tile * BM + tl.arange(0, BM)
    valid = row < queries
    shift = tokens - queries
    p = tl.minimum(row, queries - 1) + shift  # [BM]
    d = tl.arange(0, BD)

    held = 0
    position = 0
    if HAS_MEMORY:
        held = tl.minimum(tl.load(Length + b), capacity)
        position = (tl.load(Position + b) % capacity).to(tl.int32)
    low = lowest_visible(
        p, PieceStart, piece_stride, b, held, p >= 0, horizon, segment_length, segment_offset, SLIDING, HAS_PIECES
    )
    first, full = tl.min(low, 0), tl.max(low, 0)
    p_first, p_last = tl.min(p, 0), tl.max(p, 0)

    q = load_rows(Q + b64 * q_batch + h64 * q_head, p - shift, q_token, d, valid, head_dim, WHOLE_DIM)
    grad = load_rows(Grad + b64 * g_batch + h64 * g_head, p - shift, g_token, d, valid, head_dim, WHOLE_DIM)
    at = tl.program_id(1).to(tl.int64) * queries + row
    lse = tl.load(Lse + at, mask=valid, other=0.0) * 1.4426950408889634
    delta = tl.load(Delta + at, mask=valid, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
    dq = tl.zeros([BM, BD], dtype=tl.float32)

    if HAS_MEMORY:
        mk, mv = MemoryK + b64 * mk_batch + kv64 * mk_head, MemoryV + b64 * mv_batch + kv64 * mv_head
        begin, inner, outer = key_blocks(first, full, p_first, first, 0, BN)
        dq = _dq_source(
            q, grad, dq, lse, delta, begin, inner, outer, 0, mk, mv, mk_token, mv_token, d, p, low, position, capacity,
            head_dim, scale_log2, slope, True, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
        )  # fmt: skip
    ck, cv = K + b64 * k_batch + kv64 * k_head, V + b64 * v_batch + kv64 * v_head
    begin, inner, outer = key_blocks(first, full, p_first, 0, p_last + 1, BN)
    dq = _dq_source(
        q, grad, dq, lse, delta, begin, inner, outer, p_last + 1, ck, cv, k_token, v_token, d, p, low, 0, 1,
        head_dim, scale_log2, slope, False, HAS_ALIBI, WHOLE_DIM, PRECISION, BN,
    )  # fmt: skip
    pointers = DQ + b64 * dq_batch + h64 * dq_head + row.to(tl.int64)[:, None] * dq_token + d[None, :]
    tl.store(pointers, (dq * scale).to(DQ.dtype.element_ty), mask=valid[:, None] & (d < head_dim)[None, :])


@triton.jit
def _blind_from(j, tokens, horizon, segment_length, segment_offset, SLIDING: tl.constexpr, DETACH: tl.constexpr):
    """The first query after the key j >= 0 that does not take part in its gradient, whatever the pieces.

    `lowest_visible` turned round: it never decreases along the keys either.
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
    return until


@triton.jit
def _dkv_block(
    k, v, dk, dv, j, until, start, stop, Q, Grad, Lse, Delta, Start, q_stride, g_stride, d, shift, head_dim, scale_log2,
    slope,
    MASKED: tl.constexpr, HAS_PIECES: tl.constexpr, HAS_ALIBI: tl.constexpr, WHOLE_DIM: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """One block of queries start ... : adds its share to dk and dv [BN, BD]. Scores are transposed, [BN, BM]."""
    p = start + tl.arange(0, BM)
    valid = p < stop
    q = load_rows(Q, p - shift, q_stride, d, valid, head_dim, WHOLE_DIM, not MASKED)  # [BM, BD]
    grad = load_rows(Grad, p - shift, g_stride, d, valid, head_dim, WHOLE_DIM, not MASKED)  # [BM, BD]
    lse = tl.load(Lse + (p - shift), mask=valid, other=0.0) * 1.4426950408889634
    delta = tl.load(Delta + (p - shift), mask=valid, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale_log2 - lse[None, :]  # [BN, BM]
    if HAS_ALIBI:
        s -= slope * (p[None, :] - j[:, None]).to(tl.float32)
    if MASKED:
        seen = (j[:, None] <= p[None, :]) & (p[None, :] < until[:, None])
        if HAS_PIECES:
            seen = seen & (tl.load(Start + p, mask=valid, other=0)[None, :] <= j[:, None])
        s = tl.where(seen, s, -float("inf"))
    w = tl.exp2(s)
    dv = tl.dot(w.to(grad.dtype), grad, dv, input_precision=PRECISION)
    dw = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # [BN, BM]
    ds = w * (dw - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["queries", "tokens", "horizon", "segment_length", "segment_offset"])
def dkv_kernel(
    Q,
    K,
    V,
    PieceStart,
    Slopes,
    Grad,
    Lse,
    Delta,
    DK,
    DV,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    g_batch,
    g_head,
    g_token,
    dk_batch,
    dk_head,
    dk_token,
    piece_stride,
    kv_heads,
    group,
    head_dim,
    scale_log2,
    scale,
    queries,
    tokens,
    horizon,
    segment_length,
    segment_offset,
    SLIDING: tl.constexpr,
    DETACH: tl.constexpr,
    HAS_PIECES: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    WHOLE_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    b, kv = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    j_first = tl.program_id(0) * BN
    j = j_first + tl.arange(0, BN)
    valid = j < tokens
    j_last = tl.minimum(j_first + BN, tokens) - 1
    d = tl.arange(0, BD)
    shift = tokens - queries
    # Queries begin ... stop - 1 may see one of the keys; inner ... outer - 1 see them all, unless pieces differ.
    until = _blind_from(j, tokens, horizon, segment_length, segment_offset, SLIDING, DETACH)
    stop = _blind_from(j_last, tokens, horizon, segment_length, segment_offset, SLIDING, DETACH)
    every = _blind_from(j_first, tokens, horizon, segment_length, segment_offset, SLIDING, DETACH)
    begin = tl.maximum(j_first, shift)
    stop = tl.maximum(stop, begin)
    inner = tl.minimum(begin + tl.cdiv(tl.maximum(j_last - begin, 0), BM) * BM, stop)
    outer = inner
    if not HAS_PIECES:
        outer = inner + tl.maximum(every - inner, 0) // BM * BM
    before = tl.cdiv(inner - begin, BM)
    edges = before + tl.cdiv(stop - outer, BM)

    k = load_rows(K + b64 * k_batch + kv64 * k_head, j, k_token, d, valid, head_dim, WHOLE_DIM)  # [BN, BD]
    v = load_rows(V + b64 * v_batch + kv64 * v_head, j, v_token, d, valid, head_dim, WHOLE_DIM)  # [BN, BD]
    dk = tl.zeros([BN, BD], dtype=tl.float32)
    dv = tl.zeros([BN, BD], dtype=tl.float32)
    piece = PieceStart + b64 * piece_stride
    for g in range(group):
        h = kv * group + g
        h64 = h.to(tl.int64)
        q_base, g_base = Q + b64 * q_batch + h64 * q_head, Grad + b64 * g_batch + h64 * g_head
        lse = Lse + (b64 * kv_heads * group + h64) * queries
        delta = Delta + (b64 * kv_heads * group + h64) * queries
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
        if not HAS_PIECES:
            for start in tl.range(inner, outer, BM):
                dk, dv = _dkv_block(
                    k, v, dk, dv, j, until, start, stop, q_base, g_base, lse, delta, piece, q_token, g_token, d, shift,
                    head_dim, scale_log2, slope, False, HAS_PIECES, HAS_ALIBI, WHOLE_DIM, PRECISION, BM,
                )  # fmt: skip
        for i in tl.range(0, edges):
            start, _ = edge_block(i, before, begin, inner, outer, stop, BM)
            dk, dv = _dkv_block(
                k, v, dk, dv, j, until, start, stop, q_base, g_base, lse, delta, piece, q_token, g_token, d, shift,
                head_dim, scale_log2, slope, True, HAS_PIECES, HAS_ALIBI, WHOLE_DIM, PRECISION, BM,
            )  # fmt: skip
    pointers = b64 * dk_batch + kv64 * dk_head + j.to(tl.int64)[:, None] * dk_token + d[None, :]
    keep = valid[:, None] & (d < head_dim)[None, :]
    tl.store(DK + pointers, (dk * scale).to(DK.dtype.element_ty), mask=keep)
    tl.store(DV + pointers, dv.to(DV.dtype.element_ty), mask=keep)
