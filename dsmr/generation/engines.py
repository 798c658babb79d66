"""What turns a stream's tokens into its next one: a model in PyTorch, or one that was exported, in ONNX Runtime.

A `Player` asks an `Engine` and knows neither. PyTorch is imported when a model of it is played, and not before: an
exported one plays where PyTorch is not installed.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.exported.about import is_export
from dsmr.exported.model import ExportedModel
from dsmr.exported.reading import Reader, read_all
from dsmr.exported.state import ExportedState
from dsmr.generation.drawing import Allowed, Sampling, Tokens, Uniform, draw
from dsmr.music.vocabulary import Vocabulary

if TYPE_CHECKING:
    from dsmr.model.state import DSMRState
    from dsmr.model.transformer import DSMRModel

    Model = DSMRModel | ExportedModel
    State = DSMRState | ExportedState

ENGINES = ("auto", "torch", "onnx")
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # more serve no model, and some thousands end the process
RUN_FILES = ("config.json", "model.safetensors", "tokenizer.json")


class Engine(Protocol):
    """Plays the streams of one state, which it updates in place; `dtype` is the precision of its weights."""

    dtype: str

    def first(self, prompts: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        """Show the prompts (B, T), draw what follows them (B,).

        Args:
            allowed: (B, vocab_size), what may be drawn; None = everything.
            noise: (B,), uniform numbers that decide the draw.

        Raises:
            UserError: if the model's logits are not finite.
        """

    def next(self, tokens: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        """Show `tokens` (B,), draw the next (B,); the rest as of `first`."""

    def playing(self) -> contextlib.AbstractContextManager[object]:
        """What has to hold while it plays."""


class ExportedEngine:
    """An exported model: each stream for itself, drawn on the host."""

    def __init__(self, model: ExportedModel, state: ExportedState) -> None:
        self.model, self.state, self.dtype = model, state, model.about.weights
        self._readers: dict[int, Reader] = {}

    def _reader(self, row: int) -> Reader:
        if row not in self._readers:
            self._readers[row] = self.model.reader(self.state.streams[row])
        return self._readers[row]

    def first(self, prompts: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        streams = self.state.streams
        fresh = all(stream.position == 0 for stream in streams)
        logits: list[npt.NDArray[np.float32]] = []
        for row, prompt in enumerate(prompts):
            if row and fresh and np.array_equal(prompt, prompts[0]):  # variations: what is common is read once
                streams[row] = streams[0].copy()
                logits.append(logits[0])
            else:
                logits.append(read_all(self._reader(row), streams[row], prompt).copy())
        return draw(np.stack(logits), sampling, allowed, noise)

    def next(self, tokens: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        logits = [self._reader(row)(tokens[row : row + 1]) for row in range(len(tokens))]
        return draw(np.stack(logits), sampling, allowed, noise)

    def playing(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


def engine_of(model: Model, state: Any, dtype: str) -> Engine:
    """What plays `model` from `state`; `dtype` is that of the weights, as of `Player.begin`."""
    if isinstance(model, ExportedModel):
        return ExportedEngine(model, state)
    from dsmr.generation.stepping.engine import TorchEngine

    return TorchEngine(model, state, dtype)


def vocab_size(model: Model) -> int:
    """The number of a model's token ids."""
    return model.vocab_size if isinstance(model, ExportedModel) else model.config.vocab_size


def new_state(model: Model, batch: int, memory_dtype: str) -> Any:
    """The state of `batch` streams that have heard nothing; `memory_dtype` as of `Player.begin`."""
    if isinstance(model, ExportedModel):
        check_memory_dtype(memory_dtype, model)
        return model.new_state(batch)
    import torch

    from dsmr.console.devices import resolve_memory_dtype

    remembering = None if memory_dtype == "auto" else resolve_memory_dtype(memory_dtype, torch.float32)
    return model.new_state(batch, dtype=remembering)


def check_memory_dtype(name: str, model: Model) -> None:
    """`UserError` for a memory dtype that there is not, or that an exported model was not made with."""
    if not isinstance(model, ExportedModel):
        import torch

        from dsmr.console.devices import resolve_memory_dtype

        resolve_memory_dtype(name, torch.float32)
    elif name not in ("auto", model.about.memory):
        raise UserError(
            f"this export remembers in {model.about.memory}, not in '{name}', which is chosen by dsmr export "
            "--memory-dtype"
        )


def resolve_precision(name: str | None, model: Model, default: str = "float32") -> str:
    """The precision of the weights called `name`, None = `default`; "auto" resolved for `model`. `UserError` for one
    that is not there, or that an exported model was not made with."""
    if isinstance(model, ExportedModel):
        if name not in (None, "auto", model.about.weights):
            raise UserError(
                f"this export has its weights in {model.about.weights}, not in '{name}', which is chosen by dsmr "
                "export --weights"
            )
        return model.about.weights
    from dsmr.generation.stepping.weights import resolve_precision as resolve

    return resolve(name or default, model)


def load_run(
    run_dir: str | os.PathLike[str], device: str = "auto", *, engine: str = "auto", threads: int | None = None
) -> tuple[Model, Vocabulary]:
    """The model (in evaluation mode) and the vocabulary of a run directory, or of a folder of `dsmr export`.

    Args:
        engine: what plays it: "torch" a run, "onnx" an export; "auto" whichever the folder holds.
        threads: of the CPU, at most `MOST_THREADS`; None = those that PyTorch is set to, one for an export.

    Raises `UserError` for a folder that is neither, or whose files do not fit, and where the engine is not installed.
    """
    folder = Path(run_dir)
    if engine not in ENGINES:
        raise UserError(f"unknown engine '{engine}': use one of {', '.join(ENGINES)}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(f"threads must be 1 to {MOST_THREADS} on this machine, got {threads:,}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run directory: there is no such folder")
    if is_export(folder):
        if engine == "torch":
            raise UserError(f"{folder} holds an exported model, which ONNX Runtime plays: leave out --engine torch")
        if device not in ("auto", "cpu"):
            raise UserError(f"an exported model plays on the CPU, not on '{device}'")
        exported = ExportedModel.load(folder, threads or 1)
        return exported, exported.vocabulary
    if engine == "onnx":
        raise UserError(f"{folder} holds no exported model: make one with dsmr export RUN --out FOLDER")
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a run directory: it has no {' and no '.join(missing)}")
    return load_torch(folder, device, threads)


def load_torch(folder: Path, device: str, threads: int | None) -> tuple[DSMRModel, Vocabulary]:
    """`load_run` for a run directory."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{folder} is played by PyTorch, which is not installed: install it, or play what dsmr export makes of it"
        ) from error
    from dsmr.console.devices import resolve_device
    from dsmr.model.transformer import DSMRModel

    if threads is not None:
        torch.set_num_threads(threads)
    vocabulary = Vocabulary.load(folder / "tokenizer.json")
    model = DSMRModel.from_pretrained(folder)
    if model.config.vocab_size != vocabulary.size:
        raise UserError(
            f"the model in {folder} has {model.config.vocab_size} tokens but its tokenizer.json {vocabulary.size}: "
            "they belong to different runs"
        )
    return model.to(resolve_device(device)).eval(), vocabulary
