"""A layer's memory as a value: appended to in place, and never under the eyes of someone who still needs what it held.

Whoever needs the present contents later takes a `snapshot`, as a recorded attention call does until its backward has
run: the memory then copies itself before it next writes, and only then. Everything else happens where the tensors lie,
the counters included, so that a captured graph may replay an append and goes on where it is.

A recomputation (activation checkpointing) must read what the first computation read. It does if it was given a
snapshot; a memory that has moved on since says so instead of being read.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsmr_kernels.appending import append, append_operator
from dsmr_kernels.quantise import quantise
from dsmr_kernels.ring import COUNTERS, STORAGE, Ring

MOVED = (
    "a KVMemory is used again inside a backward pass, as activation checkpointing does to recompute, but it has been "
    "appended to since: give the checkpointed call memory.snapshot(), or let DSMRModel(..., checkpoint_layers=True) do "
    "the checkpointing"
)


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: what is computed now is computed again."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Tensors made inside are ordinary ones, that may be written to anywhere, whatever the mode outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Lease:
    """Held by whoever needs a memory's present contents: while it lives, the memory copies before it writes."""

    __slots__ = ("__weakref__",)


class MemorySnapshot(Ring):
    """A memory as it was: it keeps showing that for as long as it lives, whatever becomes of the memory.

    Made by `KVMemory.snapshot`; attention takes it in a memory's place. It cannot be appended to: `appended` makes a
    memory of it that holds more.
    """

    _lease: Lease | None = None

    def snapshot(self) -> "MemorySnapshot":
        """Itself: it does not change."""
        return self

    held = snapshot

    def let_go(self) -> None:
        """Keep the memory from copying for this snapshot's sake: for a holder who will hardly look again."""
        self._lease = None

    def appended(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None) -> "KVMemory":
        """A new memory that holds this and the new tokens; arguments as of `KVMemory.append`."""
        memory = _copied(self)
        memory._take(k, v, piece_start, None)  # which nobody else sees, a recomputation may do as well
        return memory


class KVMemory(Ring):
    """Ring of detached keys and values, one row of the batch independent of the other. Attributes as of `Ring`.

    Examples:
        A step of training under activation checkpointing::

            past = memory.snapshot()
            y, k, v = checkpoint(layer.attend, x, past, place, use_reentrant=False)
            memory.append(k, v)  # `past` stays what it was, also when the backward computes `attend` once more

        Several continuations of each row, of which one goes on, and a draft of which two tokens are taken back::

            tries = memory.repeat(4)
            memory = tries.select([2])
            memory.crop(2)
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
    ) -> None:
        super().__init__(k, v, length, position, k_scale, v_scale, seen)
        self._lease: weakref.ref[Lease] | None = None  # on the present contents
        self._older: tuple[weakref.ref[Lease], ...] = ()  # on contents that were left to their holders
        self._unrecorded_reads = 0  # by attention without gradients, of the present contents

    @classmethod
    def empty(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "KVMemory":
        """A memory that holds nothing yet; `capacity` 0 is legal and stays empty.

        Args:
            v_head_dim: of the values; default: head_dim.
            dtype: of the keys and values: a floating one, or int8 for about half the bytes of bfloat16.

        Raises:
            ValueError: if `batch` or `capacity` is negative, or `kv_heads` or `head_dim` is not positive.
        """
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, value, least in (
            ("batch", batch, 0),
            ("kv_heads", kv_heads, 1),
            ("capacity", capacity, 0),
            ("head_dim", head_dim, 1),
            ("v_head_dim", v_head_dim, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with _ordinary():
                return cls.empty(batch, kv_heads, capacity, head_dim, v_head_dim=v_head_dim, dtype=dtype, device=device)
        shape = (batch, kv_heads, capacity)
        return cls(
            torch.zeros((*shape, head_dim), dtype=dtype, device=device),
            torch.zeros((*shape, v_head_dim), dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            *(torch.zeros(shape, device=device, dtype=torch.float32) for _ in range(2 * (dtype == torch.int8))),
        )

    def __copy__(self) -> "KVMemory":
        return self.clone()  # two memories over one storage would overwrite each other's slots

    # --- who still needs what it holds --------------------------------------------------------------------------------

    @property
    def leased(self) -> bool:
        """Whether someone needs the present contents."""
        return self._lease is not None and self._lease() is not None

    def lease(self) -> Lease:
        """Ask that the present contents outlive the next append: as long as the lease lives, it copies before it
        writes."""
        lease = self._lease() if self._lease is not None else None
        if lease is None:
            lease = Lease()
            self._lease = weakref.ref(lease)
        return lease

    def snapshot(self) -> MemorySnapshot:
        """An immutable view of the present contents, true for as long as it lives. Nothing is copied now; the memory
        copies itself before it next writes, if the snapshot is still there.

        Raises:
            RuntimeError: inside a recomputation, if the memory has moved on since the first computation: take the
                snapshot outside of what is recomputed.
        """
        if not torch.compiler.is_compiling():
            self.note_read(recorded=torch.is_grad_enabled())
        return self.held()

    def held(self) -> MemorySnapshot:
        """`snapshot` for who has noted the read already."""
        seen = self.seen.clone() if isinstance(self.seen, Tensor) else self.seen
        view = MemorySnapshot(**self.tensors(), seen=seen)
        view._lease = self.lease()
        return view

    def unshare(self) -> None:
        """Make everything this memory's own to write to: what somebody still needs is left to them."""
        if self.leased:
            assert self._lease is not None
            self._older = (*(old for old in self._older if old() is not None), self._lease)
            self._own_copies()
        self._unrecorded_reads = 0

    def _own_copies(self) -> None:
        copy = _copied(self)
        for name in (*STORAGE, *COUNTERS):
            setattr(self, name, getattr(copy, name))
        self._lease = None

    def note_read(self, recorded: bool) -> None:
        """Attention is about to read the present contents, with a gradient `recorded` or without.

        Raises:
            RuntimeError: if this is a recomputation, and the first computation read something else: there is no read
                of the present contents that this one could repeat, or there are older ones that it might.
        """
        if not in_backward():
            self._unrecorded_reads += not recorded
        elif any(old() is not None for old in self._older) or not (self.leased or self._unrecorded_reads):
            raise RuntimeError(MOVED)
        elif not self.leased:
            self._unrecorded_reads -= 1

    # --- what it is for -----------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None, *, counts: Tensor | None = None) -> None:
        """Store the newest tokens, in place, detached; the oldest give way.

        Where somebody still needs the old contents (a snapshot, or a recorded attention call that has not run its
        backward yet), they keep them: only then is the memory copied before it is written.

        Args:
            k: (batch, kv_heads, S, head_dim), any S; in the memory's dtype, or in any floating one for int8.
            v: (batch, kv_heads, S, v_head_dim), likewise.
            piece_start: (batch, S) as in `memory_attention`. A row whose last token began its piece in this call
                forgets everything older than that piece.
            counts: (batch,) int64, how many of the S tokens each row takes, the first ones; default: all.

        Raises:
            ValueError: if the shapes do not fit the memory.
            TypeError: if the dtypes do not.
            RuntimeError: inside a backward pass, where a recomputation would append a second time.
        """
        if not torch.compiler.is_compiling() and in_backward():
            raise RuntimeError(MOVED)
        self._take(k, v, piece_start, counts)

    def _take(self, k: Tensor, v: Tensor, piece_start: Tensor | None, counts: Tensor | None) -> None:
        self._check_new(k, v, piece_start, counts)
        tokens = k.shape[2]
        if tokens == 0:
            return
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled():  # the graph's backward may need what is there, and nothing tells
                self._own_copies()
            store: Callable[..., None] = append_operator
        else:
            self.unshare()
            store = append
        with torch.no_grad():
            scales = (self.k_scale, self.v_scale)
            store(self.k, self.v, *scales, self.length, self.position, k.detach(), v.detach(), piece_start, counts)
        self.seen = self.seen + (tokens if counts is None else counts)

    def _check_new(self, k: Tensor, v: Tensor, piece_start: Tensor | None, counts: Tensor | None) -> None:
        tokens = k.shape[2] if k.dim() == 4 else -1
        for name, tensor, dim in (("k", k, self.head_dim), ("v", v, self.v_head_dim)):
            if tuple(tensor.shape) != (self.batch, self.kv_heads, tokens, dim):
                raise ValueError(
                    f"{name} must have shape (batch, kv_heads, S, head_dim) = ({self.batch}, {self.kv_heads}, S, "
                    f"{dim}), S the same for k and v, to fit this memory; got {tuple(tensor.shape)}"
                )
            if self.k_scale is not None:
                if not tensor.dtype.is_floating_point:
                    raise TypeError(f"{name} must be of a floating dtype, to be stored in int8, got {tensor.dtype}")
            elif tensor.dtype != self.k.dtype:
                raise TypeError(f"{name} must have the memory's dtype {self.k.dtype}, got {tensor.dtype}")
        if piece_start is not None and tuple(piece_start.shape) != (self.batch, tokens):
            raise ValueError(
                f"piece_start must have shape (batch, S) = ({self.batch}, {tokens}), got {tuple(piece_start.shape)}"
            )
        if counts is None:
            return
        if counts.dtype != torch.int64 or tuple(counts.shape) != (self.batch,):
            raise ValueError(
                f"counts must be int64 of shape (batch,) = ({self.batch},), got {counts.dtype} of shape "
                f"{tuple(counts.shape)}"
            )
        known = not torch.compiler.is_compiling() and counts.device.type == "cpu"  # elsewhere, looking makes it wait
        if known and bool(((counts < 0) | (counts > tokens)).any()):
            raise ValueError(f"counts must lie between 0 and the {tokens} tokens of the call, got {counts.tolist()}")

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget: all rows, or those where the boolean mask `rows` (batch,) is true. A reset row is a fresh row,
        whatever it held; segments go on in step with the other rows', unless all are reset.

        Raises:
            ValueError: if `rows` is not a boolean mask of shape (batch,).
        """
        if rows is not None and (rows.dtype != torch.bool or tuple(rows.shape) != (self.batch,)):
            raise ValueError(
                f"rows must be a boolean mask of shape ({self.batch},), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        if not torch.compiler.is_compiling():
            self.unshare()
        elif torch.is_grad_enabled():
            self._own_copies()
        with torch.no_grad():
            for counter in (self.length, self.position):
                counter.zero_() if rows is None else counter.masked_fill_(rows.to(counter.device), 0)
        if rows is None:
            self.seen = 0

    def crop(self, count: int | Tensor) -> None:
        """Take back the newest `count` tokens, in every row or (batch,) int64 of each: they are as never appended, save
        that what they pushed out is gone.

        Raises:
            ValueError: if `count` is negative, or a row does not hold as many.
        """
        known = not torch.compiler.is_compiling() and self.length.device.type == "cpu"
        if known and bool(((self.length < count) | (torch.as_tensor(count) < 0)).any()):
            raise ValueError(
                f"count must lie between 0 and the tokens that each row holds, {self.length.tolist()}, got "
                f"{count.tolist() if isinstance(count, Tensor) else count}"
            )
        self.unshare()
        with torch.no_grad():
            self.length.sub_(count)
            self.position.sub_(count)
        self.seen = self.seen - count

    # --- copies -------------------------------------------------------------------------------------------------------

    def clone(self) -> "KVMemory":
        """An independent copy."""
        return _copied(self)

    def select(self, rows: Tensor | Sequence[int]) -> "KVMemory":
        """A new memory of these rows, by index, in this order; an index may come several times."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.k.device)
        return self._rearranged(lambda x: x.index_select(0, index))

    def repeat(self, count: int) -> "KVMemory":
        """A new memory with each row `count` times, side by side: to try several continuations of each."""
        return self._rearranged(lambda x: x.repeat_interleave(count, 0))

    def _rearranged(self, how: Callable[[Tensor], Tensor]) -> "KVMemory":
        with _ordinary():
            seen = how(self.seen) if isinstance(self.seen, Tensor) else self.seen
            return KVMemory(**{name: how(x) for name, x in self.tensors().items()}, seen=seen)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "KVMemory":
        """The same memory on another device or in another dtype: a copy, or the memory itself if nothing changes."""
        with _ordinary():
            if dtype in (None, self.k.dtype):
                storage = [x.to(device=device) for x in self.storage()]
            elif dtype == torch.int8:
                (k, k_scale), (v, v_scale) = (quantise(x.to(device=device)) for x in (self.k, self.v))
                storage = [k, v, k_scale, v_scale]
            else:
                storage = [x.to(device=device) for x in self.values(dtype)]
            if storage[0] is self.k:  # two memories over one storage would overwrite each other's slots
                return self
            counters = [x.to(device=device, copy=True) for x in (self.length, self.position)]
            seen = self.seen.to(device=device, copy=True) if isinstance(self.seen, Tensor) else self.seen
            return KVMemory(storage[0], storage[1], *counters, *storage[2:], seen=seen)  # type: ignore[misc]


def _copied(ring: Ring) -> KVMemory:
    """A memory of its own with the same contents; slots that are not held come along as they are."""
    seen = ring.seen.clone() if isinstance(ring.seen, Tensor) else ring.seen
    if torch.compiler.is_compiling():
        return KVMemory(**{name: x.clone() for name, x in ring.tensors().items()}, seen=seen)
    with _ordinary():
        return KVMemory(**{name: x.clone() for name, x in ring.tensors().items()}, seen=seen)
