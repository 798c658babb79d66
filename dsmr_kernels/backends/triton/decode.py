"""Attention of the newest tokens over the ring, split along the keys: a partial softmax a split, then their sum, in one
launch: the last split to be done sums them all up, in their order, so that it does not matter which one is last.

A program takes one KV head of one row and a stretch of its visible slots; the query heads of the group and the new
tokens are stacked, so that they share each key that is read. The number of splits depends on the capacity and the
device alone and the stretches on lengths that are read on the device: nothing waits for the host, a graph captured once
serves every length, and sums run in a fixed order. A split without a visible slot does nothing, and is not waited for.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmr_kernels.backends.triton import configs
from dsmr_kernels.backends.triton.arrivals import MOST_COUNTERS, arrives_last, launch_counting
from dsmr_kernels.backends.triton.configs import choose, named, padded
from dsmr_kernels.backends.triton.launch import LOG2E, Launch, architecture, as_rows, processors
from dsmr_kernels.backends.triton.primitives import load_rows, memory_rows, nan_of, numbers_of, shares, softmax_step
from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Alike


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
        k_scale = tl.load(KScale + rows, mask=in_range, other=0.0)  # [BN]
        v_scale = tl.load(VScale + rows, mask=in_range, other=0.0)
        s *= nan_of(k_scale, v_scale)[None, :]
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
        share, largest = shares(numbers_of(v_scale))
        acc += tl.dot((w * share[None, :]).to(q.dtype), v.to(q.dtype), input_precision=PRECISION) * largest
    else:
        acc = tl.dot(w.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _combine(
    Parts, Lse, Out, Sinks, line, first, stacked, splits, used, new, e, v_dim,
    HAS_SINKS: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Out's queries first ... first + ROWS - 1 of a KV head: their parts, weighted by their shares of the sum of
    exponentials, in the order of the splits."""
    row = first + tl.arange(0, ROWS)
    valid = row < stacked
    row = tl.minimum(row, stacked - 1)
    at = line.to(tl.int64) * stacked + row
    every = tl.arange(0, MOST)
    # Past the first cache, which knows nothing of what other multiprocessors have written, and nothing is read twice.
    lse = tl.load(
        Lse + at[:, None] * splits + every[None, :], mask=(every < used)[None, :], other=-float("inf"),
        cache_modifier=".cg",
    )  # fmt: skip
    top = tl.maximum(tl.max(lse, 1), -1.0e30)  # [ROWS]
    if HAS_SINKS:
        sink = tl.load(Sinks + row // new).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    total = tl.sum(tl.exp2(lse - top[:, None]), 1)
    if HAS_SINKS:
        total += tl.exp2(sink - top)
    acc = tl.zeros([ROWS, AT_ONCE, e.shape[0]], dtype=tl.float32)
    for start in tl.range(0, used, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        among = (split < used)[None, :]
        number = at[:, None] * splits + split[None, :]  # [ROWS, AT_ONCE]
        w = tl.exp2(tl.load(Lse + number, mask=among, other=-float("inf"), cache_modifier=".cg") - top[:, None])
        part = tl.load(
            Parts + number[:, :, None] * v_dim + e[None, None, :],
            mask=(among & valid[:, None])[:, :, None] & (e < v_dim)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        acc += part * w[:, :, None]
    out = tl.sum(acc, 1) / tl.where(total > 0, total, 1.0)[:, None]
    pointers = Out + at[:, None] * v_dim + e[None, :]
    tl.store(pointers, out.to(Out.dtype.element_ty), mask=valid[:, None] & (e < v_dim)[None, :])


@triton.jit(do_not_specialize=["Bias", "Buckets", "columns", "buckets", "new", "capacity"])
def decode_kernel(
    Q, K, V, KScale, VScale, Length, Position, Visible, Slopes, Sinks, Bias, Buckets, Out, Parts, Counters,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    ks_batch, ks_head, vs_batch, vs_head,
    kv_heads, group, head_dim, v_dim, scale_log2, columns, buckets, new, capacity,
    HAS_VISIBLE: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr,
    QUANTISED: tl.constexpr, DIRECT: tl.constexpr, WHOLE_DIM: tl.constexpr, WHOLE_V: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, AT_ONCE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Split `program_id(1)` of the slots, for one tile of the stacked queries of one KV head.

    Out is (B, Hq, n, v_dim). With DIRECT there is one split, which writes it. Else a split writes to Parts, float32:
    first (B, Hq, n, splits, v_dim), then log-sum-exps (B, Hq, n, splits) in base 2; and the last of them sums up. A
    query that sees nothing at all gives zeros. The sinks take part once: here with DIRECT, else in the sum.
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
    whole = valid[:, None] & (e < v_dim)[None, :]
    if DIRECT:
        tl.store(Out + at[:, None] * v_dim + e[None, :], out.to(Out.dtype.element_ty), mask=whole)
    else:
        used = tl.maximum(tl.cdiv(held, tl.maximum(stretch, 1)), 1)  # splits with slots; those without do nothing
        if split < used:
            rows = tl.num_programs(0) // tiles * stacked
            Lse = Parts + rows.to(tl.int64) * splits * v_dim
            at = at * splits + split
            tl.store(Lse + at, tl.where(total > 0, top + tl.log2(sum_or_one), -float("inf")), mask=valid)
            tl.store(Parts + at[:, None] * v_dim + e[None, :], out, mask=whole)
            if arrives_last(Counters + tl.program_id(0), used):
                _combine(
                    Parts, Lse, Out, Sinks + kv * group, rest, tile * BM, stacked, splits, used, new, e, v_dim,
                    HAS_SINKS, ROWS, AT_ONCE, MOST,
                )  # fmt: skip


MOST_SPLITS = 128
SUMMED_AT_ONCE = 4096  # numbers of the parts: 32 registers of a thread


def splits_of(capacity: int, programs: int, processors: int, block: int) -> int:
    """Into how many splits a ring is cut: enough to occupy the device twice over, of two blocks at least. Reading hides
    behind reading with two programs a multiprocessor, and what the last one of them reads again grows with the splits.
    """
    wanted = triton.cdiv(2 * processors, programs)
    return max(1, min(wanted, capacity // (2 * block), MOST_SPLITS)) if programs <= MOST_COUNTERS else 1


_TABLES = 16  # launches of calls that are alike but for what stands beside them


class _Call(NamedTuple):
    """What a launch depends on: everything but where its tensors lie."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]  # of q, k and v
    strides: tuple[tuple[int, ...], ...]
    scale_strides: tuple[int, ...]  # of batch and head
    by_distance: tuple[int, int]  # columns of a learned bias, and distances that have a bucket; 0 = no bias
    quantised: bool
    has_visible: bool
    has_alibi: bool
    has_sinks: bool
    scale: float
    processors: int
    generation: int


@functools.lru_cache(1024)
def _plan(of: _Call) -> tuple[Launch, int, int]:
    """The launch, its programs along the first axis, and its splits."""
    (batch, heads, new, dim), (_, kv_heads, capacity, _), (*_, v_dim) = of.shapes
    group, bd, bv = heads // kv_heads, padded(dim), padded(v_dim)
    stacked, part = group * new, architecture(of.device)
    biased = of.by_distance[0] > 0
    kernel = named("decode" if stacked <= 16 else "decode_many", of.quantised, biased)
    config = choose(kernel, part, max(dim, v_dim), of.dtypes[0])
    programs = triton.cdiv(stacked, config.bm) * batch * kv_heads
    splits = splits_of(capacity, programs, of.processors, config.bn)
    rows = 1 if splits == 1 else min(triton.next_power_of_2(stacked), config.bm)
    numbers = (
        *(stride for strides in of.strides for stride in strides[:3]), *of.scale_strides,
        kv_heads, group, dim, v_dim, of.scale * LOG2E, *of.by_distance, new, capacity,
    )  # fmt: skip
    constants = {
        "HAS_VISIBLE": of.has_visible,
        "HAS_ALIBI": of.has_alibi,
        "HAS_BIAS": biased,
        "HAS_SINKS": of.has_sinks,
        "QUANTISED": of.quantised,
        "DIRECT": splits == 1,
        "WHOLE_DIM": bd == dim,
        "WHOLE_V": bv == v_dim,
        "PRECISION": "ieee" if of.dtypes[0] == torch.float32 else "tf32",
        "BM": config.bm,
        "BN": config.bn,
        "BD": bd,
        "BV": bv,
        "ROWS": rows,
        "AT_ONCE": max(1, SUMMED_AT_ONCE // (rows * bv)),
        "MOST": MOST_SPLITS,
    }
    dtypes = (*of.dtypes, of.dtypes[0], *((of.dtypes[0],) * 2 if splits == 1 else (torch.float32, torch.int32)))
    options = config.launch_options(part)
    return (
        Launch(decode_kernel, (programs, splits, 1), of.device, dtypes, numbers, constants, options),
        programs,
        splits,
    )


def _launch(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, position: Tensor,
    visible: Tensor | None, alibi: Tensor | None, sinks: Tensor | None, bias: Tensor | None, buckets: Tensor | None,
    scale: float, keep: bool = True, kind: Alike | None = None,
) -> Tensor:  # fmt: skip
    if kind is None:
        q, k, v = as_rows(q), as_rows(k), as_rows(v)
    v_dim, device = v.shape[3], q.device
    if v_dim == q.shape[3]:  # `torch.empty` takes longer
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = torch.empty((*q.shape[:3], v_dim), dtype=q.dtype, device=device)
    if out.numel() == 0:
        return out
    # A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read.
    scales, scale_strides = (q, q), (0, 0, 0, 0)
    if k_scale is not None and v_scale is not None:
        scales = k_scale, v_scale = as_rows(k_scale), as_rows(v_scale)
        scale_strides = (*k_scale.stride()[:2], *v_scale.stride()[:2])  # type: ignore[assignment]
    table, by_distance = (q, q), (0, 0)
    if bias is not None and buckets is not None:
        table, by_distance = (bias.contiguous(), buckets.contiguous()), (bias.shape[1], buckets.shape[0])
    length = length.contiguous()
    tensors = (
        q, k, v, *scales, length, position.contiguous(), length if visible is None else visible.contiguous(),
        q if alibi is None else alibi.contiguous(), q if sinks is None else sinks.contiguous(), *table,
    )  # fmt: skip
    # What calls alike may differ in.
    tables = (
        configs.generation, processors(device), by_distance, visible is not None,
        *(None if x is None else x.dtype for x in (alibi, sinks, bias)),
    )  # fmt: skip
    found = None if kind is None else kind.plans.get(tables)
    if found is None:
        found = _plan(
            _Call(
                device,
                tuple([x.dtype for x in tensors]),
                (q.shape, k.shape, v.shape),
                (q.stride(), k.stride(), v.stride()),
                scale_strides,
                by_distance,
                k_scale is not None,
                visible is not None,
                alibi is not None,
                sinks is not None,
                scale,
                processors(device),
                configs.generation,
            )
        )
        if kind is not None:
            if len(kind.plans) >= _TABLES:
                kind.plans.clear()
            kind.plans[tables] = found
    launch, programs, splits = found
    if splits == 1:
        launch(*tensors, out, q, q)
    else:
        parts = torch.empty(out.numel() // v_dim * splits * (v_dim + 1), dtype=torch.float32, device=device)
        launch_counting(launch, programs, keep, *tensors, out, parts)
    return out


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, position: Tensor,
    visible: Tensor | None, alibi: Tensor | None, sinks: Tensor | None, bias: Tensor | None, buckets: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    return _launch(q, k, v, k_scale, v_scale, length, position, visible, alibi, sinks, bias, buckets, scale, keep=False)


_operator = torch.library.custom_op("dsmr_kernels::triton_decode", _compiled, mutates_args=())


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
    kind: Alike | None = None,
) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    arguments = (
        q, memory.k, memory.v, memory.k_scale, memory.v_scale, memory.length, memory.position, visible, alibi_slopes,
        sinks, bias, buckets, scale,
    )  # fmt: skip
    return _operator(*arguments) if torch.compiler.is_compiling() else _launch(*arguments, kind=kind)
