"""Rotary position embedding as arithmetic: given the angles' cosines and sines, turn the two halves of each head."""

import torch
from torch import Tensor

from dsmr_kernels.memory import KVMemory


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, head_dim) by pairing its two halves (Su et al., 2021); in float32, returned in x's dtype.

    Args:
        cos, sin: (B, 1, T, head_dim // 2) float32.
    """
    first, second = x.to(torch.float32).chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def append_rotated(q: Tensor, k: Tensor, v: Tensor, memory: KVMemory, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`dsmr_kernels.append_rotated` in PyTorch, for every device and dtype; arguments are taken as checked."""
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    stored = q.dtype if memory.dtype == torch.int8 else memory.dtype
    memory.append(k.to(stored), v.to(stored))
    return q.to(stored)
