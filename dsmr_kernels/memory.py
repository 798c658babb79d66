"""A layer's memory as a value: appended to in place, and never under the eyes of someone who still needs what it held.

Whoever needs the present contents later takes a `snapshot`, as a recorded attention call does until its backward has
run: the memory then copies itself before it next writes, and only then. Everything else happens where the tensors lie,
the counters included, so that a captured graph may replay an append and goes on where it is.

Which tokens are kept, the newest or others, is a matter of `append`: `dsmr_kernels.appending` and
`dsmr_kernels.retention`.

A recomputation (activation checkpointing) must read what the first computation read. It does if it was given a
snapshot, or a memory that nothing was ever written to; any other memory may have moved on since, and says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.appending import append, append_operator, check_new
from dsmr_kernels.holding import MOVED, Holders, Lease, in_backward, may_look, ordinary, this_backward
from dsmr_kernels.quantise import quantise
from dsmr_kernels.retention import UNKNOWN, WITHIN, empty_set, retain, retain_operator, settle, settle_operator
from dsmr_kernels.ring import COUNTERS, SETS, STORAGE, Ring


class MemorySnapshot(Ring):
    """A memory as it was: it keeps showing that for as long as it lives, whatever becomes of the memory.

    Made by `KVMemory.snapshot`; attention takes it in a memory's place. It cannot be appended to: `appended` makes a
    memory of it that holds more.
    """

    _lease: Lease | None = None

    def snapshot(self) -> "MemorySnapshot":
        """Itself: it does not change."""
        return self

    def held(self) -> "MemorySnapshot":
        """Another view of the same, to be let go of apart."""
        view = _view(self, self.seen)
        view._lease = self.leased_anew()
        return view

    __copy__ = held

    def leased_anew(self) -> Lease | None:
        """Another lease of what it shows, for who keeps its tensors; None if no memory shares them."""
        return None if self._lease is None else Lease(self._lease.holders)

    def let_go(self) -> None:
        """Keep the memory from copying for this view's sake: for a holder who will hardly look again."""
        self._lease = None

    def appended(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None) -> "KVMemory":
        """A new memory that holds this and the new tokens; arguments as of `KVMemory.append`."""
        memory = _copied(self)
        memory.append(k, v, piece_start)
        return memory


def _view(ring: Ring, seen: int | Tensor) -> MemorySnapshot:
    """The same tensors; each call that is recorded makes one."""
    ring_only = (ring.k, ring.v, ring.length, ring.position, ring.k_scale, ring.v_scale, seen)
    if ring.mark is None:
        return MemorySnapshot(*ring_only)
    return MemorySnapshot(*ring_only, settled=ring.settled, mark=ring.mark, seeds=ring.seeds, room=ring.room)


class KVMemory(Ring):
    """Detached keys and values in a ring, or a set of them, one row of the batch independent of the other. Attributes
    as of `Ring`.

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

    _chosen: int | None = None  # how many tokens a set had seen when it last chose from a segment that was over

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
        super().__init__(
            k, v, length, position, k_scale, v_scale, seen, settled=settled, mark=mark, seeds=seeds, room=room
        )
        self._holders = Holders()  # of the present contents
        self._read_in_graph = False  # a compiled call may need the present contents in its backward, and holds no lease
        self._written: int | None = None  # never, in this backward pass (its number), or -1: outside of one

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
        retention: str = "newest",
        room: int = 0,
        seed: int | Tensor = 0,
    ) -> "KVMemory":
        """A memory that holds nothing yet; `capacity` 0 is legal and stays empty.

        Args:
            v_head_dim: of the values; default: head_dim.
            dtype: of the keys and values: a floating one, or int8 for about half the bytes of bfloat16.
            retention: which tokens are kept: the "newest", or for a set of another choice "uniform" (every n-th) or
                "random" (a sample), see `dsmr_kernels.retention`.
            room: of a set, slots of the capacity for the tokens of the segment in progress, which has as many; with
                none every append is a segment of its own.
            seed: of a random sample, for all rows alike, or (batch,) int64 for each.

        Raises:
            ValueError: if `batch` or `capacity` is negative, or `kv_heads` or `head_dim` is not positive, or if the
                set has no slot besides its room.
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
            with ordinary():
                return cls.empty(
                    batch,
                    kv_heads,
                    capacity,
                    head_dim,
                    v_head_dim=v_head_dim,
                    dtype=dtype,
                    device=device,
                    retention=retention,
                    room=room,
                    seed=seed,
                )
        shape = (batch, kv_heads, capacity)
        scales = [torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2 * (dtype == torch.int8))]
        made = cls(
            torch.zeros((*shape, head_dim), dtype=dtype, device=device),
            torch.zeros((*shape, v_head_dim), dtype=dtype, device=device),
            torch.zeros(batch, dtype=torch.int32, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            *scales,
            **empty_set(batch, capacity, retention, room, seed, device),
        )
        made._chosen = 0  # there is nothing to choose from
        return made

    def __copy__(self) -> "KVMemory":
        return self.clone()  # two memories over one storage would overwrite each other's slots

    # --- who still needs what it holds --------------------------------------------------------------------------------

    @property
    def leased(self) -> bool:
        """Whether someone needs the present contents."""
        return self._read_in_graph or self._holders.count > 0

    def snapshot(self) -> MemorySnapshot:
        """An immutable view of the present contents, true for as long as it lives. Nothing is copied now; the memory
        copies itself before it next writes, if the snapshot is still there.

        Raises:
            RuntimeError: inside a recomputation: take the snapshot outside of what is recomputed.
        """
        self.check_read()
        self.settle()
        return self.held()

    def held(self) -> MemorySnapshot:
        """`snapshot` for who has checked the read already."""
        seen = self.seen.clone() if isinstance(self.seen, Tensor) else self.seen
        view = _view(self, seen)
        if not torch.compiler.is_compiling():
            view._lease = self.leased_anew()
        return view

    def leased_anew(self) -> Lease | None:
        """For who keeps its tensors, as `held` does: while it lives, the memory copies before it writes."""
        return Lease(self._holders)

    @property
    def moved(self) -> bool:
        """Whether anything was ever written to it, so that a recomputation cannot know what it was."""
        return self._written is not None

    def check_read(self) -> None:
        """Refuse to be read by a recomputation, which cannot know whether this is what was read at first. In a memory
        that nothing was written to it is, and in one that the recomputation itself has made.

        Raises:
            RuntimeError: see above. In compiled code the attention operators see to it.
        """
        if torch.compiler.is_compiling() or self._written is None:
            return
        if in_backward() and self._written != this_backward():
            raise RuntimeError(MOVED)

    def note_graph_read(self) -> None:
        """A compiled call that may be differentiated is about to read: the next write must leave it what it read."""
        self._read_in_graph = True

    def unshare(self) -> None:
        """Make everything this memory's own to write to, since that is what comes next: what somebody still needs is
        left to them.

        Raises:
            RuntimeError: inside a recomputation, which would write a second time.
        """
        self.check_read()
        compiling = torch.compiler.is_compiling()
        if self.leased or (compiling and torch.is_grad_enabled()):  # the graph's backward may need what is there
            copy = _copied(self)
            for name in (*STORAGE, *COUNTERS, *SETS):
                setattr(self, name, getattr(copy, name))
            self._holders, self._read_in_graph = Holders(), False
        self._written = -1 if compiling else this_backward()

    # --- what it is for -----------------------------------------------------------------------------------------------

    def append(self, k: Tensor, v: Tensor, piece_start: Tensor | None = None, *, counts: Tensor | None = None) -> None:
        """Store the newest tokens, in place, detached; the oldest give way, or those that the set passes by.

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
        check_new(self, k, v, piece_start, counts)
        tokens = k.shape[2]
        if tokens == 0:
            return
        self._store(k.detach(), v.detach(), piece_start, counts, self._filled())

    def append_within(self, k: Tensor, v: Tensor) -> None:
        """`append` of tokens that the segment in progress has room for, for a captured graph: nothing in it asks
        whether a segment is over. Whoever replays it calls `settle` where one begins, and counts in `seen` what a
        replay stores, which Python does not see: appended to eagerly with another count, a set would lose tokens.
        """
        check_new(self, k, v, None, None)
        self._store(k.detach(), v.detach(), None, None, WITHIN)

    def _store(self, k: Tensor, v: Tensor, piece_start: Tensor | None, counts: Tensor | None, filled: int) -> None:
        self.unshare()
        compiling = torch.compiler.is_compiling()
        tensors = (self.k, self.v, self.k_scale, self.v_scale, self.length, self.position)
        new = (k, v, piece_start, counts)
        with torch.no_grad():
            if self.mark is None:
                (append_operator if compiling else append)(*tensors, *new)
            else:
                store: Callable[..., None] = retain_operator if compiling else retain
                store(*tensors, self.settled, self.mark, *new, self.seeds, self.room, filled)
        self.seen = self.seen + (k.shape[2] if counts is None else counts)

    def _filled(self) -> int:
        """Tokens of the segment in progress, in every row; `UNKNOWN` where they differ, or where what is done now is
        done again at another time."""
        if self.room == 0 or torch.compiler.is_compiling() or isinstance(self.seen, Tensor):
            return UNKNOWN
        if self.k.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return UNKNOWN
        return self.seen % self.room

    def settle(self) -> None:
        """Have a set choose from the segment that is over, if one is, as the next append would."""
        if self.mark is None or self.room == 0 or self._filled() > 0:
            return
        looked = self._filled() == 0  # not in a graph, which is not to be compiled for every number of tokens
        if looked and self._chosen == self.seen:
            return
        self.unshare()
        if looked:
            self._chosen = self.seen  # type: ignore[assignment]  # not a tensor: those are not looked at
        choose: Callable[..., None] = settle_operator if torch.compiler.is_compiling() else settle
        with torch.no_grad():
            scales = (self.k_scale, self.v_scale)
            choose(self.k, self.v, *scales, self.length, self.settled, self.mark, self.seeds, self.room)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget: all rows, or those where the boolean mask `rows` (batch,) is true. A reset row is a fresh row,
        whatever it held; segments go on in step with the other rows', unless all are reset.

        Raises:
            TypeError, ValueError: if `rows` is not a boolean mask of shape (batch,).
        """
        if rows is not None and not isinstance(rows, Tensor):
            raise TypeError(f"rows must be a boolean tensor of shape ({self.batch},), got {type(rows).__name__}")
        if rows is not None and (rows.dtype != torch.bool or tuple(rows.shape) != (self.batch,)):
            raise ValueError(
                f"rows must be a boolean mask of shape ({self.batch},), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        self.unshare()
        self._chosen = 0 if rows is None else self._chosen
        with torch.no_grad():
            for counter in (self.length, self.position, self.settled):
                if counter is not None:
                    counter.zero_() if rows is None else counter.masked_fill_(rows.to(counter.device), 0)
        if rows is None:
            self.seen = 0
            if self.mark is not None:
                self.mark.fill_(self.kept)

    def crop(self, count: int | Tensor) -> None:
        """Take back the newest `count` tokens, in every row or (batch,) int64 of each: they are as never appended, save
        that what they pushed out is gone.

        Raises:
            ValueError: if `count` is negative, or a row does not hold as many, or the memory is a set.
        """
        if self.mark is not None:
            raise ValueError(f"a memory with retention {self.retention!r} cannot be cropped: what gave way is gone")
        below = count < 0 if isinstance(count, Tensor) else bool(count < 0)
        if may_look(self.length) and bool(((self.length < count) | below).any()):
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
        index = torch.as_tensor(rows, device=self.k.device)
        if index.dtype == torch.bool or index.dim() != 1:
            raise ValueError(f"rows must be indices, got {index.dtype} of shape {tuple(index.shape)}")
        index = index.to(torch.int64)
        return self._rearranged(lambda x: x.index_select(0, index))

    def repeat(self, count: int) -> "KVMemory":
        """A new memory with each row `count` times, side by side: to try several continuations of each."""
        return self._rearranged(lambda x: x.repeat_interleave(count, 0))

    def _rearranged(self, how: Callable[[Tensor], Tensor]) -> "KVMemory":
        with ordinary():
            seen = how(self.seen) if isinstance(self.seen, Tensor) else self.seen
            return KVMemory(**{name: how(x) for name, x in self.tensors().items()}, seen=seen, room=self.room)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "KVMemory":
        """The same memory on another device or in another dtype: a copy, or the memory itself if nothing changes."""
        with ordinary():
            if dtype in (None, self.k.dtype):
                storage = [x.to(device=device) for x in self.storage()]
            elif dtype == torch.int8:
                (k, k_scale), (v, v_scale) = (quantise(x.to(device=device)) for x in (self.k, self.v))
                storage = [k, v, k_scale, v_scale]
            else:
                storage = [x.to(device=device) for x in self.values(dtype)]
            if storage[0] is self.k:  # two memories over one storage would overwrite each other's slots
                return self
            moved: dict[str, Any] = dict(zip(STORAGE, storage, strict=False))
            counters = [
                (name, x) for name in (*COUNTERS, *SETS, "seen") if isinstance(x := getattr(self, name), Tensor)
            ]
            moved |= {name: x.to(device=device, copy=True) for name, x in counters}
            return KVMemory(**{"seen": self.seen, **moved}, room=self.room)


def _copied(ring: Ring) -> KVMemory:
    """A memory of its own with the same contents; slots that are not held come along as they are."""
    seen = ring.seen.clone() if isinstance(ring.seen, Tensor) else ring.seen
    if torch.compiler.is_compiling():
        return KVMemory(**{name: x.clone() for name, x in ring.tensors().items()}, seen=seen, room=ring.room)
    with ordinary():
        return KVMemory(**{name: x.clone() for name, x in ring.tensors().items()}, seen=seen, room=ring.room)
