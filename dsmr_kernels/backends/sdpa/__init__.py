"""Fast attention over memory and segment in plain PyTorch: the default on CPU, and it runs on any device.

`plan` cuts each row into runs that share segment and piece, so that under segment visibility nothing needs a mask but
the run's own causal edge. Where that holds, on a CPU, `blocks` serves, matrix products over tiles that fit the cache,
and in the forward, by what is measured to be faster, `flash`, PyTorch's flash kernel over each source apart, merged by
log-sum-exp. `products` serves everything else on a CPU, and `masked` other devices, which must not wait for a plan.
Keys and values are never concatenated and grouped heads never expanded. They may import the contract and `autograd`.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Method, attention_by
from dsmr_kernels.backends.sdpa import blocks, flash
from dsmr_kernels.backends.sdpa.decode import decode_attention
from dsmr_kernels.backends.sdpa.masked import Masked
from dsmr_kernels.backends.sdpa.plan import Group, plan_call
from dsmr_kernels.backends.sdpa.products import Products
from dsmr_kernels.rotary import append_rotated
from dsmr_kernels.spec import Gradients, Inputs, Needs

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor, v_head_dim: int, biased: bool) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in float16, bfloat16, float32 or float64, not {q.dtype}"
    return None


# From how many scores of a call and queries on bfloat16 gains from products in bfloat16: the flash kernel is no faster
# than in float32.
BLOCKS_SCORES, BLOCKS_QUERIES = 1 << 19, 64


def _few_scores(inputs: Inputs, plan: list[Group]) -> bool:
    batch, heads, queries = inputs.q.shape[:3]
    return queries < BLOCKS_QUERIES or blocks.head_scores(plan) * batch * heads < BLOCKS_SCORES


def _may_look(inputs: Inputs) -> bool:
    """Whether lengths and positions may be looked at, which makes an accelerator wait."""
    return inputs.q.device.type == "cpu"


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor | None, list[Group] | None]:
    if not _may_look(inputs):
        return *Masked(inputs).forward(), None
    plan = plan_call(inputs)
    if not blocks.serves(inputs):
        return *Products(inputs).forward(plan, inputs.spec.return_lse), plan
    by_flash = flash.fits(inputs.q, inputs.k, inputs.v)
    by_flash = by_flash and (inputs.q.dtype == torch.float32 or _few_scores(inputs, plan))
    return *(flash if by_flash else blocks).forward(inputs, plan), plan


def _backward(
    inputs: Inputs,
    plan: list[Group] | None,
    result: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    if not _may_look(inputs):
        return Masked(inputs).backward(grad, grad_lse, needs)
    plan = plan_call(inputs) if plan is None else plan
    if result is None:
        return Products(inputs).backward(plan, grad, grad_lse, needs)
    return blocks.backward(inputs, plan, *result, grad, grad_lse, needs)


memory_attention = attention_by(Method("sdpa", _forward, _backward, blocks.serves))
