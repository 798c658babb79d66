"""The processes of one training: each reads its own rows of every batch, with memories of its own (`torchrun`).

How far every row is, is the same in all of them, and so are the weights: DistributedDataParallel, of which
`dsmr.training.sharding` is the other way. Rank r of N reads rows r*B/N to (r+1)*B/N of the B rows that one process
would read, in the same order. A process alone is a world of one, and communicates nothing.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dsmr.console.errors import UserError
from dsmr.console.ranks import Ranks, sum_of_bits
from dsmr.corpus.streams import Batch
from dsmr.model.attention import ROW
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel, DSMROutput
from dsmr.runs.checkpoint import restore_rng, rng_state


class TrainingRanks(Ranks):
    """The ranks of one training, which goes on as one process would; each holds the whole model.

    Everything here must be called by all ranks, in the same order.
    """

    hold_weights = True
    """Whether a layer's weights may stay when it has computed."""

    def rows(self, batch: int) -> range:
        """The rows of a batch of `batch` rows that this rank reads."""
        each = batch // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    # The model ------------------------------------------------------------------------------------------------------

    def placed(self, model: DSMRModel, device: torch.device) -> DSMRModel:
        """The model, or what this rank holds of it, on `device`."""
        return model.to(device)

    def over(self, model: DSMRModel) -> Callable[..., DSMROutput]:
        """What a training step calls: the model, whose backward gives every rank the mean of all ranks' gradients."""
        if self.alone:
            return model
        on_gpu = [torch.device(self.device)] if self.device != "cpu" else None
        return DistributedDataParallel(model, device_ids=on_gpu, gradient_as_bucket_view=True)

    def loss(self, output: DSMROutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's share of the mean over all rows' targets, and what to go back from: the ranks' mean of it is the
        gradient of the whole. `output.loss` is the mean where there is one rank, else each token's ("none")."""
        assert output.loss is not None
        if self.alone:
            return output.loss, output.loss
        share = output.loss.sum() / max(batch.predicted, 1)
        return share.detach(), share * self.world

    @property
    def reduction(self) -> str:
        """The `reduction` that `loss` wants of the model."""
        return "mean" if self.alone else "none"

    def new_state(self, model: DSMRModel, batch: int, **options: Any) -> DSMRState:
        """The state of this rank's rows; random samples are those that the rows have in one process."""
        rows = self.rows(batch)
        state = model.new_state(len(rows), **options)
        for memory in state.memories:
            if memory.seeds is not None and rows[0]:
                memory.seeds += rows[0] * ROW
        return state

    def gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The `DSMRState.state_dict` of all rows, on the first rank; the other ranks get their own back."""
        return dict(state) if self.alone else _each_tensor(state, self._gather)

    def own(self, state: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """This rank's rows of a `DSMRState.state_dict` of all of the `batch` rows."""
        if self.alone:
            return dict(state)
        rows = self.rows(batch)

        def part(tensor: Tensor) -> Tensor:
            if tensor.shape[0] != batch:
                raise ValueError(f"the saved state has {tensor.shape[0]} rows, but the batch has {batch}")
            return tensor[rows.start : rows.stop]

        return _each_tensor(state, part)

    def _gather(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().to("cpu").contiguous()
        if not own.numel():
            return own.new_empty((self.world * own.shape[0], *own.shape[1:]))
        flat = own.flatten().view(torch.uint8)
        if not self.first:
            dist.gather(flat)
            return own
        whole = flat.new_empty(self.world * flat.numel())
        dist.gather(flat, list(whole.split(flat.numel())))
        return whole.view(own.dtype).view(-1, *own.shape[1:])

    # What is kept -----------------------------------------------------------------------------------------------------

    def weights(self, model: DSMRModel) -> dict[str, Any]:
        """The whole model's `state_dict`, as one process has it, on the first rank at least."""
        return model.state_dict()

    def moments(self, model: DSMRModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole optimiser's `state_dict`, as one process has it, on the first rank at least."""
        return optimizer.state_dict()

    def restore(self, model: DSMRModel, optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any]) -> None:
        """Take over what `weights` and `moments` gave, on however many ranks, whatever they held."""
        model.load_state_dict(checkpoint["model"])
        moments = checkpoint["optimizer"]  # which the optimiser takes as they are, so not those that lie in the file
        optimizer.load_state_dict(moments if self.alone else copy.deepcopy(moments))

    def to_measure(self, model: DSMRModel) -> DSMRModel:
        """The model as each rank calls it by itself, on pieces of its own."""
        return model

    def check_weights(self, model: DSMRModel) -> None:
        """`UserError` if a rank holds other weights than the first: a device that reckons wrong, or a fault of ours."""
        if self.alone:
            return
        found = self.everybody(sum_of_bits(model.parameters()))
        if others := [rank for rank, value in enumerate(found) if value != found[0]]:
            raise UserError(f"rank {others[0]} holds other weights than rank 0: nothing is saved of this step")

    # Random generators ----------------------------------------------------------------------------------------------

    def seed(self, seed: int, step: int = 0) -> None:
        """Let the ranks but the first draw numbers of their own, such as dropout's."""
        if not self.first:
            torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0] >> 1))

    def rng_states(self) -> dict[str, Any]:
        """What a checkpoint keeps of all ranks' random generators: "rng" of the first, "rngs" of all."""
        if self.alone:
            return {"rng": rng_state()}
        states = self.everybody(rng_state())
        return {"rng": states[0], "rngs": states}

    def restore_rng(self, checkpoint: Mapping[str, Any], seed: int, step: int) -> None:
        """Go on with the saved random numbers where as many ranks saved them; else the first one does."""
        states = checkpoint.get("rngs", [checkpoint["rng"]])
        same = len(states) == self.world
        restore_rng(states[self.rank] if same else checkpoint["rng"])
        if not same:
            self.seed(seed, step)


def _each_tensor(value: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """The same lists and dictionaries with `how` of each tensor."""
    if isinstance(value, Tensor):
        return how(value)
    if isinstance(value, Mapping):
        return {name: _each_tensor(item, how) for name, item in value.items()}
    return [_each_tensor(item, how) for item in value] if isinstance(value, list) else value
