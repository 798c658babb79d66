"""What a memory and its snapshots have in common: keys and values of the newest tokens of each row's piece, in a ring.

Positions are baked into the keys before they are stored, so attention over the memory does not care about order, and
nothing is rolled, nothing is concatenated. The token that is number t of its piece (from 0) lies in slot t % capacity;
with `position` tokens seen, the slot of the token j < 0 tokens back is therefore (position + j) % capacity, in every
backend. Slots that are not held may hold anything, NaN included: nothing here or in a backend lets them take part.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.quantise import dequantise, quantise

COUNTERS = ("length", "position")
STORAGE = ("k", "v", "k_scale", "v_scale")
SETS = ("settled", "mark", "seeds")  # of a memory that keeps others than the newest tokens


def ring_slices(position: int, capacity: int, first: int, count: int) -> list[tuple[int, int]]:
    """The slots of the `count` tokens from index `first` < 0 on, oldest first, as at most two (start, stop) ranges."""
    if count == 0:
        return []
    start = (position + first) % capacity
    stop = start + count
    return [(start, stop)] if stop <= capacity else [(start, capacity), (0, stop - capacity)]


def along_slots(slots: Tensor, like: Tensor) -> Tensor:
    """Slots (batch, S) as an index along dimension 2 of something shaped like `like`, (batch, kv_heads, n, ...)."""
    slots = slots[:, None, :, None] if like.dim() == 4 else slots[:, None, :]
    return slots.expand(*like.shape[:2], -1, *like.shape[3:])


class Ring:
    """Detached keys and values, one row of the batch independent of the other; to be read.

    Attributes:
        k: (batch, kv_heads, capacity, head_dim), storage in ring order.
        v: (batch, kv_heads, capacity, v_head_dim), likewise; v_head_dim is head_dim unless it was made otherwise.
        length: (batch,) int32, tokens held, <= capacity, all of the row's current piece.
        position: (batch,) int64, tokens of the current piece seen so far.
        k_scale, v_scale: (batch, kv_heads, capacity) float32 where k and v are int8 (see `dsmr_kernels.quantise`), else
            None.
        seen: tokens appended since the memory was made or wholly reset, whatever their pieces: how far a stream is
            into its segments. An integer, or (batch,) int64 once rows have advanced by different numbers.
        settled, mark, seeds: (batch,) int64, of a memory that keeps others than the newest tokens, see
            `dsmr_kernels.retention`: tokens of the piece that were offered to the set, the slot that the next token is
            written to, which is `capacity` where a segment is over, and what the sample follows from; else None.
        room: slots of the capacity that such a memory sets aside for the segment in progress.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        length: Tensor,
        position: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        seen: int | Tensor = 0,
        *,
        settled: Tensor | None = None,
        mark: Tensor | None = None,
        seeds: Tensor | None = None,
        room: int = 0,
    ) -> None:
        self.k, self.v, self.length, self.position = k, v, length, position
        self.k_scale, self.v_scale, self.seen = k_scale, v_scale, seen
        self.settled, self.mark, self.seeds, self.room = settled, mark, seeds, room

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("batch", "kv_heads", "capacity", "head_dim"))
        return f"{type(self).__name__}({sizes}, {dtype} on {self.k.device})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*STORAGE, *COUNTERS, *SETS, "seen", "room")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a memory read from a file is in nobody's hands yet

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k.shape[3]

    @property
    def v_head_dim(self) -> int:
        return self.v.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def retention(self) -> str:
        """Which tokens are kept: "newest", "uniform" or "random"."""
        if self.mark is None:
            return "newest"
        return "uniform" if self.seeds is None else "random"

    @property
    def kept(self) -> int:
        """Past tokens that there are slots for beside the segment in progress."""
        return self.capacity - self.room

    @property
    def nbytes(self) -> int:
        """Bytes of `k` and `v` and their scales, which is what the schedule's budget counts."""
        return sum(x.nbytes for x in self.storage())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it, by attribute: `KVMemory(**memory.tensors(), seen=memory.seen, room=memory.room)` has the
        same storage."""
        names = ("k", "v", "length", "position", "k_scale", "v_scale", *SETS)
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def versions(self) -> tuple[int, ...]:
        """How often each tensor was written to in place."""
        if self.k_scale is None and self.mark is None:  # as `tensors` below, but quicker
            return self.k._version, self.v._version, self.length._version, self.position._version
        return tuple(x._version for x in self.tensors().values())

    def storage(self) -> list[Tensor]:
        """What has an entry a slot, along dimension 2: k, v, and their scales if there are any."""
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Oldest-first copies, right-aligned, and the mask of what is held. A set comes in the order of its slots, and
        the segment in progress behind it.

        Returns:
            k, v: (batch, kv_heads, capacity, head_dim); the last entry is the newest token, and what is not held is 0.
                In float32 where the memory is int8.
            mask: (batch, capacity), true where a token is held.
        """
        back = torch.arange(-self.capacity, 0, device=self.k.device)
        mask = back >= -self.length[:, None]
        k, v = self.values(torch.float32 if self.k_scale is not None else self.k.dtype)
        if self.capacity == 0:
            return k.clone(), v.clone(), mask
        position = self.position if self.mark is None else self.mark
        slots = (position[:, None] + back).remainder(self.capacity)
        k, v = (x.gather(2, along_slots(slots, x)).masked_fill_(~mask[:, None, :, None], 0.0) for x in (k, v))
        return k, v, mask

    def values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k and v in ring order and in a floating dtype: the storage itself where that is what it holds."""
        if self.k_scale is None or self.v_scale is None:
            return self.k.to(dtype), self.v.to(dtype)
        return dequantise(self.k, self.k_scale, dtype), dequantise(self.v, self.v_scale, dtype)

    def as_stored(self, x: Tensor) -> Tensor:
        """What a new key or value x (batch, kv_heads, S, head_dim) will be when it is read back from this memory, in
        x's dtype if the memory is int8. Gradients pass as if nothing were rounded."""
        if self.k_scale is None:
            return x.to(self.k.dtype)
        return x + (dequantise(*quantise(x), x.dtype) - x).detach()
