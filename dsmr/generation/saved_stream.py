"""A player in one file: playing on after loading gives exactly the tokens that it would have given.

The file (safetensors) holds the recurrent state, every stream's tokens so far, what was drawn and not yet played, and
the random generators; beside them, as text, which model and tokeniser it belongs to and how it was playing. "Exactly"
holds for the same machine, engine, number of threads and weight precision: sums are rounded in their order. A model in
PyTorch and an export of it read each other's files where both remember in float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.files import save_arrays
from dsmr.console.schema import Natural, check, check_fields
from dsmr.console.seal import check_seal
from dsmr.exported.model import ExportedModel
from dsmr.exported.state import ExportedState
from dsmr.generation.drawing import Noise, Sampling
from dsmr.generation.engines import resolve_precision, vocab_size
from dsmr.generation.player import Player
from dsmr.music.vocabulary import Vocabulary

if TYPE_CHECKING:
    from dsmr.generation.engines import Model
    from dsmr.model.state import DSMRState
    from dsmr.model.transformer import DSMRModel

FORMAT = "dsmr stream 1"
NO_TOKENISER = "none"


def fingerprint(model: Model) -> str:
    """Sha256 of a model's configuration and weights; an exported one has that of the model that it was made of."""
    if isinstance(model, ExportedModel):
        return model.about.fingerprint
    import torch

    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_stream_place(path: str | os.PathLike[str]) -> None:
    """`UserError` if a stream saved at `path` would take the place of a file that is none: to be asked before the work.

    A stream's name says nothing of what it is, so that a slip of the pen would cost a piece of music.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        return
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            about = file.metadata() or {}
    except (OSError, SafetensorError):
        about = {}
    if not about.get("format", "").startswith("dsmr stream"):
        raise UserError(f"{path} is there already and is not a saved stream: choose another file for --save-state")


def save_player(path: str | os.PathLike[str], player: Player) -> None:
    """Write `player` as it stands between two tokens, whole or not at all.

    Raises `UserError` if one of several streams has ended before the others, for then they are not in step any more,
    or if it has not played yet.
    """
    if len(player.tokens) > 1 and any(player.ended):
        raise UserError("one variation has ended before the others: save what is stopped by a number of tokens")
    if player.unseen is None and player.drawn is None:
        raise UserError("nothing has been played yet, so there is no state to save")
    remembered, numbers = player.state.tensors()
    beside: dict[str, Any] = {}
    for row, (heard, generator) in enumerate(zip(player.tokens, player.generators, strict=True)):
        beside[f"tokens.{row}"] = np.array(heard, dtype=np.int32)
        beside[f"generator.{row}"] = generator.get_state()
    for name, waiting in (("unseen", player.unseen), ("drawn", player.drawn)):
        if waiting is not None:
            beside[name] = waiting
    about = {
        "format": FORMAT + _memory_kind(player.model),
        "model": fingerprint(player.model),
        "tokenizer": NO_TOKENISER if player.vocabulary is None else player.vocabulary.hash,
        "dtype": resolve_precision(player.dtype, player.model),
        "sampling": json.dumps(dataclasses.asdict(player.sampling)),
        "on_one_instant": json.dumps(player.on_one_instant),
    }
    save_arrays(path, {**remembered, **beside}, {**numbers, **about})


def load_player(
    path: str | os.PathLike[str],
    model: Model,
    vocabulary: Vocabulary | None = None,
    *,
    sampling: Sampling | None = None,
    dtype: str | None = None,
    streams: int | None = None,
) -> Player:
    """The player that `save_player` wrote. `sampling` and `dtype` replace those that it played with.

    Raises `UserError` in one sentence for a file that is not one, or of another model, tokeniser or number of
    `streams`.
    """
    if dtype is not None:
        dtype = resolve_precision(dtype, model)
    state, about, arrays = _contents(path, model)
    if (found := about.get("format")) != (wanted := FORMAT + _memory_kind(model)):
        if isinstance(found, str) and found.startswith(FORMAT):
            raise UserError(f"{path} remembers as '{found}' and this model as '{wanted}': play it on with its own")
        raise UserError(f"{path} is not a stream saved by this version of dsmr")
    own = {"model": fingerprint(model), "tokenizer": NO_TOKENISER if vocabulary is None else vocabulary.hash}
    for what, name in (("model", "model"), ("tokenizer", "tokeniser")):
        if about.get(what) != own[what]:
            raise UserError(
                f"{path} is the state of another {name} (hash {str(about.get(what))[:16]}; this one has "
                f"{own[what][:16]}): play it on with the run that it was saved from"
            )
    if streams is not None and state.batch != streams:
        raise UserError(f"{path} holds {state.batch} streams, but {streams} were asked for")
    try:
        saved = Sampling(**check_fields(json.loads(about["sampling"]), Sampling, path))
        heard = [arrays[f"tokens.{row}"].tolist() for row in range(state.batch)]
        generators = [Noise.of_state(arrays[f"generator.{row}"]) for row in range(state.batch)]
        player = Player(
            model,
            state,
            heard,
            sampling or saved,
            vocabulary,
            generators=generators,
            dtype=dtype or resolve_precision(about["dtype"], model),
        )
        player.on_one_instant = check(json.loads(about["on_one_instant"]), [Natural], path)
        if len(player.on_one_instant) != state.batch:
            raise ValueError(f"it tells of {len(player.on_one_instant)} streams, and there are {state.batch}")
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a saved stream: {error}") from error
    size = vocab_size(model)
    if any(not 0 <= token < size for row in heard for token in row):
        raise UserError(f"{path} is damaged: it holds tokens outside [0, {size})")
    player.unseen, player.drawn = (_waiting(arrays.get(name), state.batch, size, path) for name in ("unseen", "drawn"))
    return player


def _memory_kind(model: Model) -> str:
    """What the format's name adds where memories do not mean what they mean in PyTorch: scales fixed by the export."""
    fixed = isinstance(model, ExportedModel) and model.about.memory == "int8"
    return ", int8 with an export's scales" if fixed else ""


def _waiting(tokens: Any, streams: int, size: int, path: object) -> np.ndarray | None:
    """Tokens that wait to be shown or played, as the file has them; `UserError` where there can be none such."""
    if tokens is None:
        return None
    if tokens.shape != (streams,) or tokens.dtype != np.int64 or not 0 <= tokens.min() <= tokens.max() < size:
        raise UserError(f"{path} is damaged: its next tokens are not {streams} of {size}")
    return tokens


def _check_fits(state: DSMRState, model: DSMRModel, path: object) -> None:
    """`UserError` unless the state's memories and recent tokens have the shapes of this model's, and it is somewhere
    in one of its segments."""
    found, own = ([tuple(x.shape[1:]) for m in one.memories for x in (m.k, m.v)] for one in (state, model.new_state(1)))
    if found != own or state.recent.shape[1] != model.config.recall:
        raise UserError(f"{path} does not fit this model: its memories have the shapes {found}, this one's {own}")
    if state.aligned:
        raise UserError(
            f"{path} cannot be played on: its memories have no room for a segment in progress, only for whole ones"
        )
    if state.offset >= model.config.segment_length:
        raise UserError(
            f"{path} does not fit this model: it is {state.offset:,} tokens into a segment of "
            f"{model.config.segment_length:,}"
        )


def _contents(path: str | os.PathLike[str], model: Model) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The state for `model` that a file holds, its texts, and its arrays beside the memories."""
    from safetensors import SafetensorError, safe_open

    about_export = model.about if isinstance(model, ExportedModel) else None
    state: Any = None
    if not isinstance(model, ExportedModel):
        from dsmr.model.state import DSMRState as State

        state = State.load(path, device=next(model.parameters()).device)
        _check_fits(state, model, path)
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            names = list(file.keys())
            about = file.metadata() or {}
            if about_export is not None:
                check_seal(path)
                wanted = [name for name in names if name[0].isdigit() or name == "recent"]
                arrays = {name: file.get_tensor(name) for name in wanted}
                state = ExportedState.of_tensors(about_export, arrays, about)
            return state, about, {name: file.get_tensor(name) for name in names if not name[0].isdigit()}
    except UserError:
        raise
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is not a saved state of this model: {error}") from error
