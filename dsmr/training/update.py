"""The end of a training step: gradients are clipped, AdamW takes them in, and what was freed is kept for the next."""

import ctypes
import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsmr.runs.settings import TrainConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST_FROM_HEAP = 2**25  # bytes: the most that glibc lets a threshold be
_NEVER = -1


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
    over all gradients. A length that is not finite changes nothing.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    length = norm.item()
    if math.isfinite(length) and longest / (length + 1e-6) < 1:
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, norm, foreach=True)
    return length


def keep_freed_memory() -> bool:
    """Have this process keep the memory that a step frees, for the next step, which asks for the same again.

    Else the C library gives tensors of more than a few hundred kilobytes back to the system, which hands out pages
    anew, zeroed, one fault each, in every step. Only glibc is asked: elsewhere it is False, and nothing changes. The
    peak stays what it is. `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` in the environment do the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
