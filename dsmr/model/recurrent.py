"""Layers that hold their own memory: for stacks that hand a layer nothing but its input, as `nn.Sequential` does.

Inside `with stream(model, batch) as memory:` all `RecurrentAttention` layers of a model go on where the last call left
them; outside, a call sees its own tokens only. A call whose backward runs later reads what was there when it was made,
also where activation checkpointing computes it again.
"""

import contextlib
import itertools
import os
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsmr.model.altered import weight_of
from dsmr.model.attention import DSMRAttention, compute_dtype
from dsmr.model.positions import token_positions
from dsmr.model.state import MemoryState
from dsmr_kernels import KVMemory, MemorySnapshot
from dsmr_kernels.holding import MOVED, in_backward

SEVERAL = (
    "{} calls of this layer await their backward, and activation checkpointing computes one of them again without "
    "saying which: run the backward of each call before the next one, as gradient accumulation does, or checkpoint "
    "DSMRAttention with memory.snapshot()"
)


class _Call:
    """What a recorded call read. Alive for as long as its graph, which holds it; nobody else does."""

    def __init__(self, past: MemorySnapshot, piece_start: Tensor | None) -> None:
        self.past: MemorySnapshot | None = past
        self.piece_start = piece_start

    def over(self, gradient: Tensor) -> None:
        """The backward came past: nobody computes this call again, and the memory may write where it lies."""
        self.past = None

    def held(self, gradient: Tensor) -> None:
        """A hook that does nothing, by which the graph holds the call and lets it go."""


class _Seat:
    """A layer's place in a stream: which memory of which state is its own, and which calls await their backward."""

    def __init__(self, state: MemoryState, layer: int, settled: bool) -> None:
        self.state, self.layer = state, layer
        self.settled = settled  # the memory's dtype was asked for, or follows from what it holds
        self.calls: list[weakref.ref[_Call]] = []

    def record(self, past: MemorySnapshot, piece_start: Tensor | None, k: Tensor, y: Tensor) -> None:
        call = _Call(past, piece_start)
        if k.requires_grad:  # its gradient is complete once all of the layer's attention has gone backwards
            k.register_hook(call.over)
        else:
            y.register_hook(call.held)
        self.calls.append(weakref.ref(call))

    def awaiting(self) -> list[_Call]:
        """Calls whose backward may still come."""
        calls = [call for reference in self.calls if (call := reference()) is not None and call.past is not None]
        self.calls = [reference for reference in self.calls if reference() in calls]
        return calls


_numbers = itertools.count()
_seats: dict[int, _Seat] = {}
"""Of the layers that are in a stream, by number and not by attribute: what is reached through a module, a compiler
takes for a constant, and how far a stream is varies."""


class RecurrentAttention(DSMRAttention):
    """`DSMRAttention` that takes x (B, T, d_model) and returns y (B, T, d_model), its memory its own affair.

    Arguments as of `DSMRAttention`. Copies of a layer (`copy.deepcopy`, an EMA of the weights, `torch.save`) have its
    weights and no memory: what a stream holds is its `MemoryState`.

    Examples:
        >>> model = nn.Sequential(RecurrentAttention(64, 4, horizon=256), nn.Linear(64, 64))
        >>> with stream(model, batch=2) as memory:
        ...     for segment in torch.randn(2, 512, 64).split(128, dim=1):
        ...         y = model(segment)
        >>> memory.position
        tensor([512, 512])
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.number = next(_numbers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"number": next(_numbers)})

    @property
    def in_stream(self) -> bool:
        """Whether a call would go on where the last one ended."""
        return self.number in _seats

    def forward(self, x: Tensor, *, piece_start: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, T, d_model) -> y (B, T, d_model), over the memory of the stream that the layer is in, if it is in one.

        Args:
            piece_start: (B, T) int32 as in `memory_attention`; where nobody can hand it on, `MemoryState.pieces`.

        Raises:
            ValueError: if the batch is not the stream's.
            RuntimeError: in a recomputation where several calls await their backward.
        """
        seat = _seats.get(self.number)
        if seat is None:
            return super().forward(x, piece_start=piece_start)[0]
        if piece_start is None:
            piece_start = seat.state.piece_start
        if torch.compiler.is_compiling():
            return super().forward(x, self._traced(seat), piece_start=piece_start)[0]
        if in_backward():
            return self._again(x, seat)
        memory = self._memory(seat)
        if not torch.is_grad_enabled():
            return super().forward(x, memory, piece_start=piece_start)[0]
        self.check_autocast(memory)
        past = memory.snapshot()
        y, k, v = self._read(x, past, piece_start)
        if y.requires_grad:
            seat.record(past, piece_start, k, y)
        del past  # of the call and its graph alone, so that the memory is not copied once they are done
        start = None if piece_start is None else piece_start.clone()  # the caller may reuse its buffer
        seat.state.put(seat.layer, k, v, start)
        return y

    def _read(self, x: Tensor, past: MemorySnapshot, piece_start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        place = self.place(token_positions(past.position, x.shape[1], piece_start))
        return self.attend(x, past, place, piece_start=piece_start, segment_offset=self._offset(past, None))

    def _again(self, x: Tensor, seat: _Seat) -> Tensor:
        """A call that is computed again inside its backward: over what it read, and nothing is appended."""
        calls = seat.awaiting()
        if not calls:
            raise RuntimeError(MOVED)
        if len(calls) > 1:
            raise RuntimeError(SEVERAL.format(len(calls)))
        assert calls[0].past is not None
        return self._read(x, calls[0].past, calls[0].piece_start)[0]

    def _traced(self, seat: _Seat) -> KVMemory:
        """The memory for a compiler, which takes a number that it finds through a global name for a constant, and would
        make another graph for every place in a stream: how much a memory has seen is a tensor from then on. It stays a
        number where it must be looked at: in an aligned stream, and where others than the newest tokens are kept."""
        memory = seat.state.memory(seat.layer)
        if isinstance(memory.seen, int) and memory.retention == "newest" and not seat.state.aligned:
            memory.seen = torch.full_like(memory.position, memory.seen)
        return memory

    def _memory(self, seat: _Seat) -> KVMemory:
        memory = seat.state.memory(seat.layer)
        if not seat.settled and memory.dtype != (dtype := compute_dtype(weight_of(self.qkv))):  # autocast began since
            memory = seat.state.renew(seat.layer, memory.to(dtype=dtype))
        seat.settled = True
        return memory


def layers_of(model: nn.Module) -> list[RecurrentAttention]:
    """The layers of a model that hold their own memory, in the order of `model.modules()`.

    Raises:
        ValueError: if there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, RecurrentAttention)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no RecurrentAttention, which is what a stream is for: put some in, or call "
            "replace_attention"
        )
    return layers


@contextlib.contextmanager
def stream(
    model: nn.Module,
    batch: int,
    *,
    state: MemoryState | str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    aligned: bool = False,
    apart: bool = False,
) -> Iterator[MemoryState]:
    """Inside, all `RecurrentAttention` layers of `model` remember; the memory is what is yielded.

    Streams may be nested, as an evaluation is in a training: the inner one begins with nothing, and afterwards the
    outer one goes on where it was.

    Args:
        model: any module; what wraps it (DDP, `torch.compile`, an EMA) may be given as well.
        batch: rows that read on, each its own stream.
        state: go on with this one, or with the file that `MemoryState.save` wrote; None = nothing has been seen.
        dtype: of the memories; None = what keys and values come out in, also under autocast. int8: about half.
        aligned, apart: as in `DSMRAttention.new_memory`.

    Raises:
        ValueError: if the model has no such layer, or the state is of another model or batch.
        UserError: if the file is no saved state.
    """
    layers = layers_of(model)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch must be an integer >= 1, got {batch!r}")
    made = [layer.new_memory(batch, dtype=dtype, aligned=aligned, apart=apart) for layer in layers]
    given = state is not None
    if state is None:
        state = MemoryState(made, aligned=aligned)
    elif not isinstance(state, MemoryState):
        state = MemoryState.load(state, device=weight_of(layers[0].qkv).device)
    if given:
        _check_state(state, made)
    before = {layer.number: _seats.get(layer.number) for layer in layers}
    for index, layer in enumerate(layers):
        _seats[layer.number] = _Seat(state, index, settled=given or dtype is not None)
    try:
        yield state
    finally:
        for number, seat in before.items():
            if seat is None:
                del _seats[number]
            else:
                _seats[number] = seat


def _check_state(state: MemoryState, made: list[KVMemory]) -> None:
    if len(state) != len(made):
        raise ValueError(f"the state holds the memories of {len(state)} layers, but the model has {len(made)}")
    for layer, (found, wanted) in enumerate(zip(state.memories, made, strict=True)):
        for name in ("batch", "kv_heads", "head_dim", "retention", "capacity"):
            one, other = getattr(found, name), getattr(wanted, name)
            if one != other and not (name == "capacity" and one > other and found.retention == "newest"):
                raise ValueError(f"layer {layer} of the state has {name} {one}, where this model's stream has {other}")
