"""A forward whose loads are tensor descriptors, in Triton's own language: the plain candidate for Hopper, and what runs
the index arithmetic of `stretches` in the interpreter.

Blocks that need a mask come first; those that all queries see follow in two loops, of the memory and of the call, the
first of which can be specialised by warps.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.primitives import head_of, load_rows, softmax_step, store_rows
from dsmr_kernels.backends.triton.stretches import edge_of, lowest_of, stretch_of, tile_of

_SIZES = ("q_batch", "q_head", "q_token", "heads", "group", "queries", "tokens", "capacity")
RUNTIME = ["Length", "Position", *_SIZES, "horizon", "segment_length", "segment_offset"]


@triton.jit
def _taken(q, k, v, acc, top, total, scale_log2):
    """A block of keys that all queries see, taken into their softmax."""
    w, shrink, top, total = softmax_step(tl.dot(q, tl.trans(k)), top, total, scale_log2, True)
    acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None])
    return acc, top, total


@triton.jit(do_not_specialize=RUNTIME)
def descriptor_kernel(
    Q, K, V, MemoryK, MemoryV, Length, Position, Out, Lse,
    q_batch, q_head, q_token, heads, group, scale_log2, queries, tokens, capacity, horizon, segment_length,
    segment_offset,
    UNIT: tl.constexpr, HAS_MEMORY: tl.constexpr, HEAD_DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Out (B, Hq, T, HEAD_DIM) and the natural log-sum-exp Lse (B, Hq, T), both contiguous, of calls with visibility by
    segment and nothing else. K, V, MemoryK and MemoryV are descriptors of (B, H, tokens, HEAD_DIM) tensors in blocks of
    (1, 1, BN, HEAD_DIM)."""
    tiles = tl.cdiv(queries, BM)
    tile = tiles - 1 - tl.program_id(0) % tiles
    line = tl.program_id(0) // tiles
    b, h = line // heads, line % heads
    kv = h // group
    first, full, p_first, end, held, position = tile_of(
        Length, Position, line, tile, heads, queries, tokens, capacity, horizon, segment_length, segment_offset,
        HAS_MEMORY, BM,
    )  # fmt: skip
    row = tile * BM + tl.arange(0, BM)
    p = tl.minimum(row, queries - 1) + tokens - queries
    low = lowest_of(p, held, horizon, segment_length, segment_offset)
    d = tl.arange(0, HEAD_DIM)
    q = head_of(Q, b.to(tl.int64), h, q_batch, q_head, UNIT)
    q = load_rows(q, row, q_token, d, row < queries, HEAD_DIM, True, False, UNIT)  # [BM, HEAD_DIM]
    acc = tl.zeros([BM, HEAD_DIM], dtype=tl.float32)
    top = tl.full([BM], -1.0e30, dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    for stretch in tl.range(0 if HAS_MEMORY else 2, 3):
        begin, inner, outer, high_end, edges, shift = stretch_of(
            stretch, first, full, p_first, end, position, capacity, BN
        )
        for i in tl.range(0, edges, num_stages=1):
            start, stop, at = edge_of(i, stretch, begin, inner, outer, high_end, BN)
            if stretch == 2:
                k = K.load([b, kv, at + shift, 0])
                v = V.load([b, kv, at + shift, 0])
            else:
                k = MemoryK.load([b, kv, at + shift, 0])
                v = MemoryV.load([b, kv, at + shift, 0])
            j = at + tl.arange(0, BN)
            v = tl.where((j >= begin)[:, None], v.reshape(BN, HEAD_DIM), 0.0)
            s = tl.dot(q, tl.trans(k.reshape(BN, HEAD_DIM)))
            seen = (j[None, :] >= tl.maximum(low, start)[:, None]) & (j[None, :] <= tl.minimum(p, stop - 1)[:, None])
            w, shrink, top, total = softmax_step(tl.where(seen, s, -float("inf")), top, total, scale_log2, True)
            acc = tl.dot(w.to(v.dtype), v, acc * shrink[:, None])
    if HAS_MEMORY:
        _, older, older_end, _, _, older_shift = stretch_of(0, first, full, p_first, end, position, capacity, BN)
        _, newer, newer_end, _, _, newer_shift = stretch_of(1, first, full, p_first, end, position, capacity, BN)
        before = (older_end - older) // BN
        for i in tl.range(0, before + (newer_end - newer) // BN, warp_specialize=SPECIALISED):
            at = tl.where(i < before, older + older_shift + i * BN, newer + newer_shift + (i - before) * BN)
            k = MemoryK.load([b, kv, at, 0]).reshape(BN, HEAD_DIM)
            v = MemoryV.load([b, kv, at, 0]).reshape(BN, HEAD_DIM)
            acc, top, total = _taken(q, k, v, acc, top, total, scale_log2)
    _, inner, outer, _, _, _ = stretch_of(2, first, full, p_first, end, position, capacity, BN)
    for at in tl.range(inner, outer, BN):
        k = K.load([b, kv, at, 0]).reshape(BN, HEAD_DIM)
        v = V.load([b, kv, at, 0]).reshape(BN, HEAD_DIM)
        acc, top, total = _taken(q, k, v, acc, top, total, scale_log2)
    store_rows(Out, line, row, queries, d, acc / total[:, None], HEAD_DIM)
    tl.store(Lse + line.to(tl.int64) * queries + row, (top + tl.log2(total)) * 0.6931471805599453, mask=row < queries)
