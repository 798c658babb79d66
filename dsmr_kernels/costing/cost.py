"""What attention with a memory costs, counted from visibility itself: query-key pairs, operations, bytes.

Every count is exact and in closed form, for a first call or one behind a memory, of any size and cut. Two counts of
operations are told apart: `flops`, what has to be computed, and `nominal_flops`, what ordinary attention with all its
gradients would compute over the same pairs. Seconds are made of these counts in `dsmr_kernels.costing.predict`.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

from dsmr_kernels.visibility import VISIBILITIES

# Matrix products over a pair of query and key. The forward has Q K' and P V. A backward in one pass has five: the
# scores again, dP, dV, dQ and dK; one split into a kernel for dQ and one for dK and dV makes scores and dP twice. A
# pair whose key takes no gradient needs scores, dP and dQ alone.
FORWARD_PRODUCTS, DETACHED_PRODUCTS = 2, 3
GRADIENT_PRODUCTS = {"fused": 5, "split": 7}


@dataclass(frozen=True)
class Pairs:
    """(query, key) pairs of a call in one row and one query head, by where the key lies.

    Attributes:
        memory: in the memory; such keys never take a gradient.
        earlier: in the call, before the query's own segment; detached if segments are.
        own: in the call and in the query's own segment, the query itself included.
    """

    memory: int = 0
    earlier: int = 0
    own: int = 0

    @property
    def past(self) -> int:
        return self.memory + self.earlier

    @property
    def total(self) -> int:
        return self.memory + self.earlier + self.own

    def __add__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.memory + other.memory, self.earlier + other.earlier, self.own + other.own)

    def __sub__(self, other: "Pairs") -> "Pairs":
        return Pairs(self.memory - other.memory, self.earlier - other.earlier, self.own - other.own)


@dataclass(frozen=True)
class Call:
    """The sizes of one `memory_attention` call, all rows alike; the arguments have the meaning that they have there.

    Attributes:
        queries: T, the last of the call's tokens.
        tokens: S >= T; None = T.
        held: tokens that the memory holds.
        piece_starts: tokens of the call, in order, at which a piece begins.
        bytes_per_element: of q, k, v and the memory.

    Raises:
        ValueError: for sizes that no call can have.
    """

    queries: int
    horizon: int
    held: int = 0
    segment_length: int | None = None
    segment_offset: int = 0
    visibility: str = "segment"
    detach_segments: bool = True
    tokens: int | None = None
    piece_starts: tuple[int, ...] = ()
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    bytes_per_element: int = 4

    def __post_init__(self) -> None:
        if self.queries < 0 or self.horizon < 0:
            raise ValueError(f"tokens and horizon must be >= 0, got {self.queries} and {self.horizon}")
        for name, least in (("held", 0), ("segment_offset", 0), ("batch", 0), ("heads", 1), ("kv_heads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.segment_length is not None and not 0 <= self.segment_offset < self.segment_length:
            raise ValueError(
                f"segment_offset must be < segment_length = {self.segment_length}, got {self.segment_offset}"
            )
        if self.visibility not in VISIBILITIES:
            raise ValueError(f'visibility must be "segment" or "sliding", got {self.visibility!r}')
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.size < self.queries:
            raise ValueError(f"tokens must be at least the {self.queries} queries, got {self.tokens}")
        if list(self.piece_starts) != sorted(set(self.piece_starts)) or min(self.piece_starts, default=0) < 0:
            raise ValueError(f"piece_starts must be tokens of the call in rising order, got {self.piece_starts}")

    @property
    def size(self) -> int:
        """S, the tokens of the call."""
        return self.queries if self.tokens is None else self.tokens

    @property
    def pairs(self) -> Pairs:
        """Pairs of one row and one query head."""
        edges = [*(start for start in self.piece_starts if start < self.size), self.size]
        first = self.size - self.queries
        counted = self._prefix(edges[0], self.segment_offset, self.held) - self._prefix(
            min(edges[0], first), self.segment_offset, self.held
        )
        for start, stop in itertools.pairwise(edges):  # a new piece is a call of its own, without a memory
            offset = self.segment_offset + start
            offset = offset if self.segment_length is None else offset % self.segment_length
            skipped = min(max(first - start, 0), stop - start)
            counted += self._prefix(stop - start, offset, 0) - self._prefix(skipped, offset, 0)
        return counted

    def _prefix(self, count: int, offset: int, held: int) -> Pairs:
        """Pairs of the first `count` queries of a piece that lies `offset` tokens within a segment when it begins."""
        length = count + offset + 1 if self.segment_length is None else self.segment_length
        head = min(count, length - offset)  # queries in the segment that was begun before
        whole, tail = divmod(count - head, length)
        if self.visibility == "sliding":
            memory = _sum_clipped(self.horizon, -1, count, held)
            inside = _sum_clipped(0, 1, count, self.horizon)
            own = (
                _sum_clipped(0, 1, head, self.horizon)
                + whole * _sum_clipped(0, 1, length, self.horizon)
                + _sum_clipped(0, 1, tail, self.horizon)
            )
            return Pairs(memory, inside - own, own + count)
        begin = length - offset  # where the first whole segment begins
        last = begin + whole * length
        memory = head * min(offset + self.horizon, held)
        memory += length * _sum_clipped(self.horizon - begin, -length, whole, held)
        memory += tail * min(max(self.horizon - last, 0), held)
        earlier = length * _sum_clipped(begin, length, whole, self.horizon) + tail * min(last, self.horizon)
        own = (head * (head + 1) + whole * length * (length + 1) + tail * (tail + 1)) // 2
        return Pairs(memory, earlier, own)

    @property
    def segments(self) -> int:
        """Segments, whole or in part, that the queries lie in."""
        if self.segment_length is None or not self.queries:
            return min(self.queries, 1)
        first, last = self.size - self.queries + self.segment_offset, self.size - 1 + self.segment_offset
        return last // self.segment_length - first // self.segment_length + 1

    @property
    def keys_read(self) -> int:
        """Keys of memory and call that some query of a row sees; each is read at least once."""
        if not self.queries:
            return 0
        first = self.size - self.queries
        if self.visibility == "sliding":
            low = first - self.horizon
        elif self.segment_length is None:
            low = -self.segment_offset - self.horizon
        else:
            begun = (first + self.segment_offset) // self.segment_length * self.segment_length
            low = begun - self.segment_offset - self.horizon
        floor = max((start for start in self.piece_starts if start <= first), default=-self.held)
        return self.size - max(low, floor)


def _sum_clipped(first: int, step: int, count: int, top: int) -> int:
    """Sum over i in 0 ... count - 1 of first + step * i, each term clipped to 0 ... top."""
    if count <= 0 or top <= 0:
        return 0
    if step < 0:
        first, step = first + step * (count - 1), -step
    below = min(max(-(first // step), 0), count)  # terms below 0, and those that are 0 already
    within = min(max((top - first) // step + 1, below), count)  # terms up to `top`
    terms = within - below
    return terms * first + step * (within - 1 + below) * terms // 2 + (count - within) * top


@dataclass(frozen=True)
class Work:
    """What one kind of work costs, over the whole batch.

    Attributes:
        flops: operations of the matrix products that have to be made.
        nominal_flops: what ordinary attention, or ordinary code, makes for the same result.
        exponentials: softmax weights computed.
        bytes_read, bytes_written: each tensor once.
        calls: separate stretches of work, each with a cost of its own for being started.
    """

    flops: float = 0.0
    nominal_flops: float = 0.0
    exponentials: float = 0.0
    bytes_read: float = 0.0
    bytes_written: float = 0.0
    calls: int = 0

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def total(works: Iterable[Work]) -> Work:
    """The sum."""
    return reduce(Work.__add__, works, Work())


def forward_parts(call: Call) -> dict[str, Work]:
    """A forward pass, told apart by "past" (memory and earlier segments) and "own" (the segment itself, causally)."""
    pairs, query, key = call.pairs, *_row_bytes(call)
    new, lse = min(call.queries, call.keys_read), 4 * call.batch * call.heads * call.queries
    return {
        "past": _part(call, pairs.past, FORWARD_PRODUCTS, FORWARD_PRODUCTS, 1, key * 2 * (call.keys_read - new), 0.0),
        "own": _part(
            call,
            pairs.own,
            FORWARD_PRODUCTS,
            FORWARD_PRODUCTS,
            1,
            query * call.queries + key * 2 * new,
            query * call.queries + lse,
        ),
    }


def backward_parts(call: Call, *, backward: str = "fused") -> dict[str, Work]:
    """A backward pass into q, k and v: "past" are pairs whose key takes no gradient, "own" all others.

    Args:
        backward: "fused", one pass with five products a pair, or "split", two kernels with seven.
    """
    pairs, query, key = call.pairs, *_row_bytes(call)
    products = GRADIENT_PRODUCTS[backward]
    free = pairs.past if call.detach_segments else pairs.memory
    new, lse = min(call.size, call.keys_read), 4 * call.batch * call.heads * call.queries
    return {
        "past": _part(call, free, DETACHED_PRODUCTS, products, 1, key * 2 * (call.keys_read - new), 0.0),
        "own": _part(
            call,
            pairs.total - free,
            products,
            products,
            2 if backward == "split" else 1,
            3 * query * call.queries + key * 2 * new + lse,
            query * call.queries + key * 2 * call.size,
        ),
    }


def decode_work(call: Call, visible: int) -> Work:
    """`decode_attention` of the call's queries over a memory of which the last query sees the newest `visible`."""
    query, key = _row_bytes(call)
    pairs = call.queries * visible - call.queries * (call.queries - 1) // 2
    read = query * call.queries + 2 * key * visible
    return _part(call, pairs, FORWARD_PRODUCTS, FORWARD_PRODUCTS, 1, read, query * call.queries)


def state_bytes(call: Call) -> int:
    """Bytes of the memory that the call needs before it, and leaves behind."""
    return memory_bytes(
        batch=call.batch,
        horizon=call.horizon,
        kv_heads=call.kv_heads,
        head_dim=call.head_dim,
        bytes_per_element=call.bytes_per_element,
    )


def linear_work(rows: int, inputs: int, outputs: int, *, bytes_per_element: int, backward: bool = False) -> Work:
    """A linear layer on `rows` rows, or its backward: one product forward, two backward (input and weight)."""
    flops = 2.0 * rows * inputs * outputs * (2 if backward else 1)
    x, y, weight = (bytes_per_element * size for size in (rows * inputs, rows * outputs, inputs * outputs))
    read, written = (x + y + weight, x + weight) if backward else (x + weight, y)
    return Work(flops, flops, 0.0, read, written, 2 if backward else 1)


def _row_bytes(call: Call) -> tuple[int, int]:
    """Bytes of one query, and of one key, in all rows and heads."""
    element = call.batch * call.head_dim * call.bytes_per_element
    return element * call.heads, element * call.kv_heads


def _part(
    call: Call, pairs: int, products: int, nominal: int, exponentials: int, bytes_read: float, bytes_written: float
) -> Work:
    scores = pairs * call.batch * call.heads
    once = 2.0 * scores * call.head_dim
    calls = call.segments if pairs else 0
    return Work(once * products, once * nominal, scores * exponentials, bytes_read, bytes_written, calls)


def visible_pairs(tokens: int, *, horizon: int, segment_length: int | None, visibility: str = "segment") -> int:
    """(query, key) pairs that the first `tokens` tokens of a piece see, each token seeing itself.

    Raises:
        ValueError: if `tokens` or `horizon` is negative, or `visibility` is unknown.
    """
    return Call(tokens, horizon, segment_length=segment_length, visibility=visibility).pairs.total


def steady_keys(*, horizon: int, segment_length: int, visibility: str = "segment") -> float:
    """Keys that a token sees on average once the memory is full, itself included."""
    return horizon + 1.0 if visibility == "sliding" else horizon + (segment_length + 1) / 2


def attention_flops(pairs: float, *, heads: int, head_dim: int) -> float:
    """Floating-point operations of the two matrix products of a forward pass over `pairs` pairs in each query head."""
    return 4.0 * pairs * heads * head_dim


def memory_bytes(
    *, batch: int, horizon: int, kv_heads: int, head_dim: int, bytes_per_element: int, scale_bytes: int = 0
) -> int:
    """Bytes of one layer's keys and values of `horizon` tokens: what `KVMemory.nbytes` gives for that capacity.

    `scale_bytes`: of a key's or value's scale, where the memory is int8 (`quantise.SCALE_BYTES`).
    """
    return 2 * batch * horizon * kv_heads * (head_dim * bytes_per_element + scale_bytes)


def memory_capacity(horizon: int, segment_length: int | None, visibility: str = "segment") -> int:
    """Slots that a memory needs to serve calls of any size, down to single tokens.

    The segment in progress must stay visible beside its past; a sliding query, once appended, sees itself as well.
    """
    return horizon + 1 if visibility == "sliding" else horizon + (segment_length or 0)


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
