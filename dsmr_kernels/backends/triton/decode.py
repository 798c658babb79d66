"""Attention of the newest tokens over the ring, split along the keys: a partial softmax a split, then their sum.

A program takes one KV head of one row and a stretch of its visible slots; the query heads of the group and the new
tokens are stacked, so that they share each key that is read. The number of splits depends on the capacity and the
device alone and the stretches on lengths that are read on the device: nothing waits for the host, a graph captured once
serves every length, and sums run in a fixed order. A split without a visible slot writes a log-sum-exp of minus
infinity and contributes nothing.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmr_kernels.backends.triton.configs import choose, named, padded
from dsmr_kernels.backends.triton.launch import INTERPRETED, LOG2E, architecture, as_rows, launch_kernel, strides
from dsmr_kernels.backends.triton.primitives import load_rows, memory_rows, shares, softmax_step
from dsmr_kernels.ring import Ring


@triton.jit
def _decode_block(
    q, acc, top, total, start, stop, K, V, KScale, VScale, k_stride, v_stride, d, e, p, position, capacity, head_dim,
    v_dim, scale_log2, slope, bias, Buckets, buckets,
    MASKED: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, QUANTISED: tl.constexpr,
    WHOLE_DIM: tl.constexpr, WHOLE_V: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One block of slots: updates acc [BM, BV], the running maximum and sum [BM] of base-2 exponentials.

    `slope` [BM] is in base 2; `bias` [BM] points to the queries' rows of the learned bias.
    """
    j = start + tl.arange(0, BN)
    in_range = j < stop
    rows = memory_rows(j, position, capacity)
    k = load_rows(K, rows, k_stride, d, in_range, head_dim, WHOLE_DIM, not MASKED)  # [BN, BD]
    v = load_rows(V, rows, v_stride, e, in_range, v_dim, WHOLE_V, not MASKED)  # [BN, BV]
    s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale_log2  # [BM, BN]
    if QUANTISED:  # a scale belongs to a whole row of k or v: it may multiply the score and the weight instead
        s *= tl.load(KScale + rows, mask=in_range, other=0.0)[None, :]
    if HAS_ALIBI:
        s -= slope[:, None] * (p[:, None] - j[None, :]).to(tl.float32)
    if HAS_BIAS:  # noqa: SIM102, the one is decided when this is compiled, the other when it runs
        # It always holds, but makes these loads none that come early: keys and values would come less early for them.
        if buckets > 0:
            distance = tl.minimum(tl.maximum(p[:, None] - j[None, :], 0), buckets - 1)
            s += tl.load(bias[:, None] + tl.load(Buckets + distance)).to(tl.float32) * 1.4426950408889634
    if MASKED:
        s = tl.where((j[None, :] <= p[:, None]) & in_range[None, :], s, -float("inf"))
    w, shrink, top, total = softmax_step(s, top, total, scale_log2, False)  # [BM, BN]
    acc = acc * shrink[:, None]
    if QUANTISED:
        share, largest = shares(tl.load(VScale + rows, mask=in_range, other=0.0))
        acc += tl.dot((w * share[None, :]).to(q.dtype), v.to(q.dtype), input_precision=PRECISION) * largest
    else:
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=["Bias", "Buckets", "columns", "buckets", "new", "capacity"])
def decode_kernel(
    Q, K, V, KScale, VScale, Length, Position, Visible, Slopes, Sinks, Bias, Buckets, Out, Lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    ks_batch, ks_head, vs_batch, vs_head,
    kv_heads, group, head_dim, v_dim, scale_log2, columns, buckets, new, capacity,
    HAS_VISIBLE: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr,
    QUANTISED: tl.constexpr, DIRECT: tl.constexpr, WHOLE_DIM: tl.constexpr, WHOLE_V: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Split `program_id(1)` of the slots, for one tile of the stacked queries of one KV head.

    Out is (B, Hq, n, v_dim) with DIRECT, where there is one split, and else (B, Hq, n, splits, v_dim) float32;
    Lse (B, Hq, n, splits) in base 2. A query that sees nothing at all gives zeros. The sinks take part once: here where
    there is one split, else in `combine_kernel`.
    """
    stacked = group * new
    tiles = tl.cdiv(stacked, BM)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, kv = rest // kv_heads, rest % kv_heads
    b64, kv64 = b.to(tl.int64), kv.to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = tile * BM + tl.arange(0, BM)
    valid = row < stacked
    row = tl.minimum(row, stacked - 1)  # rows out of range repeat the last query
    h, i = kv * group + row // new, row % new  # [BM]
    p = i - new
    d, e = tl.arange(0, BD), tl.arange(0, BV)

    held = tl.minimum(tl.load(Length + b), capacity)
    if HAS_VISIBLE:
        held = tl.minimum(held, tl.load(Visible + b))
    position = (tl.load(Position + b) % capacity).to(tl.int32)
    stretch = tl.cdiv(tl.cdiv(held, splits), BN) * BN
    begin = split * stretch - held
    stop = tl.minimum(begin + stretch, 0)
    # All queries share the oldest slot; all of them see up to -new. Only blocks beyond that need a mask.
    outer = begin + tl.maximum(tl.minimum(stop, 1 - new) - begin, 0) // BN * BN

    q_rows = Q + b64 * q_batch + h.to(tl.int64)[:, None] * q_head + i.to(tl.int64)[:, None] * q_token + d[None, :]
    q = tl.load(q_rows, mask=(d < head_dim)[None, :], other=0.0)  # [BM, BD]
    slope = tl.zeros([BM], dtype=tl.float32)
    if HAS_ALIBI:
        slope = tl.load(Slopes + h).to(tl.float32) * 1.4426950408889634
    bias = Bias + h.to(tl.int64) * columns
    k_base, v_base = K + b64 * k_batch + kv64 * k_head, V + b64 * v_batch + kv64 * v_head
    k_scale, v_scale = KScale, VScale
    if QUANTISED:
        k_scale, v_scale = KScale + b64 * ks_batch + kv64 * ks_head, VScale + b64 * vs_batch + kv64 * vs_head
    acc = tl.zeros([BM, BV], dtype=tl.float32)
    top = tl.full([BM], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    if HAS_SINKS and DIRECT:  # a sum that has begun, without a value
        sink = tl.load(Sinks + h).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    for start in tl.range(begin, outer, BN):
        acc, top, total = _decode_block(
            q, acc, top, total, start, outer, k_base, v_base, k_scale, v_scale, k_token, v_token, d, e, p,
            position, capacity, head_dim, v_dim, scale_log2, slope, bias, Buckets, buckets,
            False, HAS_ALIBI, HAS_BIAS, QUANTISED, WHOLE_DIM, WHOLE_V, PRECISION, BN,
        )  # fmt: skip
    for start in tl.range(outer, stop, BN):
        acc, top, total = _decode_block(
            q, acc, top, total, start, stop, k_base, v_base, k_scale, v_scale, k_token, v_token, d, e, p,
            position, capacity, head_dim, v_dim, scale_log2, slope, bias, Buckets, buckets,
            True, HAS_ALIBI, HAS_BIAS, QUANTISED, WHOLE_DIM, WHOLE_V, PRECISION, BN,
        )  # fmt: skip

    sum_or_one = tl.where(total > 0, total, 1.0)
    out = acc / sum_or_one[:, None]
    at = (b64 * kv_heads * group + h) * new + i  # [BM], the query's number in (B, Hq, n)
    if not DIRECT:
        at = at * splits + split
        tl.store(Lse + at, tl.where(total > 0, top + tl.log2(sum_or_one), -float("inf")), mask=valid)
    # An empty split need not write: `combine_kernel` does not read what has no weight.
    keep = valid & (DIRECT | (total > 0))
    pointers = Out + at[:, None] * v_dim + e[None, :]
    tl.store(pointers, out.to(Out.dtype.element_ty), mask=keep[:, None] & (e < v_dim)[None, :])


@triton.jit(do_not_specialize=["Sinks", "heads", "new", "splits"])
def combine_kernel(
    Parts, Lse, Sinks, Out, v_dim, heads, new, splits, HAS_SINKS: tl.constexpr, BS: tl.constexpr, BV: tl.constexpr
):
    """Out[r] = the parts of query r, weighted by their shares of the sum of exponentials, in order of the splits."""
    r = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BV)
    acc = tl.zeros([BV], dtype=tl.float32)
    top, total = -1.0e30, 0.0
    if HAS_SINKS:
        sink = tl.load(Sinks + r // new % heads).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
        total = tl.exp2(sink - top)
    for first in tl.range(0, splits, BS):
        split = first + tl.arange(0, BS)
        lse = tl.load(Lse + r * splits + split, mask=split < splits, other=-float("inf"))  # [BS]
        seen = (lse > -1.0e30)[:, None] & (e < v_dim)[None, :]
        parts = tl.load(Parts + (r * splits + split)[:, None] * v_dim + e[None, :], mask=seen, other=0.0)  # [BS, BV]
        new_top = tl.maximum(top, tl.max(lse, 0))
        shrink = tl.exp2(top - new_top)
        w = tl.exp2(lse - new_top)
        acc = acc * shrink + tl.sum(parts * w[:, None], 0)
        total = total * shrink + tl.sum(w, 0)
        top = new_top
    out = acc / tl.where(total > 0, total, 1.0)
    tl.store(Out + r * v_dim + e, out.to(Out.dtype.element_ty), mask=e < v_dim)


MOST_SPLITS = 128


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter pretends to two, so that tests have several splits."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def splits_of(capacity: int, programs: int, processors: int, block: int) -> int:
    """Into how many splits a ring is cut: enough to occupy the device four times over, of two blocks at least."""
    wanted = triton.cdiv(4 * processors, programs)
    return max(1, min(wanted, capacity // (2 * block), MOST_SPLITS))


def _launch(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, position: Tensor,
    visible: Tensor | None, alibi: Tensor | None, sinks: Tensor | None, bias: Tensor | None,
    buckets: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    q, k, v = as_rows(q), as_rows(k), as_rows(v)
    length, position = length.contiguous(), position.contiguous()
    batch, heads, new, dim = q.shape
    kv_heads, capacity, v_dim = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty((*q.shape[:3], v_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group, bd, bv, widest = heads // kv_heads, padded(dim), padded(v_dim), max(dim, v_dim)
    part = architecture(q.device)
    kernel = named("decode" if group * new <= 16 else "decode_many", biased=bias is not None)
    config = choose(kernel, part, widest, q.dtype)
    programs = triton.cdiv(group * new, config.bm) * batch * kv_heads
    splits = splits_of(capacity, programs, _processors(q.device), config.bn)
    direct = splits == 1
    parts = out if direct else torch.empty((*q.shape[:3], splits, v_dim), dtype=torch.float32, device=q.device)
    lse = out if direct else torch.empty((*q.shape[:3], splits), dtype=torch.float32, device=q.device)
    scales = [as_rows(x) for x in (k_scale, v_scale) if x is not None]
    sink = q if sinks is None else sinks.contiguous()
    by_distance, sizes = (q, q), (0, 0)
    if bias is not None and buckets is not None:
        by_distance, sizes = (bias.contiguous(), buckets.contiguous()), (bias.shape[1], buckets.shape[0])
    # A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read.
    tensors = (
        q, k, v, *(scales or (q, q)), length, position, length if visible is None else visible.contiguous(),
        q if alibi is None else alibi.contiguous(), sink, *by_distance, parts, lse,
    )  # fmt: skip
    numbers = (
        *strides(q, k, v), *(strides(*scales, axes=2) or (0,) * 4),
        kv_heads, group, dim, v_dim, scale * LOG2E, *sizes, new, capacity,
    )  # fmt: skip
    constants = {
        "HAS_VISIBLE": visible is not None,
        "HAS_ALIBI": alibi is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SINKS": sinks is not None,
        "QUANTISED": bool(scales),
        "DIRECT": direct,
        "WHOLE_DIM": bd == dim,
        "WHOLE_V": bv == v_dim,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "BM": config.bm,
        "BN": config.bn,
        "BD": bd,
        "BV": bv,
    }
    grid, options = (programs, splits, 1), config.launch_options(part)
    launch_kernel(decode_kernel, grid, q.device, tensors, numbers, constants, options)
    if not direct:
        config = choose("combine", part, v_dim, q.dtype)
        grid, options = (batch * heads * new, 1, 1), config.launch_options(part)
        constants = {"HAS_SINKS": sinks is not None, "BS": config.bm, "BV": bv}
        numbers = (v_dim, heads, new, splits)
        launch_kernel(combine_kernel, grid, q.device, (parts, lse, sink, out), numbers, constants, options)
    return out


_operator = torch.library.custom_op("dsmr_kernels::triton_decode", _launch, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def decode_attention(
    q: Tensor,
    memory: Ring,
    visible: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    scale: float,
) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    call = _operator if torch.compiler.is_compiling() else _launch
    scales = (memory.k_scale, memory.v_scale)
    beside = (visible, alibi_slopes, sinks, bias, buckets)
    return call(q, memory.k, memory.v, *scales, memory.length, memory.position, *beside, scale)
