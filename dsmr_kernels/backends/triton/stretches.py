"""Where the blocks of keys lie that a tile of queries sees, for kernels that load by descriptors of whole tensors: the
index arithmetic of `walk`, apart from any load, so that kernels of either of Triton's languages share it.

A block is BN rows from one row on, of the memory or of the call. Rows beyond a tensor's end, on either side, come as
zeros, and of those within it that no query sees none is ever used: a block that is not whole ends where its stretch
ends, and what it then repeats, or finds before its stretch, is masked by `seen_from`.
"""

import triton
import triton.language as tl

from dsmr_kernels.backends.triton.walk import edge_block, key_blocks


@triton.jit
def lowest_of(p, held, horizon, segment_length, segment_offset):
    """The first key that a query p (or each of a tile) sees, by visibility of the segment; see `lowest_visible`."""
    segment = tl.where(segment_length > 0, (p + segment_offset) // tl.maximum(segment_length, 1), 0)
    return tl.maximum(segment * segment_length - segment_offset - horizon, -held)


@triton.jit
def tile_of(Length, Position, line, tile, heads, queries, tokens, capacity, horizon, segment_length, segment_offset,
            HAS_MEMORY: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """What a tile of BM queries sees, in scalars.

    Returns the first keys that its first and its last query see, its first token and the one after its last, how many
    tokens its row's memory holds, and the ring's write position.
    """
    held = 0
    position = 0
    if HAS_MEMORY:
        b = line // heads
        held = tl.minimum(tl.load(Length + b), capacity)
        position = (tl.load(Position + b) % capacity).to(tl.int32)
    p_first = tile * BM + tokens - queries
    end = tl.minimum(tile * BM + BM, queries) + tokens - queries
    first = lowest_of(p_first, held, horizon, segment_length, segment_offset)
    full = lowest_of(end - 1, held, horizon, segment_length, segment_offset)
    return first, full, p_first, end, held, position


@triton.jit
def stretch_of(stretch, first, full, p_first, end, position, capacity, BN: tl.constexpr):
    """Stretch 0 (the ring's older part), 1 (its newer part) or 2 (the call) in blocks.

    Returns begin, inner, outer, high_end as of `key_blocks`, how many blocks need a mask, and the constant that makes a
    row of a key's number.
    """
    oldest = tl.minimum(first, 0)
    seam = tl.maximum(oldest, -position)
    low_end = tl.where(stretch == 0, oldest, tl.where(stretch == 1, seam, 0))
    high_end = tl.where(stretch == 0, seam, tl.where(stretch == 1, 0, end))
    shift = tl.where(stretch == 0, position + capacity, tl.where(stretch == 1, position, 0))
    begin, inner, outer = key_blocks(first, full, p_first, low_end, high_end, BN)
    edges = (inner - begin + BN - 1) // BN + (high_end - outer + BN - 1) // BN
    return begin, inner, outer, high_end, edges, shift


@triton.jit
def edge_of(i, stretch, begin, inner, outer, high_end, BN: tl.constexpr):
    """The i-th masked block of a stretch: the keys start ... stop - 1, and the key `at` whose row is the first loaded.

    The older part of the ring ends where the memory's tensor ends, beyond which there are zeros. The other stretches
    end among rows that nobody may see, so that a block that is not whole is moved back to end where they end.
    """
    start, stop = edge_block(i, (inner - begin + BN - 1) // BN, begin, inner, outer, high_end, BN)
    stop = tl.minimum(start + BN, stop)
    at = tl.where((stretch > 0) & (stop - start < BN), stop - BN, start)
    return start, stop, at


@triton.jit
def unclean(at, begin, shift):
    """Whether a block that begins before its stretch finds rows of the memory there rather than zeros; it is then the
    only one of its stretch."""
    return (at < begin) & (begin + shift > 0)
