"""A training step as a CUDA graph: recorded once and replayed from then on.

A small model's kernels are over sooner than Python can start them, some thousand a step; a replay starts them all at
once. Whatever a replay reads or writes lies where it lay when the step was recorded: the batch and the learning rate
are copied there, memories and their counters are written in place.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dsmr.console.errors import UserError
from dsmr.console.words import one_line
from dsmr.corpus.streams import Batch
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr.runs.settings import TrainConfig
from dsmr.training.update import clip_on_device

EAGER = 3
"""Steps taken as ever before one is recorded: kernels are compiled and tried, and AdamW's moments made, by then."""


class CapturedStep:
    """A step of training `model` over `state`; the first ones are taken as ever, then one is recorded.

    Args:
        longest: of the gradients, see `clip_gradients`.
        autocast: makes the context of the forward.

    Attributes:
        logits: of the last step.
    """

    def __init__(
        self,
        model: DSMRModel,
        state: DSMRState,
        optimizer: torch.optim.Optimizer,
        longest: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model, self.state, self.optimizer = model, state, optimizer
        self.longest, self.autocast = longest, autocast
        self.logits: Tensor | None = None
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._found: Tensor | None = None

    def __call__(self, batch: Batch, rate: float) -> tuple[float, float]:
        """The loss of the batch, in nats a token, and the length of its gradient before it was clipped. The weights
        have been changed by then, also where one of the two is not finite."""
        self._take_in(batch, rate)
        if self._graph is not None:
            self._graph.replay()
            for memory in self.state.memories:  # a replay counts on the device alone
                memory.seen = memory.seen + batch.tokens.shape[1]
        elif self._taken < EAGER:
            self._aside()
        else:
            self._record().replay()
        self._taken += 1
        assert self._found is not None
        loss, norm = self._found.tolist()
        return loss, norm

    def _take_in(self, batch: Batch, rate: float) -> None:
        given = [batch.tokens, batch.targets, batch.piece_start]
        if not self._inputs:
            self._inputs = [x.clone() for x in given]
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(rate, device=batch.tokens.device)
                group["capturable"] = True
        for place, x in zip(self._inputs, given, strict=True):
            place.copy_(x)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate)

    def _step(self) -> None:
        tokens, targets, piece_start = self._inputs
        recent = self.state.recent
        with self.autocast():
            output = self.model(tokens, self.state, targets=targets, piece_start=piece_start)
        loss, self.logits = output.loss, output.logits.detach()
        assert loss is not None
        loss.backward()
        self._found = torch.stack([loss.detach(), clip_on_device(self.model.parameters(), self.longest)])
        self.optimizer.step()
        del output, loss  # what they held of the memories for their backward is let go, so that nothing is copied
        _ = self.state.memories  # takes the step's keys and values in
        recent.copy_(self.state.recent)
        self.state.recent = recent

    def _aside(self) -> None:
        """A step on a stream of its own, as recording wants it of what came before."""
        aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            self.optimizer.zero_grad(set_to_none=True)
            self._step()
        now.wait_stream(aside)

    def _record(self) -> "torch.cuda.CUDAGraph":
        places = [x.data_ptr() for memory in self.state.memories for x in memory.tensors().values()]
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be recorded as a CUDA graph: {one_line(error)}; train without --graph"
            ) from error
        if places != [x.data_ptr() for memory in self.state.memories for x in memory.tensors().values()]:
            raise RuntimeError("a memory was moved while the step was recorded, so that a replay would miss it")
        self._graph = graph
        return graph


def unrecordable(config: TrainConfig, device: torch.device, alone: bool) -> str | None:
    """Why a step cannot be recorded, as the end of a sentence; None where it can. `alone`: no other rank trains too."""
    if device.type != "cuda":
        return f"on {device}, only on a GPU"
    if not alone:
        return "where several ranks train together"
    for name, option in (("compile", "--compile"), ("checkpoint_layers", "--checkpoint-layers")):
        if getattr(config, name):
            return f"with {option}"
    return None


def without_graph(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's `state_dict` as any run can load it, whether its steps are replayed or not."""
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in optimizer["param_groups"]]
    return {**optimizer, "param_groups": groups}
