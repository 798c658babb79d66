"""`dsmr export`, from a run directory to a folder that plays without PyTorch, held against PyTorch at the end."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, check_apart, check_writable, write_json, write_text
from dsmr.exported.about import FILES, GRAPH, MANIFEST, MEMORIES, TOKENIZER, WEIGHTS, About, is_export, sum_of
from dsmr.exported.model import ExportedModel
from dsmr.exported.reading import read_all
from dsmr.generation.continuation import inputs_of
from dsmr.generation.drawing import NOT_FINITE
from dsmr.generation.engines import load_run
from dsmr.generation.saved_stream import fingerprint
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary

TRIAL, TRIAL_LOGITS = 7, 32  # tokens that a machine tries before it plays, and the logits that they are held against
CHECKED = 6  # tokens one at a time behind a segment's end
LARGEST = 2**31  # bytes of one protocol buffer
UNFINISHED = ".unfinished"  # there from the first file that is written until all are and have been compared
HEAD_STEP = 8  # GroupQueryAttention takes heads of multiples of it


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote: `error` is how far its logits lay from PyTorch's float32, of the largest, over a whole
    segment and beyond; None where ONNX Runtime is not installed to see."""

    folder: Path
    nbytes: int
    weights: str
    memory: str
    portable: bool
    error: float | None


def export_run(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "float32",
    memory_dtype: str = "float32",
    portable: bool = False,
    calibrate: Sequence[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export the model of a run directory to the folder `out`.

    Args:
        weights: of the layers' matrices, "float32" or "int8".
        memory_dtype: of keys and values, "float32", "float16" or "int8".
        portable: use operators of the ONNX standard only; memories are then float32, and grow by concatenation.
        calibrate: MIDI files whose keys and values an int8 memory must have room for.
        overwrite: replace an export that is in `out`.
        say: told what is being done.

    Raises `UserError` in one sentence for what cannot be exported, before anything is written.
    """
    _check_options(weights, memory_dtype, portable, calibrate)
    folder = Path(out)
    if is_export(run_dir):
        raise UserError(f"{run_dir} is an exported model already: name the run that it was made of")
    check_apart([folder / name for name in FILES], inputs_of(run_dir, None, None))
    overwrite = overwrite or (folder / UNFINISHED).is_file()  # what is there, a killed export of ours began
    if is_export(folder) and not overwrite:
        raise UserError(f"{folder} already holds an exported model: give --overwrite to replace it")
    if not (is_export(folder) or (folder / UNFINISHED).is_file()):
        for name in FILES:
            if (folder / name).exists():
                raise UserError(f"{folder / name} is there already, of something else: choose another --out")
    for name in FILES:
        check_writable(folder / name)
    build = _builder()
    model, vocabulary = load_run(run_dir, "cpu")
    assert isinstance(model, DSMRModel)
    check_model(model, portable)
    scales = None
    if memory_dtype == "int8":
        from dsmr.export.calibrate import scales_of

        say("measuring keys and values")
        scales = scales_of(model, vocabulary, calibrate)
    say("building the graph")
    made = build.build(model, build.Precision(weights, memory_dtype, portable), scales, str(model.config.schedule))
    if (size := made.ByteSize()) >= LARGEST:
        raise UserError(f"the graph takes {size / 2**30:.1f} GiB, and one file holds less than 2: use --weights int8")
    about = about_of(model, vocabulary, weights, memory_dtype, portable)
    say("writing")
    write_text(folder / UNFINISHED, "An export was begun here.\n")
    (folder / MANIFEST).unlink(missing_ok=True)  # written last: without it there is no export
    with atomic_path(folder / GRAPH) as temporary:
        temporary.write_bytes(made.SerializeToString(deterministic=True))
    with atomic_path(folder / TOKENIZER) as temporary:
        shutil.copyfile(Path(run_dir) / TOKENIZER, temporary)
    beside = {"model": model.config.to_dict(), "sampling": {"temperature": 1.0, "top_p": 0.98}}
    write_json(folder / MANIFEST, about.to_json(sum_of(folder / GRAPH), **beside), sealed=True)
    say("comparing with PyTorch")
    error = _compare(folder, model) if _here("onnxruntime") else None
    (folder / UNFINISHED).unlink(missing_ok=True)
    return Exported(
        folder,
        (folder / GRAPH).stat().st_size,
        weights,
        memory_dtype,
        portable,
        error,
    )


def _check_options(weights: str, memory_dtype: str, portable: bool, calibrate: Sequence[Any]) -> None:
    for name, value, known in (("weights", weights, WEIGHTS), ("memory dtype", memory_dtype, MEMORIES)):
        if value not in known:
            raise UserError(f"unknown {name} '{value}' of an export: use one of {', '.join(known)}")
    if portable and memory_dtype != "float32":
        raise UserError(f"--portable remembers in float32: the standard has no attention over {memory_dtype}")
    if calibrate and memory_dtype != "int8":
        raise UserError("--calibrate measures for an int8 memory: give it with --memory-dtype int8")


def check_model(model: DSMRModel, portable: bool) -> None:
    """`UserError` for a model that an export cannot play right."""
    if not model.config.schedule.newest:
        raise UserError(
            "an export remembers the newest tokens of each layer, and this model's schedule keeps others (retention): "
            "play it with PyTorch"
        )
    if not portable and model.config.head_dim % HEAD_STEP:
        raise UserError(
            f"ONNX Runtime's attention takes heads of a multiple of {HEAD_STEP} channels, and this model's head_dim is "
            f"{model.config.head_dim}: export it with --portable"
        )


def about_of(model: DSMRModel, vocabulary: Vocabulary, weights: str, memory: str, portable: bool) -> About:
    """What is to be known of an export of `model`."""
    config = model.config
    return About(
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        segment_length=config.segment_length,
        visibility=config.visibility,
        recall=config.recall,
        horizons=config.schedule.horizons,
        kv_heads=config.schedule.heads(config.n_heads),
        weights=weights,
        memory=memory,
        portable=portable,
        fingerprint=fingerprint(model),
        tokenizer_hash=vocabulary.hash,
        made_with={name: version for name in ("torch", "onnx", "onnxruntime") if (version := _here(name))},
        trial=_trial(model),
    )


@torch.no_grad()
def _trial(model: DSMRModel) -> tuple[tuple[int, ...], tuple[float, ...]]:
    tokens = _tokens(model, TRIAL)
    logits = model(torch.from_numpy(tokens)[None]).logits[0, -1, :TRIAL_LOGITS]
    if not bool(logits.isfinite().all()):
        raise UserError(NOT_FINITE)
    return tuple(tokens.tolist()), tuple(float(f"{x:.7g}") for x in logits.tolist())


def _tokens(model: DSMRModel, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, count)


@torch.no_grad()
def _compare(folder: Path, model: DSMRModel) -> float:
    """The largest difference between the export's logits and the model's, of the largest logit: behind chunks, where a
    segment ends, and one token at a time from there. Opening the export tries it out, too."""
    exported = ExportedModel.load(folder)
    tokens = _tokens(model, model.config.segment_length + CHECKED)
    (stream,) = exported.new_state().streams
    reader = exported.reader(stream)
    first = len(tokens) - CHECKED
    made = [read_all(reader, stream, tokens[:first]).copy()]
    made += [reader(tokens[i : i + 1]).copy() for i in range(first, len(tokens))]
    whole = model(torch.from_numpy(tokens)[None]).logits[0, first - 1 :].float().numpy()
    return float(np.abs(np.array(made) - whole).max() / np.abs(whole).max())


def _builder() -> Any:
    """`dsmr.export.build`, which needs onnx."""
    try:
        from dsmr.export import build
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise UserError("exporting needs onnx, which is not installed: pip install 'dsmr[onnx]'") from error
    return build


def _here(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
