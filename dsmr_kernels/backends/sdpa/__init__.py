"""Fast attention over memory and segment in plain PyTorch: the default on CPU, and it runs on any device.

`plan` cuts each row into runs that share segment and piece, so that under segment visibility nothing needs a mask but
the run's own causal edge. On a CPU there are two engines: `flash`, PyTorch's flash kernel over each source apart,
merged by log-sum-exp, and `products`, own matrix products over tiles, which serves every call and makes every backward.
Which of them makes a forward, and in which dtype, says the table in `processor`. `masked` serves other devices, which
must not wait for a plan. Keys and values are never concatenated and grouped heads never expanded. They may import the
contract and `autograd`.
"""

import contextlib

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Method, attention_by
from dsmr_kernels.backends.sdpa import flash, products
from dsmr_kernels.backends.sdpa.decode import decode_attention
from dsmr_kernels.backends.sdpa.finite import finite, kept_apart
from dsmr_kernels.backends.sdpa.masked import Masked
from dsmr_kernels.backends.sdpa.plan import Plan, plan_call
from dsmr_kernels.backends.sdpa.processor import Choice
from dsmr_kernels.backends.sdpa.tuned import choose
from dsmr_kernels.backends.sdpa.workers import HereWithoutDenormals
from dsmr_kernels.rotary import append_rotated
from dsmr_kernels.spec import Gradients, Inputs, Needs

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor, v_head_dim: int) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in float16, bfloat16, float32 or float64, not {q.dtype}"
    return None


# Below so many query-key pairs, or queries, a call is over before products have paid for their more operators.
PRODUCTS_PAIRS, PRODUCTS_QUERIES = 1 << 19, 64


def _may_look(inputs: Inputs) -> bool:
    """Whether lengths and positions may be looked at, which makes an accelerator wait."""
    return inputs.q.device.type == "cpu"


def _small(inputs: Inputs, plan: Plan) -> bool:
    heads, queries = inputs.q.shape[1:3]
    return queries < PRODUCTS_QUERIES or plan.pairs * heads < PRODUCTS_PAIRS


def _dtype_of_products(inputs: Inputs) -> torch.dtype:
    """In which dtype they are made."""
    if inputs.spec.visibility == "sliding" and inputs.spec.horizon == 0:
        return torch.promote_types(inputs.q.dtype, torch.float32)  # who sees itself alone has gradients of exactly zero
    return choose(inputs.q.dtype, "backward").dtype


def _keeps_result(inputs: Inputs) -> bool:
    return _may_look(inputs) and inputs.q.dtype != torch.float64  # for which a log-sum-exp in float32 says too little


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor | None, Plan | None]:
    if not _may_look(inputs):
        return *Masked(inputs).forward(), None
    with HereWithoutDenormals():
        return _forward_on_cpu(inputs)


def _forward_on_cpu(inputs: Inputs) -> tuple[Tensor, Tensor | None, Plan]:
    plan, dtype = plan_call(inputs), inputs.q.dtype
    choice = choose(dtype, "forward")
    by_flash = dtype != torch.float64 and flash.serves(inputs)
    out = lse = None
    if by_flash and (choice.engine == "flash" or _small(inputs, plan)):
        with contextlib.suppress(flash.Overlooked):
            out, lse = flash.forward(inputs, plan, choice.dtype)
    else:
        out, lse = _by_products(inputs, plan, choice)
    if out is None or not finite(out):  # a value that is none, or one or a score that is out of a common way's range
        out, lse = _by_products(kept_apart(inputs), plan, choice, carefully=True)
    return out, None if lse is None else lse.float(), plan


def _by_products(
    inputs: Inputs, plan: Plan, choice: Choice, *, carefully: bool = False
) -> tuple[Tensor, Tensor | None]:
    plain = choice.engine == "products" and flash.plain(inputs)
    return products.forward(inputs, plan, choice.dtype if plain else _dtype_of_products(inputs), carefully=carefully)


def _backward(
    inputs: Inputs,
    plan: Plan | None,
    result: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    if not _may_look(inputs):
        return Masked(inputs).backward(grad, grad_lse, needs)
    plan, work = plan_call(inputs) if plan is None else plan, _dtype_of_products(inputs)
    with HereWithoutDenormals():
        if result is None:
            out, lse = products.forward(inputs._replace(recorded=True), plan, work)
            assert lse is not None
            result = out, lse
        return products.backward(inputs, plan, work, result, grad, grad_lse, needs)


memory_attention = attention_by(Method("sdpa", _forward, _backward, _keeps_result))
