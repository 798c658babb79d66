"""A forward for Hopper in Gluon, Triton's lower language: some warps load, others compute, each with registers of their
own.

A program takes 64 queries for each of its consumers, which are four warps each. A producer copies blocks of keys and
values by tensor descriptors into a ring of stages, from the memory or from the call; every consumer runs over the same
blocks: first those on the edges, which are masked, then those that all queries see. It serves where it
is asked for, see `bulk`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dsmr_kernels.backends.triton.stretches import edge_of, lowest_of, stretch_of, tile_of, unclean

_SIZES = ("q_batch", "q_head", "q_token", "heads", "group", "queries", "tokens", "capacity")
RUNTIME = ["Length", "Position", *_SIZES, "horizon", "segment_length", "segment_offset"]


@gluon.jit
def _copy(source, other, is_other, b, h, row, n, to, full, empty, STAGES: gl.constexpr):
    """The n-th copy of a block of rows into the stage of its turn, as soon as every consumer has left that."""
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), (n // STAGES + 1) & 1)
    mbarrier.expect(full.index(stage), source.block_type.nbytes)
    if is_other:
        tma.async_copy_global_to_shared(other, [b, h, row, 0], full.index(stage), to.index(stage))
    else:
        tma.async_copy_global_to_shared(source, [b, h, row, 0], full.index(stage), to.index(stage))


@gluon.jit
def _produce(
    K, V, MemoryK, MemoryV, stages, b, h, seen_by, BN: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """The producer's part: the blocks in the order in which `_consume` takes them."""
    ks, vs, k_full, k_empty, v_full, v_empty = stages
    first, full, p_first, end, position, capacity = seen_by
    n = 0
    for s in range(3):
        begin, inner, outer, high_end, edges, shift = stretch_of(s, first, full, p_first, end, position, capacity, BN)
        for i in range(edges):
            _, _, at = edge_of(i, s, begin, inner, outer, high_end, BN)
            _copy(MemoryK, K, s == 2, b, h, at + shift, n, ks, k_full, k_empty, STAGES)
            _copy(MemoryV, V, s == 2, b, h, at + shift, n, vs, v_full, v_empty, STAGES)
            n += 1
    for s in range(3):
        _, inner, outer, _, _, shift = stretch_of(s, first, full, p_first, end, position, capacity, BN)
        for start in range(inner, outer, BN):
            _copy(MemoryK, K, s == 2, b, h, start + shift, n, ks, k_full, k_empty, STAGES)
            _copy(MemoryV, V, s == 2, b, h, start + shift, n, vs, v_full, v_empty, STAGES)
            n += 1


@gluon.jit
def _softmax_step(s, top, total, scale_log2):
    """As `primitives.softmax_step` with LATE."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    shrink = gl.exp2(top - new_top)
    w = gl.exp2(s * scale_log2 - new_top[:, None])
    return w, shrink, new_top, total * shrink + gl.sum(w, 1)


@gluon.jit
def _scores(q, ks, stage, none, BN: gl.constexpr, D: gl.constexpr):
    """The product of the queries with a block of keys, under way."""
    k = ks.index(stage).reshape([BN, D]).permute([1, 0])
    return warpgroup_mma(q, k, none, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    tensors, qs, stages, turns, what, seen_by, ME: gl.constexpr, CONSUMERS: gl.constexpr, BN: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """The part of consumer ME: 64 queries from copy to result.

    With OVERLAP the product with the next keys is under way while the softmax of a block is computed; with PINGPONG two
    consumers take turns to begin products, so that one's softmax falls into the other's products.
    """
    Q, Out, Lse, q_base, q_token = tensors
    ks, vs, k_full, k_empty, v_full, v_empty = stages
    line, tile, queries, tokens, held, horizon, segment_length, segment_offset, scale_log2 = what
    first, full, p_first, end, position, capacity = seen_by
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])  # of scores [64, BN]
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])  # of results [64, D]
    W: gl.constexpr = gl.DotOperandLayout(0, O, 2)  # of weights, rounded, as the left side of the second product
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (D // 8), D // 8], [4, 1], [1, 0])
    OF_O: gl.constexpr = gl.SliceLayout(1, O)
    dtype: gl.constexpr = Q.dtype.element_ty
    row0 = (tile * CONSUMERS + ME) * 64
    rows = gl.minimum(row0 + gl.arange(0, 64, gl.SliceLayout(1, ROWS)), queries - 1)
    d = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    q = qs.index(ME)
    q.store(gl.load(Q + q_base + (rows.to(gl.int64) * q_token)[:, None] + d[None, :]))
    fence_async_shared()
    row = row0 + gl.arange(0, 64, gl.SliceLayout(1, S))
    p = gl.minimum(row, queries - 1) + tokens - queries
    low = lowest_of(p, held, horizon, segment_length, segment_offset)
    top = gl.full([64], -1.0e30, gl.float32, gl.SliceLayout(1, S))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, S))
    acc = gl.full([64, D], 0.0, gl.float32, O)
    none = gl.full([64, BN], 0.0, gl.float32, S)
    n = 0
    blocks = 0
    for s in range(3):
        begin, inner, outer, high_end, edges, shift = stretch_of(s, first, full, p_first, end, position, capacity, BN)
        blocks += (outer - inner) // BN
        for i in range(edges):
            start, stop, at = edge_of(i, s, begin, inner, outer, high_end, BN)
            stage, phase = n % STAGES, (n // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            x = warpgroup_mma_wait(0, deps=[_scores(q, ks, stage, none, BN, D)])
            mbarrier.arrive(k_empty.index(stage))
            j = at + gl.arange(0, BN, gl.SliceLayout(0, S))
            seen = (j[None, :] >= gl.maximum(low, start)[:, None]) & (j[None, :] <= gl.minimum(p, stop - 1)[:, None])
            w, shrink, top, total = _softmax_step(gl.where(seen, x, -float("inf")), top, total, scale_log2)
            acc = acc * gl.convert_layout(shrink, OF_O)[:, None]
            w = gl.convert_layout(w.to(dtype), W)
            mbarrier.wait(v_full.index(stage), phase)
            v = vs.index(stage).reshape([BN, D])
            if unclean(at, begin, shift):  # every consumer does so, and writes the same
                for part in gl.static_range(BN // 32):  # all at once would not fit the registers
                    some = v.slice(part * 32, 32)
                    clean = at + part * 32 + gl.arange(0, 32, gl.SliceLayout(1, ROWS)) >= begin
                    some.store(gl.where(clean[:, None], some.load(ROWS), 0.0))
                fence_async_shared()
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(w, v, acc, is_async=True)])
            mbarrier.arrive(v_empty.index(stage))
            n += 1
    if OVERLAP:
        if blocks > 0:
            stage = n % STAGES
            mbarrier.wait(k_full.index(stage), (n // STAGES) & 1)
            x = warpgroup_mma_wait(0, deps=[_scores(q, ks, stage, none, BN, D)])
            mbarrier.arrive(k_empty.index(stage))
            w, shrink, top, total = _softmax_step(x, top, total, scale_log2)
            acc = acc * gl.convert_layout(shrink, OF_O)[:, None]
            w = gl.convert_layout(w.to(dtype), W)
            mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=blocks > 1)
            for i in range(1, blocks):
                stage, phase = n % STAGES, (n // STAGES) & 1
                n += 1
                following = n % STAGES
                if PINGPONG:
                    mbarrier.wait(turns.index(ME), (i + ME) & 1)
                scores = _scores(q, ks, following, none, BN, D)
                mbarrier.wait(v_full.index(stage), phase)
                result = warpgroup_mma(w, vs.index(stage).reshape([BN, D]), acc, is_async=True)
                if PINGPONG:
                    mbarrier.arrive(turns.index(1 - ME))
                x = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(following))
                y, shrink, top, total = _softmax_step(x, top, total, scale_log2)
                # The exponentials belong before the wait for the product, which the assembler would else move up to
                # the other one: it moves nothing across the loop of this wait, for the keys of the next turn.
                mbarrier.wait(k_full.index((n + 1) % STAGES), ((n + 1) // STAGES) & 1, pred=i + 1 < blocks)
                acc, _, y = warpgroup_mma_wait(0, deps=[result, w, y])
                mbarrier.arrive(v_empty.index(stage))
                acc = acc * gl.convert_layout(shrink, OF_O)[:, None]
                w = gl.convert_layout(y.to(dtype), W)
            stage = n % STAGES
            mbarrier.wait(v_full.index(stage), (n // STAGES) & 1)
            result = warpgroup_mma(w, vs.index(stage).reshape([BN, D]), acc, is_async=True)
            acc, _ = warpgroup_mma_wait(0, deps=[result, w])
    else:
        for i in range(blocks):
            stage, phase = n % STAGES, (n // STAGES) & 1
            if PINGPONG:
                mbarrier.wait(turns.index(ME), (i + 1 + ME) & 1)
            mbarrier.wait(k_full.index(stage), phase)
            x = warpgroup_mma_wait(0, deps=[_scores(q, ks, stage, none, BN, D)])
            mbarrier.arrive(k_empty.index(stage))
            if PINGPONG:
                mbarrier.arrive(turns.index(1 - ME))
            w, shrink, top, total = _softmax_step(x, top, total, scale_log2)
            acc = acc * gl.convert_layout(shrink, OF_O)[:, None]
            w = gl.convert_layout(w.to(dtype), W)
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(w, vs.index(stage).reshape([BN, D]), acc, is_async=True)])
            mbarrier.arrive(v_empty.index(stage))
            n += 1
    acc = acc / gl.convert_layout(total, OF_O)[:, None]
    at_row = row0 + gl.arange(0, 64, OF_O)
    e = gl.arange(0, D, gl.SliceLayout(0, O))
    pointers = Out + ((line.to(gl.int64) * queries + at_row) * D)[:, None] + e[None, :]
    gl.store(pointers, acc.to(dtype), mask=(at_row < queries)[:, None])
    lse = (top + gl.log2(total)) * 0.6931471805599453
    gl.store(Lse + line.to(gl.int64) * queries + row, lse, mask=row < queries)


@gluon.jit(do_not_specialize=RUNTIME)
def hopper_kernel(
    Q, K, V, MemoryK, MemoryV, Length, Position, Out, Lse,
    q_batch, q_head, q_token, heads, group, scale_log2, queries, tokens, capacity, horizon, segment_length,
    segment_offset,
    UNIT: gl.constexpr, HAS_MEMORY: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, OVERLAP: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Out (B, Hq, T, D) and the natural log-sum-exp Lse (B, Hq, T), both contiguous, of calls with visibility by
    segment and nothing else. K, V, MemoryK and MemoryV are descriptors of (B, H, tokens, D) tensors in blocks of
    (1, 1, BN, D)."""
    BM: gl.constexpr = CONSUMERS * 64
    dtype: gl.constexpr = Q.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = (queries + BM - 1) // BM
    tile = tiles - 1 - gl.program_id(0) % tiles
    line = gl.program_id(0) // tiles
    b, h = line // heads, line % heads
    kv = h // group
    first, full, p_first, end, held, position = tile_of(
        Length, Position, line, tile, heads, queries, tokens, capacity, horizon, segment_length, segment_offset,
        HAS_MEMORY, BM,
    )  # fmt: skip
    q_base = (b.to(gl.int64) * q_batch + h.to(gl.int64) * q_head) * UNIT
    qs = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], gl.NVMMASharedLayout.get_default_for([64, D], dtype))
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], K.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], V.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    # A producer of four warps: of one, the three that fill up its warpgroup would be forgotten when registers are
    # handed out, and the consumers would wait for more than there are.
    tensors = (Q, Out, Lse, q_base, q_token * UNIT)
    stages = (ks, vs, k_full, k_empty, v_full, v_empty)
    seen = (first, full, p_first, end, position, capacity)
    what = (line, tile, queries, tokens, held, horizon, segment_length, segment_offset, scale_log2)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (tensors, qs, stages, turns, what, seen, 0, 2, BN, D, STAGES, OVERLAP, PINGPONG)),
                (_consume, (tensors, qs, stages, turns, what, seen, 1, 2, BN, D, STAGES, OVERLAP, PINGPONG)),
                (_produce, (K, V, MemoryK, MemoryV, stages, b, kv, seen, BN, STAGES)),
            ],
            [4, 4],
            [240, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3 and not PINGPONG, "there are two consumers, or three that take no turns")
        gl.warp_specialize(
            [
                (_consume, (tensors, qs, stages, turns, what, seen, 0, 3, BN, D, STAGES, OVERLAP, PINGPONG)),
                (_consume, (tensors, qs, stages, turns, what, seen, 1, 3, BN, D, STAGES, OVERLAP, PINGPONG)),
                (_consume, (tensors, qs, stages, turns, what, seen, 2, 3, BN, D, STAGES, OVERLAP, PINGPONG)),
                (_produce, (K, V, MemoryK, MemoryV, stages, b, kv, seen, BN, STAGES)),
            ],
            [4, 4, 4],
            [160, 160, 24],
        )
