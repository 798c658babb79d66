"""An exported model, opened: it reads a prompt in chunks and then takes a token at a time, with ONNX Runtime.

The graph is the same for both. Where the export is not a portable one, its memories are bound in place: what ONNX
Runtime reads as a layer's keys is where it writes the new ones, and nothing is copied. That this holds is tried out
when a model is opened, on a few tokens of which PyTorch's logits are known.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.exported.about import GRAPH, MANIFEST, TOKENIZER, About
from dsmr.exported.state import ExportedState, Stream
from dsmr.music.vocabulary import Vocabulary

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

# How far logits may lie from PyTorch's, of the largest: rounding, or eight bits of a weight some layers deep.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "int8": 0.25}


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


class ExportedModel:
    """What `dsmr export` wrote, ready to play.

    Attributes:
        about: its shape and precision.
        vocabulary: what its tokens mean.
        session: of ONNX Runtime.
    """

    def __init__(self, about: About, vocabulary: Vocabulary, session: Any) -> None:
        self.about, self.vocabulary, self.session = about, vocabulary, session

    @classmethod
    def load(cls, folder: str | os.PathLike[str], threads: int = 1) -> ExportedModel:
        """Open an exported model's folder; `UserError` in one sentence for what cannot be played.

        Args:
            threads: of ONNX Runtime, which share the larger products.
        """
        about = About.load(folder)
        vocabulary = Vocabulary.load(Path(folder) / TOKENIZER)
        if vocabulary.hash != about.tokenizer_hash or vocabulary.size != about.vocab_size:
            raise UserError(f"{Path(folder) / TOKENIZER} is not the tokeniser that {MANIFEST} beside it was made with")
        model = cls(about, vocabulary, open_session(Path(folder) / GRAPH, about, threads))
        model.try_out(Path(folder) / GRAPH)
        return model

    @property
    def vocab_size(self) -> int:
        return self.about.vocab_size

    def new_state(self, batch: int = 1) -> ExportedState:
        """The state of `batch` streams that have heard nothing."""
        return ExportedState([Stream(self.about) for _ in range(batch)])

    def reader(self, stream: Stream) -> Reader:
        """What shows `stream` its next tokens; it holds on to the stream's arrays."""
        return GrowingReader(self.session, stream) if self.about.portable else BoundReader(self.session, stream)

    def try_out(self, path: Path) -> None:
        """`UserError` where this machine's runtime makes something else of a few tokens than PyTorch did."""
        tokens, expected = np.array(self.about.trial[0], np.int64), np.array(self.about.trial[1], np.float32)
        stream = Stream(self.about)
        reader = self.reader(stream)
        half = max(1, len(tokens) - 2)  # a chunk, then single tokens
        try:
            logits = [read_all(reader, stream, part) for part in (tokens[:half], tokens[half:]) if len(part)][-1]
        except Exception as error:  # whatever a runtime raises that does not know an operator as we do
            raise UserError(f"{path} does not run here: {_first_line(error)}; {_versions(self.about)}") from error
        worst = float(np.abs(logits[: len(expected)] - expected).max())
        allowed = max(TOLERANCE[self.about.weights], TOLERANCE[self.about.memory]) * float(np.abs(expected).max() + 1)
        if not worst <= allowed:
            raise UserError(
                f"{path} gives other numbers here than PyTorch gave when it was exported ({worst:.3g} apart, at most "
                f"{allowed:.3g} is right); {_versions(self.about)}"
            )


def open_session(path: Path, about: About, threads: int) -> Any:
    """The graph in ONNX Runtime, on the CPU, held against what the export says of it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            "playing an exported model needs ONNX Runtime, which is not installed: pip install 'dsmr[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is said in our own sentence
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own kinds of error, which share no base but Exception
        raise UserError(f"{path} cannot be opened: {_first_line(error)}; {_versions(about)}") from error
    found = {one.name: (one.type, list(one.shape)) for one in session.get_inputs()}
    for layer in range(about.layers):
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}[about.memory]
        slots = about.capacity(layer)
        shape = [1, about.kv_heads[layer], slots, about.head_dim]
        of_graph, graph_shape = found.get(f"k.{layer}", ("nothing", [0] * 4))
        if about.portable:
            shape, graph_shape = shape[:2] + shape[3:], graph_shape[:2] + graph_shape[3:]
        if of_graph != kind or graph_shape != shape:
            raise UserError(f"{path} does not fit the {MANIFEST} beside it: layer {layer} remembers {of_graph} {shape}")
    return session


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _versions(about: About) -> str:
    """What to do where a runtime does not take a graph, as the end of a sentence."""
    made = about.made_with.get("onnxruntime", "another version")
    here = importlib.metadata.version("onnxruntime")
    then = "" if about.portable else ", or export it again with --portable"
    return f"it was tried with ONNX Runtime {made}, this is {here}: install that one{then}"
