"""Attention of one new token over a memory on a CPU, read where and as it lies by the kernels of embedding bags.

A bag is a weighted sum of rows of a table, named by their numbers; PyTorch's kernels for it read each row once, at the
speed of the memory, in float32, bfloat16, float16 or bytes with a scale a row, and make no copy in another dtype. A
query's scores are such sums (rows: a component of `BLOCK` neighbouring keys; weights: the query's components), and so
is its result (rows: values; weights: the softmax). As rows may be named in any order, a ring that has wrapped is one
stretch like any other. Keys are kept beside the ring in that turned layout, and so are int8 values with their scales
between them, in as many bytes once more; other values are read from the ring itself.
"""

import math

import torch
from torch import Tensor

from dsmr_kernels.holding import ordinary
from dsmr_kernels.quantise import MOST, quantise
from dsmr_kernels.ring import Ring

BLOCK = 128  # keys in a row: fewer make more rows and bags, more are read in vain at both ends of what is seen
ROW_NUMBERS = 8  # bytes of a row of bytes for its scale and bias, float32 each
ZERO = 128  # the byte that stands for 0
TINY = torch.finfo(torch.float32).tiny  # below it a reciprocal may overflow
HERE = torch.device("cpu")  # whatever PyTorch's default is, as of dtypes below
# Scale and bias of a row of bytes, of its int8 scale.
PER_SCALE = torch.tensor([1.0, -float(ZERO)], dtype=torch.float32, device=HERE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)

# Private to PyTorch, or nearly: without it int8 memories are read through a copy.
_BYTES = getattr(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets", None)


def fast_bags() -> bool:
    """Whether this processor has compiled kernels for bags; elsewhere PyTorch sums row by row."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def serves(memory: Ring) -> bool:
    """Whether `BagAttention` can read `memory`, whose rows must be in step."""
    return (
        fast_bags()
        and memory.k.device.type == "cpu"
        and memory.dtype in DTYPES
        and memory.mark is None
        and memory.capacity > 0
        and memory.v.is_contiguous()
        and (memory.dtype != torch.int8 or (_BYTES is not None and memory.v_head_dim % 4 == 0))
    )


def byte_sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Bags over rows of bytes with a scale and a bias each: (bags, row), float32."""
    assert _BYTES is not None
    summed: Tensor = _BYTES(rows, indices, offsets, False, 0, False, weights)
    return summed


def _range(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, device=HERE)


def _bags(rows: int, each: int) -> Tensor:
    """Where bags of `each` rows begin."""
    return torch.arange(0, rows, each, dtype=torch.int32, device=HERE)


class Indices:
    """The rows that are read, for all layers that see the same slots; each is made once and kept until it changes."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[tuple[int, ...], tuple[Tensor, Tensor]]] = {}

    def keys(self, heads: int, group: int, blocks: int, dim: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows and the beginnings of their bags, one a head, query of its group and block: `count` blocks from `first`
        on, in a circle."""
        known, place = ("keys", heads, group, blocks, dim), (first, count)
        if known not in self._made or self._made[known][0] != place:
            block = (_range(first, first + count) % blocks)[:, None] * dim + _range(0, dim)
            rows = (_range(0, heads) * (blocks * dim))[:, None, None, None] + block
            rows = rows.expand(heads, group, count, dim).flatten().to(torch.int32)
            self._made[known] = place, (rows, _bags(len(rows), dim))
        return self._made[known][1]

    def values(self, heads: int, group: int, capacity: int, start: int, sees: int) -> tuple[Tensor, Tensor]:
        """Rows and the beginnings of their bags, one a head and query of its group: `sees` slots from `start` on."""
        known, place = ("values", heads, group, capacity), (start, sees)
        if known not in self._made or self._made[known][0] != place:
            slots, firsts = self._slots(heads, group, capacity)
            rows = torch.add(firsts, slots[start : start + sees]).view(-1)
            self._made[known] = place, (rows, _bags(len(rows), sees))
        return self._made[known][1]

    def _slots(self, heads: int, group: int, capacity: int) -> tuple[Tensor, Tensor]:
        known = ("slots", heads, group, capacity)
        if known not in self._made:
            slots = (_range(0, 2 * capacity) % capacity).to(torch.int32)
            firsts = (_range(0, heads) * capacity).repeat_interleave(group).to(torch.int32)
            self._made[known] = (), (slots, firsts[:, None])
        return self._made[known][1]


class BagAttention:
    """One layer's memory as bags read it; `write` follows each token that is written to the memory.

    Shapes: m counts the rows and KV heads, g the query heads of a KV head.
    """

    def __init__(self, memory: Ring, indices: Indices) -> None:
        self._indices = indices
        self.heads, self.dim, self.v_dim = memory.batch * memory.kv_heads, memory.head_dim, memory.v_head_dim
        self.capacity, self.bytes = memory.capacity, memory.k_scale is not None
        self.blocks = -(-memory.capacity // BLOCK)
        self.dtype = torch.float32 if self.bytes else memory.dtype  # of queries, weights and sums
        with ordinary():  # as the memory itself, which may be written to in any mode
            self._make(memory)

    def _make(self, memory: Ring) -> None:
        shape = (self.heads, self.blocks, self.dim)
        if self.bytes:
            self._keys = torch.full((*shape, BLOCK + ROW_NUMBERS), ZERO, dtype=torch.uint8, device=HERE)
            self._keys[..., BLOCK:].view(torch.float32).copy_(PER_SCALE)
            self._key_scales = torch.zeros(self.heads, self.blocks, BLOCK, dtype=torch.float32, device=HERE)
            rows = (self.heads, self.capacity, self.v_dim + ROW_NUMBERS)
            self._values = torch.empty(rows, dtype=torch.uint8, device=HERE)
            self._value_bytes = self._values[..., : self.v_dim]
            self._value_numbers = self._values[..., self.v_dim :].view(torch.float32)  # scale and bias
        else:
            self._keys = torch.zeros((*shape, BLOCK), dtype=self.dtype, device=HERE)
        self._rows = self._keys.view(-1, self._keys.shape[-1])
        self._fill(memory)

    def _fill(self, memory: Ring) -> None:
        """Take over what the memory holds."""
        held, position = int(memory.length[0]), int(memory.position[0])
        back = _range(position - held, position)
        slots, turned = back % memory.capacity, back % (self.blocks * BLOCK)
        block, column = turned // BLOCK, turned % BLOCK
        found = memory.k.flatten(0, 1)[:, slots].transpose(0, 1)  # [n, m, D]
        if memory.k_scale is None or memory.v_scale is None:
            self._keys[:, block, :, column] = found
            return
        self._keys[:, block, :, column] = _as_bytes(found)
        self._key_scales[:, block, column] = memory.k_scale.flatten(0, 1)[:, slots]
        self._value_bytes.copy_(_as_bytes(memory.v.flatten(0, 1)))
        torch.mul(memory.v_scale.flatten(0, 1)[..., None], PER_SCALE, out=self._value_numbers)

    def write(self, memory: Ring, k: Tensor, v: Tensor, position: int) -> None:
        """Store the token at `position`, k and v (B, Hkv, D) float32, in the memory's tensors, too; its counters are
        left to the caller."""
        slot, turned = position % self.capacity, position % (self.blocks * BLOCK)
        block, column = turned // BLOCK, turned % BLOCK
        if memory.k_scale is None or memory.v_scale is None:
            memory.k.select(2, slot).copy_(k)
            memory.v.select(2, slot).copy_(v)
            self._keys.select(1, block).select(2, column).copy_(k.reshape(self.heads, self.dim))
            return
        (k, k_scale), (v, v_scale) = _quantised(k, v)
        for ring, x in ((memory.k, k), (memory.v, v), (memory.k_scale, k_scale), (memory.v_scale, v_scale)):
            ring.select(2, slot).copy_(x)
        self._keys.select(1, block).select(2, column).copy_(_as_bytes(k).view(self.heads, self.dim))
        self._key_scales.select(1, block).select(1, column).copy_(k_scale.view(-1))
        self._value_bytes.select(1, slot).copy_(_as_bytes(v).view(self.heads, self.v_dim))
        torch.mul(v_scale.view(-1, 1), PER_SCALE, out=self._value_numbers.select(1, slot))

    def __call__(self, q: Tensor, memory: Ring, position: int, sees: int, scale: float) -> Tensor:
        """q (m, g, D) float32, of the token at `position` - 1, which is written already, and sees the `sees` newest
        -> (m, g, v_head_dim) float32."""
        group, oldest = q.shape[1], position - sees
        first, skipped = divmod(oldest % (self.blocks * BLOCK), BLOCK)
        count = -(-(skipped + sees) // BLOCK)
        scores = self._scores(q * scale, group, first, count)[:, skipped : skipped + sees]
        weights = torch.softmax(scores, -1).view(-1)
        where = self._indices.values(self.heads, group, self.capacity, oldest % self.capacity, sees)
        if self.bytes:
            out = byte_sums(self._values.view(-1, self.v_dim + ROW_NUMBERS), *where, weights)
        else:
            out = _sums(memory.v.view(-1, self.v_dim), *where, weights)
        return out.view(self.heads, group, self.v_dim).to(q.dtype)

    def _scores(self, q: Tensor, group: int, first: int, count: int) -> Tensor:
        """(m * g, count * BLOCK), of the keys of `count` blocks from `first` on, in a circle."""
        where = self._indices.keys(self.heads, group, self.blocks, self.dim, first, count)
        q = q.to(self.dtype).unsqueeze(2).expand(-1, -1, count, -1).reshape(-1)
        if not self.bytes:
            return _sums(self._rows, *where, q).view(-1, count * BLOCK)
        scores = byte_sums(self._rows, *where, q).view(self.heads, group, count, BLOCK)
        before = min(count, self.blocks - first)
        scores[:, :, :before] *= self._key_scales[:, None, first : first + before]
        if before < count:
            scores[:, :, before:] *= self._key_scales[:, None, : count - before]
        return scores.view(-1, count * BLOCK)


def _quantised(k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`quantise` of both, in fewer operators where they are as large as each other and all is finite and not zero."""
    if k.shape == v.shape:
        both = torch.stack([k, v])
        scale = both.abs().amax(-1).mul_(1 / MOST)
        if float(scale.min()) >= TINY and math.isfinite(float(scale.max())):
            x = both.mul_((1 / scale)[..., None]).round_().to(torch.int8)
            return [(x[0], scale[0]), (x[1], scale[1])]
    return [quantise(k), quantise(v)]


def _as_bytes(x: Tensor) -> Tensor:
    """int8 -> the byte that is `ZERO` larger."""
    return x.view(torch.uint8).bitwise_xor(ZERO)


def _sums(rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Bags over rows of a floating dtype: (bags, row) in that dtype, summed in float32."""
    return torch.embedding_bag(rows, indices, offsets, False, 0, False, weights)[0]
