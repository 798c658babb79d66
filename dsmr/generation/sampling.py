"""How the next token is drawn from tensors, on any device: a draw that works on the few candidates that the filters
leave. The settings, and the same draw for a host without PyTorch, are in `dsmr.generation.drawing`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsmr.console.errors import UserError
from dsmr.generation.drawing import NOT_FINITE, Sampling

__all__ = ["NOT_FINITE", "Sampling", "candidates", "check_finite", "draw", "pick", "probabilities", "sample"]


def candidates(logits: Tensor, sampling: Sampling, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What may be drawn: token ids (..., n) and their probabilities, float32, each row summing to 1. Host-free.

    n is V or, with top_k, k; what the other filters drop has probability 0. `allowed` (broadcastable to `logits`, bool)
    marks the tokens that may be drawn at all.
    """
    logits = logits.detach().float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if sampling.temperature == 0:
        order = logits.argmax(-1, keepdim=True)
        return order, torch.ones_like(order, dtype=torch.float32)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        ranked, order = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        ranked, order = logits.sort(descending=True, stable=True)
    else:
        ranked, order = logits, torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    # The likeliest token sits at 0, so a tiny temperature can only send the others to -inf, never make a NaN.
    ranked = (ranked - ranked.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
    if sampling.top_p < 1:
        chances = ranked.softmax(-1)
        before = chances.cumsum(-1) - chances  # what the likelier tokens reach without this one; 0 for the likeliest
        ranked = ranked.masked_fill(before >= sampling.top_p, -math.inf)
    if sampling.min_p > 0:
        ranked = ranked.masked_fill(ranked < math.log(sampling.min_p), -math.inf)
    return order, ranked.softmax(-1)


def pick(order: Tensor, chances: Tensor, noise: Tensor) -> Tensor:
    """The candidates that uniform numbers `noise` (...), at least 0 and below 1, fall on: (...) int64. Host-free."""
    reached = chances.double().cumsum(-1)  # double, so that noise times the whole stays below the whole
    index = torch.searchsorted(reached, noise.double()[..., None] * reached[..., -1:], right=True)
    last = order.shape[-1] - 1  # beyond it lies only what is found among NaNs
    return order.gather(-1, index.clamp(max=last))[..., 0]


def check_finite(logits: Tensor) -> None:
    """`UserError` where logits are NaN or positive infinity."""
    if not math.isfinite(logits.sum()) and bool((torch.isnan(logits) | torch.isposinf(logits)).any()):
        raise UserError(NOT_FINITE)


def draw(logits: Tensor, sampling: Sampling, allowed: Tensor | None, noise: Tensor) -> Tensor:
    """The tokens (B,) that `noise` (B,) falls on; `UserError` where logits (B, V) are not finite."""
    check_finite(logits)
    return pick(*candidates(logits, sampling, allowed), noise)


def probabilities(logits: Tensor, sampling: Sampling, allowed: Tensor | None = None) -> Tensor:
    """The distribution that `sample` draws from: float32, the shape of `logits` (..., V), each row summing to 1.

    `UserError` where the logits are not finite, `ValueError` where nothing is allowed.
    """
    _check(logits, allowed)
    order, chances = candidates(logits, sampling, allowed)
    return torch.zeros_like(logits, dtype=torch.float32).scatter(-1, order, chances)


def sample(
    logits: Tensor,
    sampling: Sampling,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of `logits` (..., V); the result is (...) int64. Errors as for `probabilities`."""
    _check(logits, allowed)
    device = "cpu" if generator is None else generator.device
    chance = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float32, device=device)
    return draw(logits, sampling, allowed, chance.to(logits.device))


def _check(logits: Tensor, allowed: Tensor | None) -> None:
    check_finite(logits)
    if allowed is not None and not bool(allowed.any(-1).all()):
        raise ValueError("allowed leaves no token to draw from")
