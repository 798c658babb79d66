"""A learned bias by distance: the table of it that the kernels read, and its gradient, without atomics.

The table has for each query head what a key's distance adds to a score in base 2, for every distance that can be seen
and `MARGIN` more on either side: a kernel reads it at whatever distances its tile has, without a bound to hold them
to. ALiBi's slopes, where there are any beside the bias, are in it already.

`dbias_kernel` makes use of what the pairs of a tile, key and query, have in common from tile to tile: if the tiles of
keys begin a fixed distance before those of queries, each place in the tile stands for one distance. A program takes
such a distance, adds up the gradients of the scores of all its tiles where they are, and sums along the diagonals once,
at the end. `bucket_kernel` sums what belongs to a bucket, in order of distance.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmr_kernels.backends.triton.configs import choose
from dsmr_kernels.backends.triton.launch import architecture, launch_kernel
from dsmr_kernels.backends.triton.primitives import (
    MARGIN,
    RUNTIME,
    head_of,
    load_rows,
    lowest_visible,
    memory_rows,
    move_of,
    moved,
    offset_of,
    scales_of,
)


@triton.jit(do_not_specialize=["Slopes", "columns", "buckets", "distances"])
def table_kernel(Bias, Buckets, Slopes, Table, columns, buckets, distances, HAS_ALIBI: tl.constexpr, BN: tl.constexpr):
    """Table (Hq, distances + 2 * MARGIN) float32: Bias (Hq, columns) at Buckets (buckets,) of each distance."""
    width = distances + 2 * MARGIN
    tiles = tl.cdiv(width, BN)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    x = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    distance = tl.minimum(tl.maximum(x - MARGIN, 0), distances - 1)  # in the margins, what nobody sees
    column = tl.load(Buckets + tl.minimum(distance, buckets - 1))
    added = tl.load(Bias + h * columns + column).to(tl.float32)
    if HAS_ALIBI:
        added -= tl.load(Slopes + h).to(tl.float32) * distance.to(tl.float32)
    tl.store(Table + h * width + x, added * 1.4426950408889634, mask=x < width)


@triton.jit
def _rows_of_both(
    Memory, X, inside, slot, j, memory_stride, stride, d, in_range, Scale,
    HAS_MEMORY: tl.constexpr, QUANTISED: tl.constexpr, DIM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Keys or values j [BN] of memory and call, where `inside` those of memory: [BN, BD], and their scales [BN]."""
    scale = tl.full(j.shape, 1.0, dtype=tl.float32)
    if QUANTISED:
        rows = load_rows(Memory, slot, memory_stride, d, in_range & inside, DIM, d.shape[0] == DIM, False, UNIT)
        own = load_rows(X, j, stride, d, in_range & ~inside, DIM, d.shape[0] == DIM, False, UNIT)
        scale = tl.load(Scale + slot, mask=in_range & inside, other=1.0)
        x = tl.where(inside[:, None], rows.to(own.dtype), own)
    else:
        base = X + tl.zeros_like(j)
        at = j.to(tl.int64) * stride
        if HAS_MEMORY:
            base = tl.where(inside, Memory + tl.zeros_like(j), base)
            at = tl.where(inside, slot.to(tl.int64) * memory_stride, at)
        pointers = (base + at * UNIT)[:, None] + d[None, :]
        x = tl.load(pointers, mask=in_range[:, None] & (d < DIM)[None, :], other=0.0)
    return x, scale


@triton.jit(do_not_specialize=RUNTIME)
def dbias_kernel(
    Q, K, V, MemoryK, MemoryV, KScale, VScale, Length, Position, PieceStart, Slopes, Offsets, Grad, Lse, Delta, Parts,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    mk_batch, mk_head, mk_token, mv_batch, mv_head, mv_token, ks_batch, ks_head, vs_batch, vs_head,
    g_batch, g_head, g_token,
    piece_stride, heads, group, scale_log2, queries, tokens, capacity, horizon, segment_length, segment_offset,
    width, blocks,
    SLIDING: tl.constexpr, HAS_MEMORY: tl.constexpr, QUANTISED: tl.constexpr, HAS_PIECES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Parts (B, Hq, 2, blocks * BN) float32: what belongs to distance x - (BN - 1) lies at x of the first half and at
    x - BN of the second. Slopes is the table. BM must not be larger than BN."""
    line = tl.program_id(0) // blocks
    back = tl.program_id(0) % blocks * BN  # by so much the keys of a tile begin before its queries
    b, h = (line // heads).to(tl.int64), line % heads
    kv = h // group
    shift = tokens - queries
    held = 0
    position = 0
    if HAS_MEMORY:
        held = tl.minimum(tl.load(Length + b), capacity)
        position = (tl.load(Position + b) % capacity).to(tl.int32)
    segment_offset = offset_of(Offsets, b, capacity, segment_length, segment_offset, HAS_OFFSETS)
    q_base, g_base = head_of(Q, b, h, q_batch, q_head, UNIT), head_of(Grad, b, h, g_batch, g_head, UNIT)
    k_base, v_base = head_of(K, b, kv, k_batch, k_head, UNIT), head_of(V, b, kv, v_batch, v_head, UNIT)
    mk, mv = head_of(MemoryK, b, kv, mk_batch, mk_head, UNIT), head_of(MemoryV, b, kv, mv_batch, mv_head, UNIT)
    k_scale, v_scale = scales_of(KScale, VScale, b, kv, ks_batch, ks_head, vs_batch, vs_head, QUANTISED)
    at = line.to(tl.int64) * queries
    d, e = tl.arange(0, BD), tl.arange(0, BV)
    r, t = tl.arange(0, BM), tl.arange(0, BN)
    added = tl.zeros([BM, BN], dtype=tl.float32)
    added = moved(added, move_of(Slopes, h, width, False, True), back + r[:, None] - t[None, :], False, True)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    # Tiles of queries before this one would have keys older than all that is held.
    first = tl.maximum(back - (BN - 1) - held - shift, 0) // BM * BM
    for start in tl.range(first, queries, BM, disable_licm=True):
        row = start + r
        valid = row < queries
        p = tl.minimum(row, queries - 1) + shift
        low = lowest_visible(
            p, PieceStart + b * piece_stride, held, horizon, segment_length, segment_offset, SLIDING, HAS_PIECES
        )
        j = start + shift - back + t
        in_range = (j >= -held) & (j < tokens)
        inside = j < 0
        slot = memory_rows(j, position, capacity)
        q = load_rows(q_base, row, q_token, d, valid, HEAD_DIM, HEAD_DIM == BD, False, UNIT)  # [BM, BD]
        grad = load_rows(g_base, row, g_token, e, valid, V_DIM, V_DIM == BV, False, UNIT)  # [BM, BV]
        k, k_scales = _rows_of_both(
            mk, k_base, inside, slot, j, mk_token, k_token, d, in_range, k_scale, HAS_MEMORY, QUANTISED, HEAD_DIM, UNIT
        )
        v, v_scales = _rows_of_both(
            mv, v_base, inside, slot, j, mv_token, v_token, e, in_range, v_scale, HAS_MEMORY, QUANTISED, V_DIM, UNIT
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BM, BN]
        dw = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if QUANTISED:
            s *= k_scales[None, :]
            dw *= v_scales[None, :]
        lse = tl.load(Lse + at + row, mask=valid, other=0.0) * 1.4426950408889634
        delta = tl.load(Delta + at + row, mask=valid, other=0.0)
        seen = (j[None, :] >= low[:, None]) & (j[None, :] <= p[:, None]) & valid[:, None]
        w = tl.exp2(tl.where(seen, s * scale_log2 + added - lse[:, None], -float("inf")))
        acc += tl.where(seen, w * (dw - delta[:, None]), 0.0)

    # Column u of the skewed tile holds the place (r, (u + r) % BN), whose distance is back - u, or BN more.
    skewed = tl.gather(acc, (t[None, :] + r[:, None]) % BN, 1)
    beyond = t[None, :] + r[:, None] >= BN
    parts = Parts + line.to(tl.int64) * (2 * blocks * BN) + back + (BN - 1) - t
    tl.store(parts, tl.sum(tl.where(beyond, 0.0, skewed), 0))
    tl.store(parts + blocks * BN, tl.sum(tl.where(beyond, skewed, 0.0), 0))


@triton.jit(do_not_specialize=["columns", "buckets", "distances", "width", "keys"])
def bucket_kernel(Parts, Buckets, DBias, columns, buckets, distances, width, keys, BM: tl.constexpr, BN: tl.constexpr):
    """DBias (Hq, columns) float32: for each column the sum over its distances of Parts (Hq, 2, width), which is as
    `dbias_kernel` leaves it with BN = keys, summed over the batch."""
    tiles = tl.cdiv(columns, BM)
    h = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    parts = Parts + h * (2 * width)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for first in tl.range(0, distances, BN):
        distance = first + tl.arange(0, BN)
        real = distance < distances
        found = tl.load(parts + distance + keys - 1, mask=real, other=0.0)
        found += tl.load(parts + width + distance - 1, mask=real & (distance > 0), other=0.0)
        bucket = tl.load(Buckets + tl.minimum(distance, buckets - 1))
        acc += tl.where(bucket[None, :] == column[:, None], found[None, :], 0.0)
    tl.store(DBias + h * columns + column, tl.sum(acc, 1), mask=column < columns)


def table_of(bias: Tensor, buckets: Tensor, alibi: Tensor | None, distances: int) -> Tensor:
    """The table (Hq, distances + 2 * MARGIN) of the distances 0 ... distances - 1; see the module."""
    bias, buckets = bias.contiguous(), buckets.contiguous()
    heads, columns = bias.shape
    width = distances + 2 * MARGIN.value
    table = torch.empty((heads, width), dtype=torch.float32, device=bias.device)
    part = architecture(bias.device)
    config = choose("table", part, 64, torch.float32)
    launch_kernel(
        table_kernel, (triton.cdiv(width, config.bn) * heads, 1, 1), bias.device,
        (bias, buckets, bias if alibi is None else alibi.contiguous(), table), (columns, buckets.shape[0], distances),
        {"HAS_ALIBI": alibi is not None, "BN": config.bn}, config.launch_options(part),
    )  # fmt: skip
    return table


def bucketed(parts: Tensor, bias: Tensor, buckets: Tensor, distances: int, keys: int) -> Tensor:
    """The gradient (Hq, columns) of the bias, of the parts that `dbias_kernel` leaves of it in blocks of `keys`."""
    heads, columns = bias.shape
    part = architecture(bias.device)
    config = choose("bucket", part, 64, torch.float32)
    found = torch.empty((heads, columns), dtype=torch.float32, device=bias.device)
    whole = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    launch_kernel(
        bucket_kernel, (triton.cdiv(columns, config.bm) * heads, 1, 1), bias.device,
        (whole, buckets.contiguous(), found), (columns, buckets.shape[0], distances, parts.shape[3], keys),
        {"BM": config.bm, "BN": config.bn}, config.launch_options(part),
    )  # fmt: skip
    return found
