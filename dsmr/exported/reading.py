"""How one stream's tokens are shown to the graph: memories bound in place, or given back longer than they were.

The graph is the same for a prompt and for a token. Where memories are bound in place, what ONNX Runtime reads as a
layer's keys is where it writes the new ones, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsmr.exported.state import Stream

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Reader(Protocol):
    """Shows one stream's next tokens to the graph."""

    def __call__(self, tokens: Tokens) -> Logits:
        """tokens (T,), at most as many as are left of the segment -> the next one's logits (V,); the stream advances.
        The next call may overwrite them."""


class BoundReader:
    """Memories bound in place: the arrays of the stream are inputs and outputs of the graph."""

    def __init__(self, session: Any, stream: Stream) -> None:
        self.session, self.stream, about = session, stream, stream.about
        self._io = session.io_binding()
        self._token = np.zeros((1, 1), np.int64)
        self._chunk = self._token  # what the binding points to must live
        self._position, self._offset = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._recent = np.zeros((1, about.recall), np.int64)
        self._logits = np.zeros((1, about.vocab_size), np.float32)
        self._bind(self._io.bind_input, "tokens", self._token)
        self._bind(self._io.bind_input, "position", self._position)
        self._bind(self._io.bind_input, "offset", self._offset)
        if about.recall:
            self._bind(self._io.bind_input, "recent", self._recent)
        self._bind(self._io.bind_output, "logits", self._logits)
        for layer, memory in enumerate(stream.memories):
            for name, array in zip(("k", "v"), memory, strict=True):
                self._bind(self._io.bind_input, f"{name}.{layer}", array)
                self._bind(self._io.bind_output, f"{name}.{layer}.new", array)

    @staticmethod
    def _bind(where: Callable[..., None], name: str, array: npt.NDArray[Any]) -> None:
        where(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def __call__(self, tokens: Tokens) -> Logits:
        if len(tokens) == 1:
            self._token[0, 0] = tokens[0]
            if self._chunk is not self._token:
                self._chunk = self._token
                self._bind(self._io.bind_input, "tokens", self._token)
        else:
            self._chunk = np.ascontiguousarray(tokens[None], np.int64)
            self._bind(self._io.bind_input, "tokens", self._chunk)
        stream = self.stream
        self._position[0], self._offset[0] = stream.position, stream.offset
        self._recent[:] = stream.recent
        self.session.run_with_iobinding(self._io)
        stream.advance(self._chunk[0])
        return self._logits[0]


class GrowingReader:
    """Memories that the graph gives back longer than it took them: for portable exports, and any runtime whose `run`
    takes names and arrays."""

    def __init__(self, session: Any, stream: Stream) -> None:
        self.session, self.stream = session, stream
        layers = range(stream.about.layers)
        self._names = ["logits", *(f"{name}.{layer}.new" for layer in layers for name in ("k", "v"))]

    def __call__(self, tokens: Tokens) -> Logits:
        stream = self.stream
        feeds = {"tokens": tokens[None], "position": np.array([stream.position], np.int64)}
        if stream.about.recall:
            feeds["recent"] = stream.recent
        for layer, (k, v) in enumerate(stream.memories):
            feeds |= {f"k.{layer}": k, f"v.{layer}": v}
        logits, *new = self.session.run(self._names, feeds)
        stream.memories = list(zip(new[::2], new[1::2], strict=True))
        stream.advance(tokens)
        return logits[0]


def read_all(reader: Reader, stream: Stream, tokens: Tokens) -> Logits:
    """Show `tokens` (T,), T ≥ 1, in chunks that end where segments do; the next one's logits (V,)."""
    logits, done = None, 0
    while done < len(tokens):
        chunk = tokens[done : done + stream.room()]
        logits = reader(chunk)
        done += len(chunk)
    if logits is None:
        raise ValueError("a prompt needs at least one token (a piece begins with BOS)")
    return logits


def reader_of(session: Any, stream: Stream) -> Reader:
    """What shows `stream` its next tokens; it holds on to the stream's arrays."""
    return GrowingReader(session, stream) if stream.about.portable else BoundReader(session, stream)
