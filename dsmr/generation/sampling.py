"""How the next token is drawn: settings, and a draw that works on the few candidates that the filters leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmr.console.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields, each to what the last one left.

    temperature  divides the logits; 0 takes the likeliest token every time, and the filters then change nothing
    top_k        keep the k likeliest tokens; None keeps all
    top_p        keep the fewest tokens whose probabilities reach p together; 1 keeps all
    min_p        keep tokens at least min_p times as likely as the likeliest; 0 keeps all
    seed         the same seed, model, prompt and settings give the same music; None draws a fresh one
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None to keep every token, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (which keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 (which keeps every token) and 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")

    def generator(self, row: int = 0) -> torch.Generator:
        """A fresh random generator, on the CPU, so that a seed means the same on every device. Row r of a batch draws
        as a stream of seed + r alone would."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + row) % 2**63)
        return generator


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


NOT_FINITE = "the model's logits are not finite (NaN or infinity): its weights are damaged or overflow"


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
    return draw(logits, sampling, allowed, torch.rand(logits.shape[:-1], generator=generator).to(logits.device))


def _check(logits: Tensor, allowed: Tensor | None) -> None:
    check_finite(logits)
    if allowed is not None and not bool(allowed.any(-1).all()):
        raise ValueError("allowed leaves no token to draw from")
