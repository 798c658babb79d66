"""A layer's memory: the keys and values of the newest tokens of each row's piece, in a ring.

Positions are baked into the keys before they are stored, so attention over the memory does not care about order, and
appending overwrites the oldest slots in place: nothing is rolled, nothing is concatenated. The token that is number t
of its piece (from 0) lies in slot t % capacity; with `position` tokens seen, the slot of the token j < 0 tokens back is
therefore (position + j) % capacity, in every backend.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsmr_kernels.quantise import dequantise, quantise


class Lease:
    """Held by a recorded attention call until its backward has run: the memory's contents are still needed."""

    __slots__ = ("__weakref__",)


def ring_slices(position: int, capacity: int, first: int, count: int) -> list[tuple[int, int]]:
    """The slots of the `count` tokens from index `first` < 0 on, oldest first, as at most two (start, stop) ranges."""
    if count == 0:
        return []
    start = (position + first) % capacity
    stop = start + count
    return [(start, stop)] if stop <= capacity else [(start, capacity), (0, stop - capacity)]


@dataclass(eq=False, repr=False)
class KVMemory:
    """Ring of detached keys and values, one row of the batch independent of the other.

    Attributes:
        k, v: (batch, kv_heads, capacity, head_dim), storage in ring order.
        length: (batch,) int32, tokens held, <= capacity, all of the row's current piece.
        position: (batch,) int64, tokens of the current piece seen so far.
        k_scale, v_scale: (batch, kv_heads, capacity) float32 where k and v are int8 (see `dsmr_kernels.quantise`), else
            None.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    position: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    _leases: "weakref.WeakSet[Lease]" = field(default_factory=weakref.WeakSet, init=False, repr=False)

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVMemory":
        """A memory that holds nothing yet; `capacity` 0 is legal and stays empty.

        Args:
            dtype: of the keys and values: a floating one, or int8 for about half the bytes of bfloat16.

        Raises:
            ValueError: if `batch` or `capacity` is negative, or `kv_heads` or `head_dim` is not positive.
        """
        for name, value, least in (
            ("batch", batch, 0),
            ("kv_heads", kv_heads, 1),
            ("capacity", capacity, 0),
            ("head_dim", head_dim, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        # Zeros, not uninitialised: a slot that is not held is multiplied by a weight of 0, and 0 * NaN is NaN.
        shape = (batch, kv_heads, capacity, head_dim)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            *(torch.zeros(shape[:3], device=device, dtype=torch.float32) for _ in range(2 * (dtype == torch.int8))),
        )

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("batch", "kv_heads", "capacity", "head_dim"))
        return f"KVMemory({sizes}, {dtype} on {self.k.device})"

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
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of `k` and `v` and their scales, which is what the schedule's budget counts."""
        return sum(x.nbytes for x in self._storage())

    def tensors(self) -> dict[str, Tensor]:
        """All that there is of it, by attribute: `KVMemory(**memory.tensors())` has the same storage."""
        names = ("k", "v", "length", "position", "k_scale", "v_scale")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def _storage(self) -> list[Tensor]:
        """What has an entry a slot: along dimension 2."""
        return [x for x in (self.k, self.v, self.k_scale, self.v_scale) if x is not None]

    def lease(self) -> Lease:
        """Ask that the present contents outlive the next `append`: as long as the lease lives, it copies before it
        writes."""
        lease = Lease()
        self._leases.add(lease)
        return lease

    def unshare(self) -> None:
        """Make everything this memory's own to write to: what a pending backward still needs is left to it."""
        if len(self._leases):
            self._copy_storage()
            self.length, self.position = self.length.clone(), self.position.clone()

    def _copy_storage(self) -> None:
        self.k, self.v, self._leases = self.k.clone(), self.v.clone(), weakref.WeakSet()
        if self.k_scale is not None and self.v_scale is not None:
            self.k_scale, self.v_scale = self.k_scale.clone(), self.v_scale.clone()

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None) -> None:
        """Store the newest tokens, in place, detached; the oldest give way.

        A recorded attention call that has not run its backward yet keeps the old contents: only then are `k` and `v`
        copied before they are written.

        Args:
            k, v: (batch, kv_heads, S, head_dim), any S; in the memory's dtype, or in any floating one for int8.
            piece_start: (batch, S) as in `memory_attention`. A row whose last token began its piece in this call
                forgets everything older than that piece.

        Raises:
            ValueError: if the shapes do not fit the memory.
            TypeError: if the dtypes do not.
        """
        expected = (self.batch, self.kv_heads, k.shape[2] if k.dim() == 4 else -1, self.head_dim)
        for name, tensor in (("k", k), ("v", v)):
            if tuple(tensor.shape) != expected:
                raise ValueError(
                    f"{name} must have shape (batch, kv_heads, S, head_dim) = ({self.batch}, {self.kv_heads}, S, "
                    f"{self.head_dim}), S the same for k and v, to fit this memory; got {tuple(tensor.shape)}"
                )
            if self.k_scale is not None:
                if not tensor.dtype.is_floating_point:
                    raise TypeError(f"{name} must be of a floating dtype, to be stored in int8, got {tensor.dtype}")
            elif tensor.dtype != self.k.dtype:
                raise TypeError(f"{name} must have the memory's dtype {self.k.dtype}, got {tensor.dtype}")
        tokens = k.shape[2]
        if piece_start is not None and tuple(piece_start.shape) != (self.batch, tokens):
            raise ValueError(
                f"piece_start must have shape (batch, S) = ({self.batch}, {tokens}), got {tuple(piece_start.shape)}"
            )
        if tokens == 0:
            return
        if piece_start is None:
            self.position = self.position + tokens
            held = self.length + tokens
        else:
            start = piece_start[:, -1].to(torch.int64)
            fresh = start >= 0
            self.position = torch.where(fresh, tokens - start, self.position + tokens)
            held = torch.where(fresh, tokens - start, self.length + tokens)
        self.length = held.clamp(max=self.capacity).to(torch.int32)
        kept = min(tokens, self.capacity)
        if kept == 0:
            return
        newest = [x[:, :, tokens - kept :].detach() for x in (k, v)]
        if self.k_scale is not None:
            (key, key_scale), (value, value_scale) = (quantise(x) for x in newest)
            newest = [key, value, key_scale, value_scale]
        self._write(newest)

    def _write(self, newest: list[Tensor]) -> None:
        """Write the newest tokens up to `position` into their slots, in order of `_storage`. Tokens of an earlier piece
        land in slots that are not held, which does no harm and needs no mask."""
        kept = newest[0].shape[2]
        compiling = torch.compiler.is_compiling()
        if compiling or len(self._leases):
            self._copy_storage()
        if compiling or self.k.device.type != "cpu":
            slots = (self.position[:, None] + torch.arange(-kept, 0, device=self.k.device)).remainder(self.capacity)
            for storage, new in zip(self._storage(), newest, strict=True):
                storage.scatter_(2, _index(slots, new), new)
            return
        positions = self.position.tolist()
        uniform = len(set(positions)) == 1
        for row, position in enumerate(positions[:1] if uniform else positions):
            rows = slice(None) if uniform else slice(row, row + 1)
            done = 0
            for start, stop in ring_slices(position, self.capacity, -kept, kept):
                source = slice(done, done + stop - start)
                for storage, new in zip(self._storage(), newest, strict=True):
                    storage[rows, :, start:stop] = new[rows, :, source]
                done += stop - start

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget: all rows, or those where the boolean mask `rows` (batch,) is true. A reset row is a fresh row.

        Raises:
            ValueError: if `rows` is not a boolean mask of shape (batch,).
        """
        if rows is None:
            self.length = torch.zeros_like(self.length)
            self.position = torch.zeros_like(self.position)
            return
        if rows.dtype != torch.bool or tuple(rows.shape) != (self.batch,):
            raise ValueError(
                f"rows must be a boolean mask of shape ({self.batch},), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        self.length = self.length.masked_fill(rows.to(self.length.device), 0)
        self.position = self.position.masked_fill(rows.to(self.position.device), 0)

    def ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Oldest-first copies, right-aligned, and the mask of what is held.

        Returns:
            k, v: (batch, kv_heads, capacity, head_dim); the last entry is the newest token. In float32 where the memory
                is int8.
            mask: (batch, capacity), true where a token is held.
        """
        back = torch.arange(-self.capacity, 0, device=self.k.device)
        mask = back >= -self.length[:, None]
        k, v = self.values(torch.float32 if self.k_scale is not None else self.k.dtype)
        if self.capacity == 0:
            return k.clone(), v.clone(), mask
        slots = (self.position[:, None] + back).remainder(self.capacity)
        return k.gather(2, _index(slots, k)), v.gather(2, _index(slots, v)), mask

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

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "KVMemory":
        """The same memory on another device or in another dtype: a copy, or the memory itself if nothing changes."""
        if dtype in (None, self.k.dtype):
            storage = [x.to(device=device) for x in self._storage()]
        elif dtype == torch.int8:
            (k, k_scale), (v, v_scale) = (quantise(x.to(device=device)) for x in (self.k, self.v))
            storage = [k, v, k_scale, v_scale]
        else:
            storage = [x.to(device=device) for x in self.values(dtype)]
        if storage[0] is self.k:  # two memories over one storage would overwrite each other's slots
            return self
        counters = (x.to(device=device, copy=True) for x in (self.length, self.position))
        return KVMemory(*storage[:2], *counters, *storage[2:])

    def clone(self) -> "KVMemory":
        """An independent copy."""
        return KVMemory(**{name: x.clone() for name, x in self.tensors().items()})


def _index(slots: Tensor, like: Tensor) -> Tensor:
    """Slots (batch, S) as an index along dimension 2 of something shaped like `like`."""
    slots = slots[:, None, :, None] if like.dim() == 4 else slots[:, None, :]
    return slots.expand(*like.shape[:2], -1, *like.shape[3:])
