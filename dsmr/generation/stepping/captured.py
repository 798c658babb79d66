"""One token's whole pass, the draw included, as one replay of a CUDA graph.

A replay reads the token, what may come next and the draw's noise from fixed buffers, updates the memories in place and
leaves the next token in another; launching it costs what launching one kernel costs. `DeviceBody` is what is captured,
ordinary code that runs on any device. Written for GPUs and, except for the capture itself, tested on CPUs only.
"""

import logging

import torch
from torch import Tensor

from dsmr.console.devices import has_fast_bfloat16
from dsmr.console.errors import UserError
from dsmr.generation.sampling import NOT_FINITE, Sampling, candidates, pick
from dsmr.generation.stepping.rings import DeviceRings
from dsmr.generation.stepping.step import Step, attentions
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel

WARM_UPS = 3
NOT_A_TOKEN = -1


class DeviceBody:
    """Show a token, draw the next, all in fixed buffers on the device and with no look from the host."""

    def __init__(self, model: "DSMRModel", state: "DSMRState", precision: str) -> None:
        self.state, self.precision = state, precision
        self.rings = DeviceRings(attentions(model), state)
        self.step = Step(model, state, self.rings, precision)
        device, rows = model.embedding.weight.device, state.batch
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.allowed = torch.ones(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        self.noise = torch.zeros(rows, dtype=torch.float32, device=device)
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.sampling = Sampling()

    @torch.no_grad()
    def run(self) -> None:
        """What is captured."""
        logits = self.step(self.tokens)
        finite = ~(torch.isnan(logits) | torch.isposinf(logits)).any(-1)
        token = pick(*candidates(logits, self.sampling, self.allowed), self.noise)
        self.drawn.copy_(torch.where(finite, token, NOT_A_TOKEN))

    def tensors(self) -> list[Tensor]:
        """Everything of the stream that a run changes."""
        kept = [self.state.recent, *self.rings.counters()]
        for memory in self.state.memories:
            kept += memory.tensors().values()
        return kept


class CapturedStep:
    """Replays `DeviceBody`; captures it anew when the sampling changes. Where it cannot be captured, it just runs."""

    def __init__(self, model: "DSMRModel", state: "DSMRState", precision: str) -> None:
        self.body, self.precision = DeviceBody(model, state, precision), precision
        self.state, self.segment = state, model.config.segment_length
        self.graph: torch.cuda.CUDAGraph | None = None
        self._captured: Sampling | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits after `tokens` (B,), as the body computes them; nothing is captured or replayed."""
        self.body.rings.begin()
        self.state.offset = (self.state.offset + 1) % self.segment
        return self.body.step(tokens.to(self.body.tokens.device)).float().cpu()

    def next(self, tokens: Tensor, sampling: Sampling, allowed: Tensor | None, noise: Tensor) -> Tensor:
        """See `dsmr.generation.stepping.Stepper`."""
        body = self.body
        if any(memory.leased for memory in self.state.memories):  # what somebody still needs is left to them, and
            for memory in self.state.memories:  # the graph writes to what takes its place
                memory.unshare()
            self._captured = None
        body.rings.begin()
        if sampling != self._captured:
            body.sampling = self._captured = sampling
            self.graph = self._capture()
        body.tokens.copy_(tokens, non_blocking=True)
        body.noise.copy_(noise, non_blocking=True)
        if allowed is not None:
            body.allowed.copy_(allowed, non_blocking=True)
        else:
            body.allowed.fill_(True)
        if self.graph is not None:
            self.graph.replay()
            for memory in self.state.memories:  # which a replay cannot count
                memory.seen = memory.seen + 1
        else:
            body.run()
        self.state.offset = (self.state.offset + 1) % self.segment
        drawn = body.drawn.cpu()  # the one wait of a step
        if bool((drawn == NOT_A_TOKEN).any()):
            raise UserError(NOT_FINITE)
        return drawn

    def _capture(self) -> "torch.cuda.CUDAGraph | None":
        """A graph of the body; None, with a line in the log, where there can be none. The stream is as before."""
        if self.body.tokens.device.type != "cuda":
            return None
        before = [tensor.clone() for tensor in self.body.tensors()]
        seen = [memory.seen for memory in self.state.memories]
        graph = torch.cuda.CUDAGraph()
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self.body.run()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                self.body.run()
        except RuntimeError as error:
            logging.getLogger("dsmr").warning("the step cannot be captured and runs as it is: %s", error)
            return None
        finally:
            for tensor, value in zip(self.body.tensors(), before, strict=True):
                tensor.copy_(value)
            for memory, count in zip(self.state.memories, seen, strict=True):
                memory.seen = count
        return graph


def captured_step(model: "DSMRModel", state: "DSMRState", precision: str) -> CapturedStep:
    """The step for models on a GPU; `UserError` for a precision that is not to be had there."""
    if precision == "int8":
        raise UserError("dtype 'int8' is for CPUs: on a GPU use float32 or bfloat16")
    if precision == "bfloat16" and not has_fast_bfloat16(model.embedding.weight.device):
        raise UserError("dtype 'bfloat16' is not fast on this GPU: use float32")
    return CapturedStep(model, state, precision)
