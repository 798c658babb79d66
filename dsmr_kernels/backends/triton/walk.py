"""The walk of a tile of queries over its keys, forward and backward: at most three stretches of rows that follow one
another, the older and the newer part of the ring on either side of its seam, and the call's own tokens.

Within a stretch a token's row is its number plus a constant, so that nothing in the inner loop knows of the ring.
Blocks that every query of the tile sees are computed without a mask; only those on the edges are masked.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import load_rows, moved, nan_of, numbers_of, shares, softmax_step


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
def _block(
    q, grad, acc, top, total, start, stop, shift, K, V, KScale, VScale, k_stride, v_stride, d, e, p, low, scale_log2,
    move,
    MASKED: tl.constexpr, QUANTISED: tl.constexpr, BACKWARD: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """One block of keys, start ... stop - 1 or BN of them, key j in row j + shift; see `visit_keys`.

    The forward without ALiBi or a bias leaves the scaling to `softmax_step`.
    """
    LATE: tl.constexpr = not (BACKWARD or HAS_ALIBI or HAS_BIAS)
    j = start + tl.arange(0, BN)
    in_range = j < stop
    rows = j + shift
    k = load_rows(K, rows, k_stride, d, in_range, HEAD_DIM, d.shape[0] == HEAD_DIM, not MASKED, UNIT)  # [BN, BD]
    v = load_rows(V, rows, v_stride, e, in_range, V_DIM, e.shape[0] == V_DIM, not MASKED, UNIT)  # [BN, BV]
    if QUANTISED:  # a scale belongs to a whole row of k or v: it may multiply what comes of the row instead
        k, v = k.to(q.dtype), v.to(q.dtype)
        k_scale = tl.load(KScale + rows, mask=in_range, other=0.0)  # [BN]
        v_scale = tl.load(VScale + rows, mask=in_range, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
    if QUANTISED:
        if BACKWARD:  # whose results are not kept apart once they are not finite
            s *= k_scale[None, :]
        else:
            s *= nan_of(k_scale, v_scale)[None, :]
    if not LATE:
        s *= scale_log2
    s = moved(s, move, p[:, None] - j[None, :], HAS_ALIBI, HAS_BIAS)
    if MASKED:
        s = tl.where((j[None, :] >= low[:, None]) & (j[None, :] <= p[:, None]) & in_range[None, :], s, -float("inf"))
    if BACKWARD:
        w = tl.exp2(s - top[:, None])
        dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if QUANTISED:
            dw *= v_scale[None, :]
        ds = w * (dw - total[:, None])
        if QUANTISED:
            share, largest = shares(k_scale)
            acc += tl.dot((ds * share[None, :]).to(k.dtype), k, input_precision=PRECISION) * largest
        else:
            acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    else:
        w, shrink, top, total = softmax_step(s, top, total, scale_log2, LATE)
        if QUANTISED:
            share, largest = shares(numbers_of(v_scale))
            acc = acc * shrink[:, None]
            acc += tl.dot((w * share[None, :]).to(v.dtype), v, input_precision=PRECISION) * largest
        else:
            acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _stretch(
    q, grad, acc, top, total, low_end, high_end, shift, K, V, KScale, VScale, k_stride, v_stride, d, e, p, low,
    scale_log2, move,
    QUANTISED: tl.constexpr, BACKWARD: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The keys low_end ... high_end - 1: first the blocks that every query sees, then those on the edges.

    Addresses are worked out in the loop (`disable_licm`): held from before, they would fill the registers.
    """
    first, full = tl.min(low, 0), tl.max(low, 0)  # some query sees from `first` on, every query from `full` on
    begin, inner, outer = key_blocks(first, full, tl.min(p, 0), low_end, high_end, BN)
    for start in tl.range(inner, outer, BN, disable_licm=True):
        acc, top, total = _block(
            q, grad, acc, top, total, start, outer, shift, K, V, KScale, VScale, k_stride, v_stride, d, e, p, low,
            scale_log2, move, False, QUANTISED, BACKWARD, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN,
        )  # fmt: skip
    before = tl.cdiv(inner - begin, BN)
    for i in tl.range(0, before + tl.cdiv(high_end - outer, BN), disable_licm=True):
        start, end = edge_block(i, before, begin, inner, outer, high_end, BN)
        acc, top, total = _block(
            q, grad, acc, top, total, start, end, shift, K, V, KScale, VScale, k_stride, v_stride, d, e, p, low,
            scale_log2, move, True, QUANTISED, BACKWARD, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN,
        )  # fmt: skip
    return acc, top, total


@triton.jit
def visit_keys(
    q, grad, acc, top, total, MK, MV, KScale, VScale, mk_stride, mv_stride, K, V, k_stride, v_stride, d, e, p, low,
    position, capacity, until, scale_log2, move,
    SPLIT: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_MEMORY: tl.constexpr, QUANTISED: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, UNROLLED: tl.constexpr,
):  # fmt: skip
    """Every key that a query of the tile sees, in memory and in the call; blocks that none of them sees are skipped.
    With SPLIT only keys before `until`.

    Forward: updates acc [BM, BV], the weighted sum of values, and the running maximum `top` and sum `total` [BM] of
    base-2 exponentials; `scale_log2` must be > 0. BACKWARD: adds to acc [BM, BD], the gradient of q; `top` is the
    base-2 log-sum-exp and `total` the delta of the rows, and both stay as they are.
    """
    p_last = tl.max(p, 0)
    if SPLIT:
        p_last = tl.minimum(p_last, until - 1)
    if HAS_MEMORY:
        oldest = tl.minimum(tl.min(low, 0), 0)
        seam = tl.maximum(oldest, -position)  # from here on a slot is position + j, before it a capacity more
        STRETCHES: tl.constexpr = 2 if QUANTISED else 3
        # One body serves all stretches, unless the memory's elements are others than the call's.
        for stretch in tl.range(0, STRETCHES, loop_unroll_factor=STRETCHES if UNROLLED else 1):
            low_end = tl.where(stretch == 0, oldest, tl.where(stretch == 1, seam, 0))
            high_end = tl.where(stretch == 0, seam, tl.where(stretch == 1, 0, p_last + 1))
            if SPLIT:
                high_end = tl.minimum(high_end, until)
            shift = tl.where(stretch == 0, position + capacity, tl.where(stretch == 1, position, 0))
            from_k, from_v, from_k_stride, from_v_stride = MK, MV, mk_stride, mv_stride
            if not QUANTISED:
                from_k, from_v = tl.where(stretch < 2, MK, K), tl.where(stretch < 2, MV, V)
                from_k_stride = tl.where(stretch < 2, mk_stride, k_stride)
                from_v_stride = tl.where(stretch < 2, mv_stride, v_stride)
            acc, top, total = _stretch(
                q, grad, acc, top, total, low_end, high_end, shift, from_k, from_v, KScale, VScale, from_k_stride,
                from_v_stride, d, e, p, low, scale_log2, move,
                QUANTISED, BACKWARD, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN,
            )  # fmt: skip
    if QUANTISED or not HAS_MEMORY:
        acc, top, total = _stretch(
            q, grad, acc, top, total, 0, p_last + 1, 0, K, V, KScale, VScale, k_stride, v_stride, d, e, p, low,
            scale_log2, move, False, BACKWARD, HAS_ALIBI, HAS_BIAS, PRECISION, HEAD_DIM, V_DIM, UNIT, BN,
        )  # fmt: skip
    return acc, top, total
