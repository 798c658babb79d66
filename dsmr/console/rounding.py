"""Linear layers under autocast on a processor that multiplies no bfloat16: computed in float32, and rounded.

PyTorch makes such a product there by converting element by element, four times as slowly as one in float32. What is
between layers, and kept for the backward, is in the narrow dtype all the same.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ROUNDED: ContextVar[bool] = ContextVar("products are rounded", default=False)
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts; it leaves float64 as it is


@contextlib.contextmanager
def rounded_products() -> Iterator[None]:
    """A context in which linear layers on the CPU, under autocast, compute in float32 and round."""
    token = _ROUNDED.set(True)
    try:
        with _RoundedLinear():
            yield
    finally:
        _ROUNDED.reset(token)


def as_now() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For `torch.utils.checkpoint`: what is computed again in a backward is computed as it was at first, also where the
    context has ended by then."""
    return contextlib.nullcontext(), rounded_products() if _ROUNDED.get() else contextlib.nullcontext()


class _RoundedLinear(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and torch.is_autocast_enabled("cpu"):
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if any(t is not None and (t.device.type != "cpu" or t.dtype not in _CAST) for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    return _Rounded.apply(x.to(torch.get_autocast_dtype("cpu")), weight, bias)


class _Rounded(torch.autograd.Function):
    """x W^T + b of a narrow x and weights in any dtype, in the dtype of x; gradients of the weights in float32."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias = None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        with torch.autocast("cpu", enabled=False):
            rows = grad.float()
            if ctx.needs_input_grad[0]:
                dx = (rows @ weight.float()).to(x.dtype)
            rows = rows.flatten(0, -2)
            if ctx.needs_input_grad[1]:
                dw = (rows.T @ x.flatten(0, -2).float()).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                db = rows.sum(0).to(ctx.bias)
        return dx, dw, db
