"""Fast attention over memory and segment in plain PyTorch: the default on CPU, and it runs on any device.

`plan` cuts each row into runs that share segment and piece, so that under segment visibility nothing needs a mask but
the run's own causal edge. Where that holds, on a CPU, two ways share the work by what each is measured to do faster:
`fused`, PyTorch's flash kernel over each source apart, merged by log-sum-exp, and `blocks`, batched matrix products
over tiles that fit the cache. `products` serves everything else. Keys and values are never concatenated and grouped
heads never expanded.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs, Method, attention_by
from dsmr_kernels.backends.sdpa import blocks, fused
from dsmr_kernels.backends.sdpa.decode import decode_attention
from dsmr_kernels.backends.sdpa.plan import Group, plan_call
from dsmr_kernels.backends.sdpa.products import Products
from dsmr_kernels.rotary import append_rotated

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in float16, bfloat16, float32 or float64, not {q.dtype}"
    return None


# Scores of a call from which bfloat16 gains from products in bfloat16, whose flash kernel is no faster than float32's.
BLOCKS_FORWARD = 1 << 22
# Scores of a head from which cores that take whole heads beat cores that share every product, in float32.
FUSED_BACKWARD = 3 << 16


def _head_scores(plan: list[Group]) -> int:
    """Query-key pairs of a head, with the masked ones, in the row that has most."""
    return max((sum((r.stop - r.start) * (r.stop - r.floor) for r in group.runs) for group in plan), default=0)


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor | None, list[Group]]:
    plan = plan_call(inputs)
    if not blocks.serves(inputs):
        return *Products(inputs).forward(plan, inputs.spec.return_lse), plan
    scores = _head_scores(plan) * inputs.q.shape[0] * inputs.q.shape[1]
    low = inputs.q.dtype == torch.bfloat16 and scores >= BLOCKS_FORWARD
    way = blocks if low or not fused.AVAILABLE else fused
    return *way.forward(inputs, plan), plan


def _backward(
    inputs: Inputs, plan: list[Group] | None, result: tuple[Tensor, Tensor] | None, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_call(inputs) if plan is None else plan
    if result is None:
        return Products(inputs).backward(plan, grad)
    large = inputs.q.dtype == torch.float32 and _head_scores(plan) >= FUSED_BACKWARD
    way = fused if large and fused.AVAILABLE else blocks
    return way.backward(inputs, plan, result[0], result[1], grad)


memory_attention = attention_by(Method("sdpa", _forward, _backward, blocks.serves))
