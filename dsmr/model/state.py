"""The state of a batch of streams: every layer's memory, and how far into the current segment the streams are.

`MemoryState` is that of any stack of layers, `DSMRState` that of a `DSMRModel`, whose embedding may look back too.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from dsmr.console.errors import UserError
from dsmr.console.files import save_tensors
from dsmr.console.seal import check_seal
from dsmr_kernels import KVMemory
from dsmr_kernels.holding import MOVED, in_backward
from dsmr_kernels.ring import SETS

_FIELDS = ("k", "v", "length", "position")  # what every layer has; where keys and values are int8, also their scales
_SCALES = ("k_scale", "v_scale")


def _set_fits(memory: KVMemory) -> bool:
    """Whether what a memory has besides, if it keeps others than the newest tokens, fits the rest of it."""
    if memory.mark is None or memory.settled is None:
        return memory.mark is memory.settled is memory.seeds is None and memory.room == 0
    found = [x for x in (memory.mark, memory.settled, memory.seeds) if x is not None]
    if any(x.shape != memory.position.shape or x.dtype != torch.int64 for x in found):
        return False
    inside = (memory.mark >= memory.kept) & (memory.mark <= memory.capacity) & (memory.settled >= 0)
    return 0 <= memory.room < memory.capacity and bool(inside.all())


class MemoryState:
    """Small, movable, savable; rows are independent streams.

    While gradients are recorded, the tokens of the last call are appended only when the state is next looked at: by
    then the backward has usually run, so the rings are written in place and never copied.

    Args:
        memories: one `KVMemory` a layer, from `new_memory` of each.
        aligned: the memories hold no more than their horizons, so calls must begin with a segment.

    Attributes:
        piece_start: (B, T) as in `memory_attention`, of the calls that are being made, for layers that nobody can hand
            it to; see `pieces`.
    """

    def __init__(self, memories: list[KVMemory], *, aligned: bool = False) -> None:
        self._memories = memories
        self.aligned = aligned
        self.piece_start: Tensor | None = None
        self._pending: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}  # by layer

    @property
    def memories(self) -> list[KVMemory]:
        """Every layer's memory, with all tokens seen so far.

        Raises:
            RuntimeError: inside a backward pass while a call's tokens are pending, as in a recomputation; they stay so.
        """
        if self._pending and not torch.compiler.is_compiling() and in_backward():
            raise RuntimeError(MOVED)
        pending, self._pending = self._pending, {}
        for layer, (k, v, start) in pending.items():
            self._memories[layer].append(k, v, start)
        return self._memories

    def memory(self, layer: int) -> KVMemory:
        """One layer's memory, with all tokens that it has seen so far."""
        if layer in self._pending:
            self._memories[layer].append(*self._pending.pop(layer))
        return self._memories[layer]

    def put(self, layer: int, k: Tensor, v: Tensor, piece_start: Tensor | None) -> None:
        """Take in one layer's keys and values of a call, when that memory is next looked at."""
        self._pending[layer] = (k.detach(), v.detach(), piece_start)

    def renew(self, layer: int, memory: KVMemory) -> KVMemory:
        """Give a layer another memory, as one of another dtype."""
        self._memories[layer] = memory
        return memory

    def __len__(self) -> int:
        """Layers."""
        return len(self._memories)

    @property
    def batch(self) -> int:
        return self._memories[0].batch

    @property
    def position(self) -> Tensor:
        """(B,) int64, tokens of each row's current piece seen so far."""
        return self.memories[0].position

    @property
    def phase(self) -> int:
        """How many tokens the streams have seen since they began, in step: how far into a segment they are follows."""
        seen = self.memories[0].seen
        return int(seen.max()) if isinstance(seen, Tensor) else seen

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        return sum(memory.nbytes for memory in self._memories)

    @contextlib.contextmanager
    def pieces(self, piece_start: Tensor | None) -> Iterator[None]:
        """Pieces begin within the calls made inside: (B, T) as in `memory_attention`, for layers in a stream."""
        before, self.piece_start = self.piece_start, piece_start
        try:
            yield
        finally:
            self.piece_start = before

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget, in all rows or in those where the boolean mask `rows` (B,) is true. A reset row is a fresh row, save
        that segments go on in step with the other rows'; resetting all rows also begins a new segment."""
        for memory in self.memories:
            memory.reset(rows)

    def _with(self, memories: list[KVMemory]) -> Self:
        """This state over other memories."""
        made = type(self).__new__(type(self))
        MemoryState.__init__(made, memories, aligned=self.aligned)
        return made

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same state on another device or in another dtype: a copy, or the state itself if nothing changes."""
        moved = [memory.to(device, dtype) for memory in self.memories]
        if all(one is other for one, other in zip(moved, self._memories, strict=True)):
            return self
        return self._with([memory.clone() if memory in self._memories else memory for memory in moved])

    def clone(self) -> Self:
        """An independent copy."""
        return self._with([memory.clone() for memory in self.memories])

    def __copy__(self) -> Self:
        return self.clone()  # two states over the same memories would append twice

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.clone()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and integers only; the tensors are the state's own, not copies."""
        layers = [memory.tensors() for memory in self.memories]
        state: dict[str, Any] = {"layers": layers, "offset": self.phase, "aligned": self.aligned}
        rooms = [memory.room for memory in self.memories]
        return state | ({"rooms": rooms} if any(rooms) else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in place.

        Raises:
            ValueError: if the number of layers, a shape or a dtype differs from this state's.
        """
        layers = state["layers"]
        memories = self.memories
        if len(layers) != len(memories):
            raise ValueError(f"the saved state has {len(layers)} layers, this one {len(memories)}")
        for layer, (saved, memory) in enumerate(zip(layers, memories, strict=True)):
            if ("mark" in saved, "seeds" in saved) != (memory.mark is not None, memory.seeds is not None):
                raise ValueError(f"layer {layer} of the saved state does not have retention {memory.retention!r}")
            for name, wanted in memory.tensors().items():
                found = saved[name]
                if found.shape != wanted.shape or found.dtype != wanted.dtype:
                    raise ValueError(
                        f"layer {layer} of the saved state holds {name} as {found.dtype} {tuple(found.shape)}, "
                        f"this one {wanted.dtype} {tuple(wanted.shape)}"
                    )
        if state.get("rooms", rooms := [memory.room for memory in memories]) != rooms:
            raise ValueError(f"the saved state has room for segments of {state['rooms']} tokens, this one for {rooms}")
        offset = _offset(state["offset"])
        self._take_over(state)
        self.aligned = bool(state["aligned"])
        for saved, memory in zip(layers, memories, strict=True):
            memory.unshare()
            for name, current in memory.tensors().items():
                setattr(memory, name, saved[name].to(current.device, copy=True))
            memory.seen, memory._chosen = offset, None

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """What `load_state_dict` takes beside the memories; raises before it changes anything."""

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What `save` writes: tensors by name, and the numbers beside them."""
        tensors = {
            f"{layer}.{name}": tensor.contiguous()
            for layer, memory in enumerate(self.memories)
            for name, tensor in memory.tensors().items()
        }
        numbers = {"offset": str(self.phase), "aligned": str(int(self.aligned)), "layers": str(len(self._memories))}
        numbers |= {f"{layer}.room": str(memory.room) for layer, memory in enumerate(self._memories) if memory.room}
        return tensors, numbers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to one file (safetensors), whole or not at all."""
        save_tensors(path, *self.tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` wrote; `UserError` if the file is not a saved state."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(path), framework="pt", device=str(device)) as file:
                memories = _read_memories(file)
                check_seal(path)
                return cls._read(file, memories)
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a saved state: {error}") from error

    @classmethod
    def _read(cls, file: Any, memories: list[KVMemory]) -> Self:
        """The state of these memories, with what else the file holds."""
        if "recent" in file.keys():  # noqa: SIM118
            raise ValueError("it is that of a DSMRModel: DSMRState.load reads it")
        return cls(memories, aligned=file.metadata()["aligned"] == "1")


def _offset(saved: Any) -> int:
    """What a saved state says of its `phase`; `ValueError` for what no stream comes to."""
    if not 0 <= (offset := int(saved)) < 2**62:
        raise ValueError(f"its offset is {offset}, which is no number of tokens that a stream has read")
    return offset


def _read_memories(file: Any) -> list[KVMemory]:
    """Every layer's memory of a file of `save`, held against each other; many kinds of error for what is none."""
    metadata = file.metadata() or {}
    memories, written = [], set(file.keys())
    for layer in range(int(metadata["layers"])):
        tensors = {name: file.get_tensor(f"{layer}.{name}") for name in _FIELDS}
        if tensors["k"].dtype == torch.int8:
            tensors |= {name: file.get_tensor(f"{layer}.{name}") for name in _SCALES}
        held = [name for name in SETS if f"{layer}.{name}" in written]
        tensors |= {name: file.get_tensor(f"{layer}.{name}") for name in held}
        room = int(metadata.get(f"{layer}.room", "0"))
        memories.append(KVMemory(**tensors, seen=_offset(metadata["offset"]), room=room))
    if not memories:
        raise ValueError("it has no layers")
    for layer, memory in enumerate(memories):
        rows = {x.shape for x in (memory.length, memory.position)} | {memory.k.shape[:1]}
        scaled = all(x is None or x.shape == memory.k.shape[:3] for x in (memory.k_scale, memory.v_scale))
        fits = memory.k.dim() == 4 and memory.v.shape == memory.k.shape and scaled
        fits = fits and _set_fits(memory)
        for numbers, most in ((memory.length, memory.k.shape[2]), (memory.position, 2**62)):
            fits = fits and numbers.numel() > 0 and 0 <= int(numbers.min()) <= int(numbers.max()) <= most
        if not fits or rows != {memories[0].k.shape[:1]}:
            raise ValueError(f"the tensors of layer {layer} do not fit together")
    return memories


class DSMRState(MemoryState):
    """The state of a `DSMRModel`'s streams.

    Args:
        memories, aligned: as of `MemoryState`.
        recent: (B, n) int64, the newest tokens of each row, for a model whose embedding looks back; n may be 0.
        offset: tokens since the current segment began.
    """

    def __init__(self, memories: list[KVMemory], recent: Tensor, *, offset: int = 0, aligned: bool = False) -> None:
        super().__init__(memories, aligned=aligned)
        self.recent = recent
        self.offset = offset

    @property
    def phase(self) -> int:
        """Tokens since the current segment began."""
        return self.offset

    def take(
        self, new: list[tuple[Tensor, Tensor]], piece_start: Tensor | None, segment_length: int, later: bool
    ) -> None:
        """Take in a call's keys and values (one pair a layer), at once or, with `later`, when next looked at."""
        tokens = new[0][0].shape[2]
        start = None if piece_start is None else piece_start.clone()  # the caller may reuse its buffer
        self._pending = {layer: (k.detach(), v.detach(), start) for layer, (k, v) in enumerate(new)}
        self.offset = (self.offset + tokens) % segment_length
        if not later:
            _ = self.memories

    def reset(self, rows: Tensor | None = None) -> None:
        super().reset(rows)
        if rows is None:
            self.offset = 0

    def _with(self, memories: list[KVMemory]) -> "DSMRState":
        recent = self.recent.to(memories[0].k.device, copy=True)
        return DSMRState(memories, recent, offset=self.offset, aligned=self.aligned)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"recent": self.recent}

    def _take_over(self, state: Mapping[str, Any]) -> None:
        if state["recent"].shape != self.recent.shape:
            raise ValueError(
                f"the saved state holds recent tokens of shape {tuple(state['recent'].shape)}, "
                f"this one {tuple(self.recent.shape)}"
            )
        self.recent = state["recent"].to(self.recent.device, copy=True)
        self.offset = _offset(state["offset"])

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, numbers = super().tensors()
        return tensors | {"recent": self.recent.contiguous()}, numbers

    @classmethod
    def _read(cls, file: Any, memories: list[KVMemory]) -> "DSMRState":
        recent, metadata = file.get_tensor("recent"), file.metadata()
        if recent.dim() != 2 or recent.shape[0] != memories[0].batch or recent.dtype != torch.int64:
            raise ValueError("its recent tokens do not fit its memories")
        return cls(memories, recent, offset=_offset(metadata["offset"]), aligned=metadata["aligned"] == "1")
