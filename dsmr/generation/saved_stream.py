"""A player in one file: playing on after loading gives exactly the tokens that it would have given.

The file (safetensors) holds the recurrent state, every stream's tokens so far, what was drawn and not yet played, and
the random generators; beside them, as text, which model and tokeniser it belongs to and how it was playing. "Exactly"
holds for the same machine, PyTorch, number of threads and weight precision: sums are rounded in their order.
"""

import dataclasses
import hashlib
import json
import os
from array import array
from typing import Any

import torch

from dsmr.console.errors import UserError
from dsmr.console.files import save_tensors
from dsmr.console.schema import Natural, check, check_fields
from dsmr.generation.player import Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.stepping.weights import resolve_precision
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary

FORMAT = "dsmr stream 1"
NO_TOKENISER = "none"


def fingerprint(model: "DSMRModel") -> str:
    """Sha256 of a model's configuration and weights."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_player(path: str | os.PathLike[str], player: Player) -> None:
    """Write `player` as it stands between two tokens, whole or not at all.

    Raises `UserError` if one of several streams has ended before the others, for then they are not in step any more,
    or if it has not played yet.
    """
    if len(player.tokens) > 1 and any(player.ended):
        raise UserError("one variation has ended before the others: save what is stopped by a number of tokens")
    if player.unseen is None and player.drawn is None:
        raise UserError("nothing has been played yet, so there is no state to save")
    tensors, numbers = player.state.tensors()
    for row, (heard, generator) in enumerate(zip(player.tokens, player.generators, strict=True)):
        tensors[f"tokens.{row}"] = torch.tensor(heard, dtype=torch.int32)
        tensors[f"generator.{row}"] = generator.get_state()
    for name, waiting in (("unseen", player.unseen), ("drawn", player.drawn)):
        if waiting is not None:
            tensors[name] = waiting.clone()
    about = {
        "format": FORMAT,
        "model": fingerprint(player.model),
        "tokenizer": NO_TOKENISER if player.vocabulary is None else player.vocabulary.hash,
        "dtype": resolve_precision(player.dtype, player.model),
        "sampling": json.dumps(dataclasses.asdict(player.sampling)),
        "on_one_instant": json.dumps(player.on_one_instant),
    }
    save_tensors(path, tensors, {**numbers, **about})


def load_player(
    path: str | os.PathLike[str],
    model: "DSMRModel",
    vocabulary: "Vocabulary | None" = None,
    *,
    sampling: Sampling | None = None,
    dtype: str | None = None,
    streams: int | None = None,
) -> Player:
    """The player that `save_player` wrote. `sampling` and `dtype` replace those that it played with.

    Raises `UserError` in one sentence for a file that is not one, or of another model, tokeniser or number of
    `streams`.
    """
    state = DSMRState.load(path, device=model.embedding.weight.device)
    about, tensors = _contents(path)
    if about.get("format") != FORMAT:
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
        heard = [array("i", tensors[f"tokens.{row}"].tolist()) for row in range(state.batch)]
        generators = [torch.Generator().set_state(tensors[f"generator.{row}"]) for row in range(state.batch)]
        player = Player(
            model,
            state,
            heard,
            sampling or saved,
            vocabulary,
            generators=generators,
            dtype=dtype or about["dtype"],
        )
        player.on_one_instant = check(json.loads(about["on_one_instant"]), [Natural], path)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a saved stream: {error}") from error
    size = model.config.vocab_size
    if any(not 0 <= token < size for row in heard for token in row):
        raise UserError(f"{path} is damaged: it holds tokens outside [0, {size})")
    player.unseen, player.drawn = tensors.get("unseen"), tensors.get("drawn")
    return player


def _contents(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts and the tensors of a file that `DSMRState.load` could read, leaving out the memories."""
    from safetensors import safe_open

    with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
        names = [name for name in file.keys() if not name[0].isdigit()]  # noqa: SIM118 (not a dictionary)
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
