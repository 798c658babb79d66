"""An exported model, opened: its files checked, its graph in ONNX Runtime, tried out before it plays."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.exported.about import GRAPH, MANIFEST, TOKENIZER, About
from dsmr.exported.reading import Reader, reader_of
from dsmr.exported.state import ExportedState, Stream
from dsmr.exported.trial import try_out
from dsmr.music.vocabulary import Vocabulary


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
        path = Path(folder) / GRAPH
        session = open_session(path, about, threads)
        try:
            try_out(session, about)
        except UserError as error:
            raise UserError(f"{path} {error}; {_versions(about)}") from error
        except Exception as error:  # whatever a runtime raises that does not know an operator as we do
            raise UserError(f"{path} does not run here: {_first_line(error)}; {_versions(about)}") from error
        return cls(about, vocabulary, session)

    @property
    def vocab_size(self) -> int:
        return self.about.vocab_size

    def new_state(self, batch: int = 1) -> ExportedState:
        """The state of `batch` streams that have heard nothing."""
        return ExportedState([Stream(self.about) for _ in range(batch)])

    def reader(self, stream: Stream) -> Reader:
        """What shows `stream` its next tokens; it holds on to the stream's arrays."""
        return reader_of(self.session, stream)


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
        session = onnxruntime.InferenceSession(
            os.fspath(path),
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # else it prints what went wrong and tries the same once more
        )
    except Exception as error:  # its own kinds of error, which share no base but Exception
        raise UserError(f"{path} cannot be opened: {_first_line(error)}; {_versions(about)}") from error
    found = {one.name: (one.type, list(one.shape)) for one in session.get_inputs()}
    for layer in range(about.layers):
        kind = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}[about.memory]
        slots = about.capacity(layer)
        shape = [1, about.kv_heads[layer], slots, about.head_dim]
        of_graph, graph_shape = found.get(f"k.{layer}", ("nothing", []))
        if about.portable:  # which grows
            shape, graph_shape = shape[:2] + shape[3:], graph_shape[:2] + graph_shape[3:]
        if (of_graph, graph_shape) != (kind, shape):
            raise UserError(
                f"{path} does not fit the {MANIFEST} beside it: its layer {layer} remembers {of_graph} {graph_shape}, "
                f"by the latter {kind} {shape}"
            )
    return session


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _versions(about: About) -> str:
    """What to do where a runtime does not take a graph, as the end of a sentence."""
    made = about.made_with.get("onnxruntime", "another version")
    here = importlib.metadata.version("onnxruntime")
    if made == here:
        then = "" if about.portable else ", if need be with --portable"
        return f"it was tried with this ONNX Runtime, {here}: export it again{then}"
    then = "" if about.portable else ", or export it again with --portable"
    return f"it was tried with ONNX Runtime {made}, this is {here}: install that one{then}"
