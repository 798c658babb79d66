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


@dataclass(eq=False)
class KVMemory:
    """Ring of detached keys and values, one row of the batch independent of the other.

    Attributes:
        k, v: (batch, kv_heads, capacity, head_dim), storage in ring order.
        length: (batch,) int32, tokens held, <= capacity, all of the row's current piece.
        position: (batch,) int64, tokens of the current piece seen so far.
    """

    k: Tensor
    v: Tensor
    length: Tensor
    position: Tensor
    _leases: "weakref.WeakSet[Lease]" = field(default_factory=weakref.WeakSet, repr=False)

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
        )

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
    def nbytes(self) -> int:
        """Bytes of `k` and `v`, which is what the schedule's budget counts."""
        return self.k.nbytes + self.v.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    def lease(self) -> Lease:
        """Ask that the present contents outlive the next `append`: as long as the lease lives, it copies before it
        writes."""
        lease = Lease()
        self._leases.add(lease)
        return lease

    def unshare(self) -> None:
        """Make everything this memory's own to write to: what a pending backward still needs is left to it."""
        if len(self._leases):
            self.k, self.v, self._leases = self.k.clone(), self.v.clone(), weakref.WeakSet()
            self.length, self.position = self.length.clone(), self.position.clone()

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None) -> None:
        """Store the newest tokens, in place, detached; the oldest give way.

        A recorded attention call that has not run its backward yet keeps the old contents: only then are `k` and `v`
        copied before they are written.

        Args:
            k, v: (batch, kv_heads, S, head_dim), any S.
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
            if tensor.dtype != self.k.dtype:
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
        self._write(k[:, :, tokens - kept :].detach(), v[:, :, tokens - kept :].detach())

    def _write(self, k: Tensor, v: Tensor) -> None:
        """Write the newest tokens up to `position` into their slots. Tokens of an earlier piece land in slots that are
        not held, which does no harm and needs no mask."""
        kept = k.shape[2]
        compiling = torch.compiler.is_compiling()
        if compiling or len(self._leases):
            self.k, self.v, self._leases = self.k.clone(), self.v.clone(), weakref.WeakSet()
        if compiling or self.k.device.type != "cpu":
            slots = self.position[:, None] + torch.arange(-kept, 0, device=k.device)
            index = slots.remainder(self.capacity)[:, None, :, None].expand(k.shape)
            self.k.scatter_(2, index, k)
            self.v.scatter_(2, index, v)
            return
        positions = self.position.tolist()
        uniform = len(set(positions)) == 1
        for row, position in enumerate(positions[:1] if uniform else positions):
            rows = slice(None) if uniform else slice(row, row + 1)
            done = 0
            for start, stop in ring_slices(position, self.capacity, -kept, kept):
                source = slice(done, done + stop - start)
                self.k[rows, :, start:stop] = k[rows, :, source]
                self.v[rows, :, start:stop] = v[rows, :, source]
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
            k, v: (batch, kv_heads, capacity, head_dim); the last entry is the newest token.
            mask: (batch, capacity), true where a token is held.
        """
        back = torch.arange(-self.capacity, 0, device=self.k.device)
        mask = back >= -self.length[:, None]
        if self.capacity == 0:
            return self.k.clone(), self.v.clone(), mask
        slots = (self.position[:, None] + back).remainder(self.capacity)
        index = slots[:, None, :, None].expand(self.k.shape)
        return self.k.gather(2, index), self.v.gather(2, index), mask

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "KVMemory":
        """The same memory on another device or in another dtype: a copy, or the memory itself if nothing changes."""
        k, v = (x.to(device=device, dtype=dtype) for x in (self.k, self.v))
        if k is self.k and v is self.v:  # two memories over one storage would overwrite each other's slots
            return self
        return KVMemory(k, v, self.length.to(device=device, copy=True), self.position.to(device=device, copy=True))

    def clone(self) -> "KVMemory":
        """An independent copy."""
        return KVMemory(self.k.clone(), self.v.clone(), self.length.clone(), self.position.clone())
