"""The memories of streams that an exported model plays: arrays that lie in order, the oldest token first.

A memory written in place has room for its horizon and a segment. Tokens are appended behind those that are held, and
where a segment ends the newest `horizon` move to the front: one copy a segment, and everything visible is always one
stretch. A stream that is younger than its horizon holds what there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.exported.about import About

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "int8": np.int8}

MOST_AT_ONCE = 128  # tokens of a prompt

Array = npt.NDArray[Any]


class Stream:
    """One stream: how far it is, and what every layer remembers.

    Attributes:
        position: tokens of the piece heard so far; offset: tokens since the current segment began.
        recent: (1, recall) int64, the newest tokens, for a model that labels its keys with them.
        memories: keys and values of each layer, (1, kv_heads, n, head_dim): n is the capacity, or, in a portable
            export, the number of tokens held.
    """

    def __init__(self, about: About) -> None:
        self.about = about
        self.position = self.offset = 0
        self.recent = np.zeros((1, about.recall), np.int64)
        self.memories = [(self._empty(layer), self._empty(layer)) for layer in range(about.layers)]

    def _empty(self, layer: int) -> Array:
        about = self.about
        slots = 0 if about.portable else about.capacity(layer)
        return np.zeros((1, about.kv_heads[layer], slots, about.head_dim), DTYPES[about.memory])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(k.nbytes + v.nbytes for k, v in self.memories)

    def held(self, layer: int) -> int:
        """Tokens that a layer's memory holds."""
        return self.about.held(layer, self.position, self.offset)

    def room(self) -> int:
        """How many tokens may be heard at once: no more than are left of the segment, and few enough that what a
        runtime makes of each pair of a token and a slot stays small."""
        return min(self.about.segment_length - self.offset, MOST_AT_ONCE)

    def advance(self, tokens: npt.NDArray[np.int64]) -> None:
        """`tokens` (T,) have been heard, and lie in the memories; T is at most `room()`."""
        self.recent = np.concatenate([self.recent, tokens[None]], 1)[:, len(tokens) :]
        self.position += len(tokens)
        self.offset = (self.offset + len(tokens)) % self.about.segment_length
        if self.about.portable:
            self.crop()
        elif self.offset == 0:
            self._compact()

    def _compact(self) -> None:
        """A segment has ended: of each memory the newest `horizon` tokens move to the front."""
        about = self.about
        for layer, memory in enumerate(self.memories):
            there, kept = min(self.position, about.capacity(layer)), self.held(layer)
            if 0 < kept < there:
                for array in memory:
                    array[:, :, :kept] = array[:, :, there - kept : there]

    def crop(self) -> None:
        """What nobody will see again is left behind."""
        for layer, (k, v) in enumerate(self.memories):
            kept = self.about.horizons[layer] if self.about.visibility == "sliding" else self.held(layer)
            if k.shape[2] > kept:
                first = k.shape[2] - kept
                self.memories[layer] = (k[:, :, first:].copy(), v[:, :, first:].copy())

    def copy(self) -> Stream:
        """An independent copy."""
        other = Stream(self.about)
        other.position, other.offset, other.recent = self.position, self.offset, self.recent.copy()
        other.memories = [(k.copy(), v.copy()) for k, v in self.memories]
        return other


class ExportedState:
    """Streams side by side, as a `dsmr.generation.player.Player` holds them."""

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams

    @property
    def batch(self) -> int:
        return len(self.streams)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(stream.nbytes for stream in self.streams)

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """(B,), tokens of each stream's piece so far."""
        return np.array([stream.position for stream in self.streams], np.int64)

    def tensors(self) -> tuple[dict[str, Array], dict[str, str]]:
        """What a saved stream holds of it, as `DSMRState.tensors` writes it: the newest tokens of each layer in a ring,
        the token that is number t of its piece in slot t % capacity; and the numbers beside them."""
        about = self.streams[0].about
        arrays: dict[str, Array] = {}
        for layer in range(about.layers):
            rings = [_rings(stream, layer) for stream in self.streams]
            for name, part in (("k", 0), ("v", 1)):
                arrays[f"{layer}.{name}"] = np.concatenate([ring[part] for ring in rings])
            arrays[f"{layer}.length"] = np.array([_in_ring(stream, layer) for stream in self.streams], np.int32)
            arrays[f"{layer}.position"] = self.position
        arrays["recent"] = np.concatenate([stream.recent for stream in self.streams])
        offset = self.streams[0].offset
        return arrays, {"offset": str(offset), "aligned": "0", "layers": str(about.layers)}

    @classmethod
    def of_tensors(cls, about: About, arrays: Mapping[str, Array], numbers: Mapping[str, str]) -> ExportedState:
        """The inverse of `tensors`; `ValueError` or `LookupError` for what is not a state of such a model."""
        offset, positions = int(numbers["offset"]), arrays["0.position"]
        if numbers["aligned"] != "0" or int(numbers["layers"]) != about.layers:
            raise ValueError("its memories are not those of this model")
        if not 0 <= offset < about.segment_length or positions.ndim != 1 or not len(positions) or positions.min() < 0:
            raise ValueError("it is at no place that a stream can be at")
        if arrays["recent"].shape != (len(positions), about.recall) or arrays["recent"].dtype != np.int64:
            raise ValueError("its recent tokens do not fit the model")
        if about.recall and not 0 <= int(arrays["recent"].min()) <= int(arrays["recent"].max()) < about.vocab_size:
            raise ValueError("its recent tokens are not of the model")
        streams = []
        for row, position in enumerate(positions.tolist()):
            stream = Stream(about)
            stream.position, stream.offset, stream.recent = position, offset, arrays["recent"][row : row + 1].copy()
            for layer in range(about.layers):
                _unroll(stream, layer, *(_ring_of(about, arrays, layer, name, row) for name in ("k", "v")))
            if about.portable:
                stream.crop()
            streams.append(stream)
        return cls(streams)


def ring_capacity(about: About, layer: int) -> int:
    """Slots of a layer's ring in a saved stream, as the model's own memories have them."""
    return about.horizons[layer] + (1 if about.visibility == "sliding" else about.segment_length)


def _in_ring(stream: Stream, layer: int) -> int:
    """Tokens of a layer's memory that go into its ring: all that will ever be seen again."""
    held = stream.memories[layer][0].shape[2] if stream.about.portable else stream.held(layer)
    return min(held, ring_capacity(stream.about, layer))


def _rings(stream: Stream, layer: int) -> list[Array]:
    """Keys and values in ring order, (1, kv_heads, capacity, head_dim)."""
    most, count = ring_capacity(stream.about, layer), _in_ring(stream, layer)
    out = []
    for array in stream.memories[layer]:
        held = array.shape[2] if stream.about.portable else stream.held(layer)
        ring = np.zeros((*array.shape[:2], most, array.shape[3]), array.dtype)
        slots = np.arange(stream.position - count, stream.position) % most
        ring[:, :, slots] = array[:, :, held - count : held]
        out.append(ring)
    return out


def _ring_of(about: About, arrays: Mapping[str, Array], layer: int, name: str, row: int) -> Array:
    array = arrays[f"{layer}.{name}"]
    expected = (about.kv_heads[layer], ring_capacity(about, layer), about.head_dim)
    if array.shape[1:] != expected or array.dtype != DTYPES[about.memory]:
        found = f"{array.dtype} {array.shape[1:]}"
        raise ValueError(f"its layer {layer} holds {found}, this export remembers in {about.memory} {expected}")
    return array[row : row + 1]


def _unroll(stream: Stream, layer: int, k: Array, v: Array) -> None:
    """Put what a ring holds into a memory, in order."""
    about, most = stream.about, ring_capacity(stream.about, layer)
    held = stream.held(layer)
    count = min(held, most)  # sliding: of the segment in progress no more than is ever seen again
    slots = np.arange(stream.position - count, stream.position) % most
    if about.portable:
        stream.memories[layer] = (k[:, :, slots], v[:, :, slots])
        return
    for array, ring in zip(stream.memories[layer], (k, v), strict=True):
        array[:, :, held - count : held] = ring[:, :, slots]
