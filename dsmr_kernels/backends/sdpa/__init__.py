"""Fast attention over memory and segment in plain PyTorch: the default on CPU, and it runs on any device.

`plan` cuts each row into runs that share segment and piece, so that under segment visibility nothing needs a mask but
the run's own causal edge. Two ways then serve the plan: `fused`, where no mask or bias is needed, by PyTorch's flash
kernel over each source apart, merged by log-sum-exp; `products`, for everything else, by blocked matrix products. Keys
and values are never concatenated and grouped heads never expanded.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.autograd import memory_attention
from dsmr_kernels.backends.sdpa.decode import decode_attention

__all__ = ["decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in float16, bfloat16, float32 or float64, not {q.dtype}"
    return None
