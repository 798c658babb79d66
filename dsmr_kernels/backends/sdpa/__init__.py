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
from dsmr_kernels.backends.sdpa.finite import kept_apart
from dsmr_kernels.backends.sdpa.masked import Masked
from dsmr_kernels.backends.sdpa.plan import Group, plan_call
from dsmr_kernels.backends.sdpa.processor import work_dtype
from dsmr_kernels.backends.sdpa.products import Products
from dsmr_kernels.rotary import append_rotated
from dsmr_kernels.spec import Gradients, Inputs, Needs

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor, v_head_dim: int) -> str | None:
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


def _widened(inputs: Inputs) -> Inputs:
    """The call in the dtype that it is computed in; memory is cast where it is read, a stretch at a time."""
    work = work_dtype(inputs.q.dtype)
    if work == inputs.q.dtype:
        return inputs
    return inputs._replace(q=inputs.q.to(work), k=inputs.k.to(work), v=inputs.v.to(work))


def _keeps_result(inputs: Inputs) -> bool:
    return blocks.serves(inputs, work_dtype(inputs.q.dtype))


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor | None, list[Group] | None]:
    if not _may_look(inputs):
        return *Masked(inputs).forward(), None
    plan, dtype = plan_call(inputs), inputs.q.dtype
    inputs, finite = kept_apart(inputs)
    inputs = _widened(inputs)
    if not blocks.serves(inputs):
        out, lse = Products(inputs).forward(plan, inputs.spec.return_lse)
        return out.to(dtype), lse, plan
    by_flash = finite and flash.fits(inputs.q, inputs.k, inputs.v)  # it overlooks a NaN that is seen alone
    by_flash = by_flash and (inputs.q.dtype == torch.float32 or _few_scores(inputs, plan))
    out, lse = (flash if by_flash else blocks).forward(inputs, plan)
    return out.to(dtype), lse, plan


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
    plan, dtype = plan_call(inputs) if plan is None else plan, inputs.q.dtype
    inputs = _widened(inputs)
    grad = grad.to(inputs.q.dtype)
    if result is None:
        grads = Products(inputs).backward(plan, grad, grad_lse, needs)
    else:
        grads = blocks.backward(inputs, plan, *result, grad, grad_lse, needs)
    q, k, v = (None if x is None else x.to(dtype) for x in grads[:3])
    return Gradients(q, k, v, grads.bias)


memory_attention = attention_by(Method("sdpa", _forward, _backward, _keeps_result))
