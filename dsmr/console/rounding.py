"""Linear layers under autocast on a processor that multiplies no bfloat16: computed in float32, and rounded.

PyTorch makes such a product there by converting element by element, four times as slowly as one in float32. What is
between layers, and kept for the backward, is in the narrow dtype all the same.
"""

import contextlib
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ROUNDED: ContextVar[bool] = ContextVar("products are rounded", default=False)
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts; it leaves float64 as it is


class RoundedProducts:
    """A context, `within` another one, in which linear layers on the CPU, under autocast, compute in float32 and round.
    It may be entered again."""

    def __init__(self, within: contextlib.AbstractContextManager[object] | None = None) -> None:
        self._within = within or contextlib.nullcontext()

    def __enter__(self) -> None:
        self._within.__enter__()
        self._token = _ROUNDED.set(True)
        self._mode = _RoundedLinear()
        self._mode.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._mode.__exit__(*raised)
        _ROUNDED.reset(self._token)
        self._within.__exit__(*raised)


def as_now() -> dict[str, Any]:
    """For `torch.utils.checkpoint`, beside its arguments: what is computed again in a backward is computed as it was at
    first, also where the context has ended by then."""
    return {"context_fn": lambda: (contextlib.nullcontext(), RoundedProducts())} if _ROUNDED.get() else {}


class _RoundedLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not types and torch.is_autocast_enabled("cpu"):  # types: weights that know better
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if any(t is not None and (t.device.type != "cpu" or t.dtype not in _CAST) for t in (input, weight, bias)):
        return F.linear(input, weight, bias)
    return _Rounded.apply(input.to(torch.get_autocast_dtype("cpu")), weight, bias)


class _Rounded(torch.autograd.Function):
    """x W^T + b of a narrow x and weights in any dtype, in the dtype of x; gradients of the weights in float32. Knows
    no second derivative, no forward-mode differentiation and no vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dtypes, dx, dw, db = ctx.dtypes, None, None, None
        with torch.autocast("cpu", enabled=False):
            wide = grad.float()
            rows = wide.reshape(-1, wide.shape[-1])
            if ctx.needs_input_grad[0]:
                dx = (wide @ weight.float()).to(dtypes[0])
            if ctx.needs_input_grad[1]:
                dw = (rows.T @ x.reshape(-1, x.shape[-1]).float()).to(dtypes[1])
            if ctx.needs_input_grad[2]:
                db = rows.sum(0).to(dtypes[2])
        return dx, dw, db
