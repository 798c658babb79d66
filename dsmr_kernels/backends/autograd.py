"""What every fast backend needs around its forward and backward: the autograd node, and operators for `torch.compile`.

Eager calls go through the node alone, which saves the operators' dispatch; a graph sees one operator a call.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmr_kernels.memory import KVMemory
from dsmr_kernels.spec import AttentionSpec


class Inputs(NamedTuple):
    """The arguments of one call, checked and completed.

    `recorded`: a backward may follow, which wants the log-sum-exp whether the caller does or not.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    memory: KVMemory | None
    piece_start: Tensor | None
    alibi: Tensor | None
    spec: AttentionSpec
    recorded: bool = False

    @property
    def wants_lse(self) -> bool:
        return self.recorded or self.spec.return_lse


@dataclass(frozen=True)
class Method:
    """A backend's arithmetic.

    Attributes:
        name: of the backend, for errors and operators.
        forward: Inputs -> (out, lse, plan); lse (B, Hq, T) float32, or None if neither the call nor the backward asks
            for it; plan is whatever the backward would otherwise work out again.
        backward: (Inputs, plan or None, out and lse or None, gradient) -> (dq, dk, dv).
        keeps_result: whether the backward wants out and lse; they are then kept.
    """

    name: str
    forward: Callable[[Inputs], tuple[Tensor, Tensor | None, Any]]
    backward: Callable[[Inputs, Any, tuple[Tensor, Tensor] | None, Tensor], tuple[Tensor, Tensor, Tensor]]
    keeps_result: Callable[[Inputs], bool]


_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _switched_off(device: str) -> Iterator[None]:
    with torch.autocast(device, enabled=False), torch.no_grad():
        yield


def _plainly(device: str) -> contextlib.AbstractContextManager[None]:
    """Without autocast and without gradients; switching off what is off already would cost time."""
    if torch.is_autocast_enabled(device) or torch.is_grad_enabled():
        return _switched_off(device)
    return _AS_IT_IS


class _Once(torch.autograd.Function):
    """Passes gradients through, and lets a second differentiation fail with a sentence."""

    @staticmethod
    def forward(ctx: Any, name: str, dq: Tensor, dk: Tensor, dv: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"memory_attention cannot be differentiated twice (create_graph=True) with the {ctx.name} backend; "
            'use backend="reference", which can'
        )


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, method: Method, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor | None]:
        out, lse, plan = _forward(method, inputs)
        if method.keeps_result(inputs):
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            ctx.save_for_backward(q, k, v)
        memory = inputs.memory
        if memory is not None:  # as it is now: `append` puts new tensors in the place of length and position
            ctx.lease, ctx.version = memory.lease(), memory.k._version
            memory = KVMemory(memory.k, memory.v, memory.length, memory.position)
        ctx.rest = (memory, inputs.piece_start, inputs.alibi, inputs.spec)
        ctx.method, ctx.plan = method, plan
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v, *result = ctx.saved_tensors
        memory = ctx.rest[0]
        if memory is not None and memory.k._version != ctx.version:
            raise RuntimeError(
                "the memory of a memory_attention call was written to in place before the call's backward ran; "
                "append through KVMemory.append, which keeps what a backward still needs"
            )
        inputs = Inputs(q, k, v, *ctx.rest)
        with _plainly(q.device.type):
            grads = ctx.method.backward(inputs, ctx.plan, tuple(result) or None, grad)
        ctx.lease = None  # the memory may be overwritten from here on
        if torch.is_grad_enabled():
            grads = _Once.apply(ctx.method.name, *grads, q, k, v, grad)
        return None, *grads, None


def _forward(method: Method, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
    with _plainly(inputs.q.device.type):
        return method.forward(inputs)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? memory_k, Tensor? memory_v, Tensor? length, Tensor? position, "
    "Tensor? piece_start, Tensor? alibi, SymInt horizon, SymInt segment_length, SymInt segment_offset, str visibility, "
    "bool detach_segments, float scale"
)


def _unpack(arguments: tuple[Any, ...]) -> Inputs:
    q, k, v, memory_k, memory_v, length, position, piece_start, alibi, *scalars = arguments
    horizon, segment_length, segment_offset, visibility, detach, scale = scalars
    memory = None if memory_k is None else KVMemory(memory_k, memory_v, length, position)
    spec = AttentionSpec(horizon, segment_length or None, segment_offset, visibility, detach, scale, True)
    return Inputs(q, k, v, memory, piece_start, alibi, spec)


def _register(method: Method) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operators dsmr_kernels::<name>_forward and <name>_backward."""
    name = f"dsmr_kernels::{method.name}"

    @torch.library.custom_op(f"{name}_forward", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse, _ = _forward(method, _unpack(arguments))
        assert lse is not None
        return out.contiguous(), lse.contiguous()

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor]:
        q = arguments[0]
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)

    schema = f"(Tensor grad, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"

    @torch.library.custom_op(f"{name}_backward", mutates_args=(), schema=schema)
    def backward(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs = _unpack(arguments)
        with _plainly(grad.device.type):
            result = (out, lse) if method.keeps_result(inputs) else None
            dq, dk, dv = method.backward(inputs, None, result, grad)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()

    @backward.register_fake
    def _(grad: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = arguments[:3]
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output, *inputs[:9])
        ctx.scalars = inputs[9:]
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        return *backward(grad, *ctx.saved_tensors, *ctx.scalars), *(None,) * 12

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def attention_by(method: Method) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`memory_attention` of a backend that computes by `method`."""
    operator = _register(method)

    def memory_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: KVMemory | None,
        piece_start: Tensor | None,
        alibi_slopes: Tensor | None,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor | None]:
        """See `dsmr_kernels.memory_attention`; arguments are taken as checked."""
        if memory is not None and memory.k_scale is not None:  # beside whole segments of queries a copy costs little
            memory = KVMemory(*memory.values(q.dtype), memory.length, memory.position)
        if torch.compiler.is_compiling():
            ring = (None,) * 4 if memory is None else (memory.k, memory.v, memory.length, memory.position)
            scalars = (spec.horizon, spec.segment_length or 0, spec.segment_offset, spec.visibility)
            arguments = (*ring, piece_start, alibi_slopes, *scalars, spec.detach_segments, spec.scale)
            result = operator(q, k, v, *arguments)
            return result[0], result[1] if spec.return_lse else None
        recorded = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        inputs = Inputs(q, k, v, memory, piece_start, alibi_slopes, spec, recorded)
        if recorded:
            out, lse = _Node.apply(method, q, k, v, inputs)
        else:
            out, lse, _ = _forward(method, inputs)
        return out, lse if spec.return_lse else None

    return memory_attention
