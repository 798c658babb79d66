"""From a projection to heads: split, turned by the rotary angles, in the dtype that attention takes, each part whole.

Every part is written once, where it stays, and so is the gradient of the projection: nothing is concatenated, and no
part keeps the projection's storage alive.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmr.model.positions import Rotary
from dsmr_kernels.rotary import rotate
from dsmr_kernels.spec import has_tangent

Part = tuple[int, bool]
"""So many heads of the projection, and whether they are turned."""


def heads_of(x: Tensor, parts: Sequence[Part], place: Rotary | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Split a projection into parts of heads.

    Args:
        x: (B, T, heads of all parts * head_dim).
        parts: from the first feature on.
        place: the angles of the T tokens; None = nothing is turned.
        dtype: of the parts. Angles are applied in float32 and rounded once.

    Returns:
        (B, heads, T, head_dim) for each part, contiguous.
    """
    parts = tuple((count, turned and place is not None) for count, turned in parts)
    cos, sin = (None, None) if place is None else (place.cos, place.sin)
    # Compiled it is fused, and differentiated forwards each operation is; a node of our own would be in the way.
    if torch.compiler.is_compiling() or has_tangent(x):
        return _plainly(x, cos, sin, parts, dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        found: tuple[Tensor, ...] = _Split.apply(x, cos, sin, parts, dtype)
        return found
    return _split(x, cos, sin, parts, dtype)


def _views(x: Tensor, parts: tuple[Part, ...]) -> list[Tensor]:
    """(B, T, heads * head_dim) -> (B, heads, T, head_dim) views, a part each."""
    counts = [count for count, _ in parts]
    return list(x.unflatten(-1, (sum(counts), -1)).transpose(1, 2).split(counts, 1))


def _plainly(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, parts: tuple[Part, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    found = []
    for part, (_, turned) in zip(_views(x, parts), parts, strict=True):
        if turned:
            assert cos is not None
            assert sin is not None
            part = rotate(part.to(torch.promote_types(x.dtype, torch.float32)), cos, sin)
        found.append(part.to(dtype).contiguous())
    return tuple(found)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """Write x, turned, or turned back, into `out`; both (B, heads, T, head_dim) of any strides and dtype, apart."""
    wide, sign = x.to(torch.float32), -1 if back else 1
    to = out if out.dtype == torch.float32 else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    (first, second), (to_first, to_second) = wide.chunk(2, -1), to.chunk(2, -1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    if to is not out:
        out.copy_(to)


def _split(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, parts: tuple[Part, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    found = []
    for part, (_, turned) in zip(_views(x, parts), parts, strict=True):
        out = torch.empty(part.shape, dtype=dtype, device=x.device)
        if turned:
            assert cos is not None
            assert sin is not None
            _turn(part, cos, sin, out, back=False)
        else:
            out.copy_(part)
        found.append(out)
    return tuple(found)


class _Split(torch.autograd.Function):
    """The split as a node. Linear, and a turn is undone by turning back: its gradient is `_Join`."""

    @staticmethod
    def forward(
        x: Tensor, cos: Tensor | None, sin: Tensor | None, parts: tuple[Part, ...], dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        return _split(x, cos, sin, parts, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, cos, sin, ctx.parts, _ = inputs
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Join.apply(*ctx.saved_tensors, ctx.parts, ctx.dtype, *grads), None, None, None, None


class _Join(torch.autograd.Function):
    """Parts, turned back, side by side: (B, T, features). Its gradient is `_Split`."""

    @staticmethod
    def forward(
        cos: Tensor | None, sin: Tensor | None, parts: tuple[Part, ...], dtype: torch.dtype, *grads: Tensor
    ) -> Tensor:
        batch, _, tokens, dim = grads[0].shape
        whole = torch.empty(batch, tokens, dim * sum(count for count, _ in parts), dtype=dtype, device=grads[0].device)
        for out, grad, (_, turned) in zip(_views(whole, parts), grads, parts, strict=True):
            if turned:
                assert cos is not None
                assert sin is not None
                _turn(grad, cos, sin, out, back=True)
            else:
                out.copy_(grad)
        return whole

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cos, sin, ctx.parts, _, *grads = inputs
        ctx.save_for_backward(cos, sin)
        ctx.dtype = grads[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, None, None, None, *_Split.apply(grad, *ctx.saved_tensors, ctx.parts, ctx.dtype)
