"""One token at a time, fast: what turns a stream's newest token into the logits of its next.

`stepper` picks the way. `Step` is the fast one: one token's forward pass with prepared weights, over `HostRings` on a
CPU and captured as a graph over `DeviceRings` on a GPU. `PlainStep` calls the model itself, serves every state and
every device, and is what the others are tested against. All update the stream's state in place.
"""

from typing import Protocol

import torch
from torch import Tensor

from dsmr.console.errors import UserError
from dsmr.generation.sampling import Sampling, draw
from dsmr.generation.stepping.captured import captured_step
from dsmr.generation.stepping.rings import HostRings, in_step
from dsmr.generation.stepping.step import Step, altered, attentions
from dsmr.generation.stepping.weights import resolve_precision
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel

__all__ = ["PlainStep", "Step", "Stepper", "stepper"]


class Stepper(Protocol):
    """Shows a model one more token of every stream."""

    precision: str

    def __call__(self, tokens: Tensor) -> Tensor:
        """Show `tokens` (B,) int64 -> the next ones' logits (B, vocab_size), float32."""

    def next(self, tokens: Tensor, sampling: Sampling, allowed: Tensor | None, noise: Tensor) -> Tensor:
        """Show `tokens` (B,) int64, draw the next (B,), all on the CPU.

        Args:
            allowed: (B, vocab_size) bool, what may be drawn; None = everything.
            noise: (B,), uniform numbers that decide the draw, see `dsmr.generation.sampling.pick`.

        Raises:
            UserError: if the model's logits are not finite.
        """


class PlainStep:
    """The model's own forward pass, a token a call; it must be in evaluation mode."""

    def __init__(self, model: DSMRModel, state: DSMRState) -> None:
        self.model, self.state = model, state
        self.precision = str(next(model.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 -> the next tokens' logits (B, vocab_size), float32, CPU."""
        device = next(self.model.parameters()).device
        return self.model(tokens[:, None].to(device), self.state).logits[:, -1].float().cpu()

    def next(self, tokens: Tensor, sampling: Sampling, allowed: Tensor | None, noise: Tensor) -> Tensor:
        return draw(self(tokens), sampling, allowed, noise)


def stepper(model: DSMRModel, state: DSMRState, precision: str = "float32") -> Stepper:
    """The fastest way to step that serves `model` and `state`.

    Args:
        precision: of the weights: "auto", "float32", "bfloat16" or "int8" (CPU only).

    Raises:
        ValueError: if `state` is aligned, which leaves no room for a segment in progress.
        UserError: if the precision cannot be had here.
    """
    if state.aligned:
        raise ValueError("state must be made with new_state(..., aligned=False) to be stepped token by token")
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    first = next(model.parameters())
    device, dtype, other = first.device, first.dtype, altered(model)
    layers = attentions(model)
    plain = other is None and all(layer.plain for layer in layers)
    if plain and device.type == "cpu" and dtype != torch.float64 and in_step(state):
        return Step(model, state, HostRings(layers, state), resolve_precision(precision, model))
    if plain and device.type == "cuda":
        return captured_step(model, state, resolve_precision(precision, model))
    if precision != "auto" and resolve_precision(precision, model) != "float32":
        raise UserError(
            f"dtype '{precision}' serves float32 models on a CPU, streams in step, with attention as a DSMRModel makes "
            f"it; this one takes 'float32'{'' if other is None else f', since its {other} has been altered'}"
        )
    return PlainStep(model, state)
