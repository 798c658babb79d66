"""Small grids of the training call: where there are fewer tiles than multiprocessors, several programs share one.

A tile of queries is shared along its keys, a tile of keys along the queries (and heads of the group) that see it. Each
share leaves a partial result in float32, and a second, small launch puts them together in their order. How many there
are follows from shapes, options and the device alone: the same call gives the same bits.
"""

import triton
import triton.language as tl

# A share must be worth a second launch, which takes some 3 to 5 µs with all that goes through float32. At half the peak
# of an H100 a tile of 128 queries takes 9 ns a key at head_dim 64, so that 768 keys are 7 µs; a tile of 128 keys does
# twice the work for a query. Estimated, not measured.
LEAST_KEYS, LEAST_QUERIES = 768, 384
_MOST = 32  # of a tile: what comes together is read by one program


def shares_of(programs: int, processors: int, walk: int, least: int) -> int:
    """Into how many shares each of `programs` tiles is split, 1 = not at all.

    As many as still find a multiprocessor of their own: more would wait for one another, and fewer leave some idle.

    Args:
        walk: keys (or queries) that a tile walks over at most.
        least: of them in a share.
    """
    return max(1, min(processors // max(programs, 1), walk // least, _MOST))


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(Parts, PartLse, Out, Lse, rows, splits, V_DIM: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr):
    """Out (rows, V_DIM) and its natural log-sum-exp Lse (rows,), of float32 Parts (splits, rows, V_DIM), each the mean
    over its own keys, and their log-sum-exps PartLse (splits, rows) in base 2."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    valid, e = row < rows, tl.arange(0, BV)
    inside = valid[:, None] & (e < V_DIM)[None, :]
    at = row.to(tl.int64)[:, None] * V_DIM + e[None, :]
    parts, lses = Parts + at, PartLse + row
    top = tl.full([BR], -1.0e30, dtype=tl.float32)
    for _ in tl.range(0, splits):
        top = tl.maximum(top, tl.load(lses, mask=valid, other=0.0))
        lses += rows
    acc = tl.zeros([BR, BV], dtype=tl.float32)
    total = tl.zeros([BR], dtype=tl.float32)
    lses = PartLse + row
    for _ in tl.range(0, splits):
        w = tl.exp2(tl.load(lses, mask=valid, other=0.0) - top)  # [BR]
        acc += w[:, None] * tl.load(parts, mask=inside, other=0.0)
        total += w
        lses += rows
        parts += rows * V_DIM
    tl.store(Out + at, (acc / total[:, None]).to(Out.dtype.element_ty), mask=inside)
    tl.store(Lse + row, (top + tl.log2(total)) * 0.6931471805599453, mask=valid)


@triton.jit
def _sum(Parts, Out, count, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    parts = Parts + at
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in tl.range(0, splits):
        acc += tl.load(parts, mask=inside, other=0.0)
        parts += count
    tl.store(Out + at, acc.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "more_count", "splits"])
def sum_kernel(Parts, Out, MoreParts, MoreOut, count, more_count, splits, BLOCK: tl.constexpr):
    """Out (count,) = the sum of float32 Parts (splits, count), and in a second row of programs another one likewise."""
    if tl.program_id(1) == 0:
        _sum(Parts, Out, count, splits, BLOCK)
    else:
        _sum(MoreParts, MoreOut, more_count, splits, BLOCK)
