"""A model of which every rank holds a part of each layer: PyTorch's FSDP2, and the way there and back.

Weights, their gradients and AdamW's moments are cut along their first dimension, one part for each rank; a layer is
whole only while it computes. What is kept on disk is whole, and as one process keeps it, so that any number of ranks
goes on with it, however they train (`torch.distributed.checkpoint.state_dict` puts it together).
"""

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dsmr.model.transformer import DSMRModel, DSMROutput
from dsmr.training.ranks import TrainingRanks

_WHOLE = StateDictOptions(full_state_dict=True)
_KEPT = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""On the first rank's host alone, a tensor after another."""


class ShardedRanks(TrainingRanks):
    """Several ranks, each of which holds a part of every weight."""

    hold_weights = False

    def placed(self, model: DSMRModel, device: torch.device) -> DSMRModel:
        """The same model, cut up in place: its layers, and what is around them (embedding, last norm, head) together.

        Each layer goes to `device` by itself, so that the whole never lies there.
        """
        # A layer gives its keys and values as views, which are read only: the memory copies them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(device.type, (self.world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def over(self, model: DSMRModel) -> Callable[..., DSMROutput]:
        return model

    def check_weights(self, model: DSMRModel) -> None:
        """Nothing: each rank holds another part, so that there is nothing to compare."""

    def to_measure(self, model: DSMRModel) -> DSMRModel:
        """The same weights as a plain model on every rank, because the ranks do not measure in step."""
        with torch.device("meta"):
            copy = DSMRModel(model.config)
        copy.load_state_dict(get_model_state_dict(model, options=_WHOLE), assign=True)
        if model.config.tie_embeddings:
            copy.head.weight = copy.embedding.weight
        return copy

    def weights(self, model: DSMRModel) -> dict[str, Any]:
        kept = get_model_state_dict(model, options=_KEPT)
        if model.config.tie_embeddings and kept:  # one tensor, as one process writes it
            kept["head.weight"] = kept["embedding.weight"]
        return kept

    def moments(self, model: DSMRModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if not optimizer.state:  # nothing was trained yet, and PyTorch would make moments
            return optimizer.state_dict()
        named: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=_KEPT))
        groups: list[dict[str, Any]] = []
        numbers: dict[str, int] = {}
        for group in named.get("param_groups", []):
            own = range(len(numbers), len(numbers) + len(group["params"]))
            numbers |= dict(zip(group["params"], own, strict=True))
            groups.append({**group, "params": list(own)})
        state = {numbers[name]: held for name, held in named.get("state", {}).items()}
        return {"state": state, "param_groups": groups}

    def restore(self, model: DSMRModel, optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any]) -> None:
        held = model.state_dict()
        weights = {name: self._part(whole, held.get(name)) for name, whole in checkpoint["model"].items()}
        model.load_state_dict(weights)
        groups = checkpoint["optimizer"]["param_groups"]
        numbers = itertools.chain.from_iterable(group["params"] for group in groups)
        ours = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
        of = dict(zip(numbers, ours, strict=True))
        state = {
            number: {name: self._part(whole, of[number]) for name, whole in moments.items()}
            for number, moments in checkpoint["optimizer"]["state"].items()
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _part(self, whole: Any, like: Any) -> Any:
        """This rank's part of a tensor, cut as the weight `like` is; what is not cut, such as a count, as it is."""
        if not isinstance(like, DTensor) or not whole.dim():
            return whole
        if whole.shape != like.shape:
            raise ValueError(f"a saved tensor has shape {tuple(whole.shape)}, its weight {tuple(like.shape)}")
        parts = whole.chunk(self.world)
        own = parts[self.rank] if self.rank < len(parts) else whole[:0]
        local = own.to(like.device, copy=True)
        return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
