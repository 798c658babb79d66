"""Where the new token's keys and values go, and what its query reads: the memories of a stream, advanced in place.

Two kinds. `HostRings` counts on the host and touches only what is visible of each ring, for CPUs: as bags of rows where
the processor has kernels for them, else as stretches. `DeviceRings` counts on the device and never looks, so that a
step can be captured and replayed: for GPUs.
"""

from typing import Protocol

import torch
from torch import Tensor

from dsmr.model.attention import DSMRAttention
from dsmr.model.positions import Rotary
from dsmr.model.state import DSMRState
from dsmr_kernels import KVMemory, append_rotated, decode_attention
from dsmr_kernels.backends.sdpa.bags import BagAttention, Indices, serves
from dsmr_kernels.backends.sdpa.decode import StretchAttention


class Rings(Protocol):
    """The memories of all layers, during a step."""

    @property
    def positions(self) -> Tensor:
        """(B,) int64, the position of the token that the step shows."""

    @property
    def known_position(self) -> int | None:
        """The same of all rows, where the host knows it."""

    def attend(self, layer: int, heads: Tensor, turn: Rotary | None) -> Tensor:
        """Turn the token's queries and keys, store keys and values, attend.

        Args:
            heads: (B, Hq + 2 Hkv, D), queries, keys and values.
            turn: the token's rotary angles; None = it is not turned.

        Returns:
            (B, Hq, D).
        """

    def advance(self) -> None:
        """The token has gone through all layers."""


def in_step(state: "DSMRState") -> bool:
    """Whether all rows of `state` have seen as many tokens of their pieces and hold as many, in every layer."""
    return state.batch > 0 and all(
        bool((counts == counts[0]).all())
        for memory in state.memories
        for counts in (memory.position, memory.length, memory.settled, memory.mark)
        if counts is not None
    )


class HostRings:
    """Rings whose rows are in step, on a CPU. Where somebody else has changed them since the last step (a call, a
    reset, a state that was loaded), they are looked at anew."""

    def __init__(self, layers: list[DSMRAttention], state: "DSMRState") -> None:
        self.layers, self.state = layers, state
        self._attention = StretchAttention()
        self._slopes = [None if layer.slopes is None else self._grouped(layer) for layer in layers]
        self._turned: list[Tensor | None] = [None] * len(layers)  # queries and keys (B, Hq + Hkv, D), scratch
        self._look()

    def _look(self) -> None:
        """Take over what the memories hold.

        Raises:
            ValueError: if their rows are not in step.
        """
        if not in_step(self.state):
            raise ValueError("the rows of state must be in step: some have seen or hold more tokens than others")
        self.memories = self.state.memories
        self.position = int(self.memories[0].position[0])
        self.lengths = [int(memory.length[0]) for memory in self.memories]
        indices = Indices()
        self._bags = [
            BagAttention(memory, indices) if slopes is None and serves(memory) else None
            for memory, slopes in zip(self.memories, self._slopes, strict=True)
        ]
        self._left = [_Mark(memory) for memory in self.memories]

    def _grouped(self, layer: DSMRAttention) -> Tensor:
        assert layer.slopes is not None
        slopes = layer.slopes.float().view(1, layer.n_kv_heads, -1, 1)
        return slopes.expand(self.state.batch, -1, -1, -1).flatten(0, 1)

    @property
    def positions(self) -> Tensor:
        if not all(mark.left(memory) for memory, mark in zip(self.state.memories, self._left, strict=True)):
            self._look()
        return torch.full((self.state.batch,), self.position, dtype=torch.int64, device="cpu")

    @property
    def known_position(self) -> int:
        return self.position

    def _sees(self, index: int) -> int:
        layer = self.layers[index]
        offset = 0 if layer.visibility == "sliding" else self.state.offset
        return min(layer.horizon + offset + 1, self.lengths[index])

    def attend(self, index: int, heads: Tensor, turn: Rotary | None) -> Tensor:
        memory, bags = self.memories[index], self._bags[index]
        turned, v = heads[:, : -memory.kv_heads], heads[:, -memory.kv_heads :]
        if turn is not None:
            scratch = self._turned[index]
            if scratch is None:
                with torch.inference_mode(False):  # it is written to in whatever mode the next step comes
                    scratch = self._turned[index] = heads.new_empty(turned.shape)
            turn.rotate_into(scratch, turned)
            turned = scratch
        q, k = turned[:, : -memory.kv_heads], turned[:, -memory.kv_heads :]
        position = self._store(index, k, v)
        grouped, scale = q.reshape(-1, q.shape[1] // memory.kv_heads, q.shape[2]), q.shape[2] ** -0.5
        if bags is not None:
            out = bags(grouped, memory, position, self._sees(index), scale)
        else:
            out = self._attention(grouped, memory, position, self._sees(index), scale, self._slopes[index])
        return out.view(q.shape)

    def _store(self, index: int, k: Tensor, v: Tensor) -> int:
        """Write the token's keys and values (B, Hkv, D); the position behind it, as the memory's slots count it."""
        memory, bags = self.memories[index], self._bags[index]
        growing = self.lengths[index] < memory.capacity
        if bags is None and (memory.mark is not None or memory.k_scale is not None):
            memory.append(k[:, :, None], v[:, :, None])
        else:
            memory.unshare()
            if bags is None:
                slot = self.position % memory.capacity
                memory.k[:, :, slot] = k
                memory.v[:, :, slot] = v
            else:
                bags.write(memory, k, v, self.position)
            memory.position.add_(1)
            memory.seen = memory.seen + 1
            if growing:
                memory.length.add_(1)
        self._left[index] = _Mark(memory)
        if memory.mark is not None:  # a set, behind which lies the segment in progress
            self.lengths[index] = int(memory.length[0])
            return int(memory.mark[0])
        self.lengths[index] += growing
        return self.position + 1

    def advance(self) -> None:
        self.position += 1
        self.state.offset = (self.state.offset + 1) % (self.layers[0].segment_length or 1)


class _Mark:
    """What is no longer the same once a memory was changed, whoever did it: a counter is written with every change."""

    def __init__(self, memory: KVMemory) -> None:
        self.position, self.version, self.seen = memory.position, _version(memory.position), memory.seen

    def left(self, memory: KVMemory) -> bool:
        """Whether the memory is still as it was."""
        same = memory.position is self.position and _version(memory.position) == self.version
        return same and (memory.seen is self.seen or (type(memory.seen) is int and memory.seen == self.seen))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class DeviceRings:
    """Rings whose rows may be of any age, counted on the device: nothing here waits for it."""

    def __init__(self, layers: list[DSMRAttention], state: "DSMRState") -> None:
        self.layers, self.state, self.memories = layers, state, state.memories
        device = self.memories[0].k.device
        for memory in self.memories:  # a captured step writes to these very tensors
            memory.unshare()
        # Of its own: in the first layer the memory's position moves on before the later layers read theirs.
        self.positions = self.memories[0].position.clone()
        self._offset = torch.tensor(state.offset, dtype=torch.int32, device=device)
        self._segment = layers[0].segment_length or 1

    @property
    def known_position(self) -> None:
        return None

    def counters(self) -> list[Tensor]:
        """What `advance` changes."""
        return [self.positions, self._offset]

    def attend(self, index: int, heads: Tensor, turn: Rotary | None) -> Tensor:
        layer, memory = self.layers[index], self.memories[index]
        q, k, v = heads[:, :, None].split([layer.n_heads, layer.n_kv_heads, layer.n_kv_heads], 1)
        cos, sin = (None, None) if turn is None else (turn.cos, turn.sin)
        if memory.mark is not None:
            return self._within_segment(q, k, v, memory, turn)
        query = append_rotated(q, k, v, memory, cos=cos, sin=sin)
        offset = torch.zeros_like(self._offset) if layer.visibility == "sliding" else self._offset
        seen = (offset + (layer.horizon + 1)).expand(self.positions.shape)
        out = decode_attention(query, memory, visible=seen, alibi_slopes=layer.slopes)
        return out[:, :, 0].to(heads.dtype)

    def _within_segment(self, q: Tensor, k: Tensor, v: Tensor, memory: KVMemory, turn: Rotary | None) -> Tensor:
        """The same for a set, of which all is seen; see `begin`."""
        stored = q.dtype if memory.dtype == torch.int8 else memory.dtype
        query, key = (q, k) if turn is None else (turn(q), turn(k))
        memory.append_within(key.to(stored), v.to(stored))
        return decode_attention(query.to(stored), memory)[:, :, 0].to(q.dtype)

    def begin(self) -> None:
        """To be called before each step, from outside of a captured graph: where a segment begins, sets choose from the
        one that is over."""
        if self.state.offset == 0:
            for memory in self.memories:
                memory.settle()

    def advance(self) -> None:
        self.positions.add_(1)
        self._offset.add_(1).remainder_(self._segment)
