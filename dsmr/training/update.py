"""The end of a training step: gradients are clipped, and AdamW takes them in."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsmr.runs.settings import TrainConfig


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW that decays matrices only: shrinking norms and biases helps nothing. One pass over the weights a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)


def clip_gradients(parameters: Iterable[Tensor], longest: float) -> float:
    """Shorten the gradients to the length `longest` together, where they are longer; their length before.

    As `torch.nn.utils.clip_grad_norm_`, bit for bit, which multiplies them by 1 where they are short enough: a pass
    over all gradients. A length that is not finite changes nothing. Of gradients that lie in several ranks the length
    is that of the whole.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    norm = getattr(norm, "full_tensor", lambda: norm)()
    length = norm.item()
    if math.isfinite(length) and longest / (length + 1e-6) < 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, norm, foreach=True)
    return length


def clip_on_device(parameters: Iterable[Tensor], longest: float) -> Tensor:
    """As `clip_gradients`, where nobody may wait for the device: the gradients are multiplied in any case, by 1 where
    they are short enough, and by 0 or NaN where their length is not finite."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if math.isfinite(longest):
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, norm, foreach=True)
    return norm
