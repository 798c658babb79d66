"""The backend's entry: choice of the way, the autograd node, and the operators that `torch.compile` sees."""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa import fused
from dsmr_kernels.backends.sdpa.plan import Group, plan_call
from dsmr_kernels.backends.sdpa.products import Products
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.memory import KVMemory


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | None,
    plan: list[Group],
    alibi: Tensor | None,
    spec: AttentionSpec,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        if fused.serves(q, alibi, spec):
            return fused.forward(q, k, v, memory, plan, spec)
        storage = None if memory is None else (memory.k, memory.v)
        return Products(q, k, v, storage, alibi, spec).forward(plan, with_lse)


class _Once(torch.autograd.Function):
    """Passes gradients through, and lets a second differentiation fail with a sentence."""

    @staticmethod
    def forward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "memory_attention cannot be differentiated twice (create_graph=True) with the sdpa backend; "
            'use backend="reference", which can'
        )


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: KVMemory | None,
        piece_start: Tensor | None,
        alibi: Tensor | None,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor | None]:
        plan = plan_call(q, k, memory, piece_start, spec)
        keep = fused.serves(q, alibi, spec)
        out, lse = _forward(q, k, v, memory, plan, alibi, spec, spec.return_lse)
        if keep:
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            ctx.save_for_backward(q, k, v)
        ctx.storage = None if memory is None else (memory.k, memory.v)
        ctx.version = None if memory is None else memory.k._version
        ctx.lease = None if memory is None else memory.lease()
        ctx.plan, ctx.alibi, ctx.spec = plan, alibi, spec
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v, *result = ctx.saved_tensors
        if ctx.storage is not None and ctx.storage[0]._version != ctx.version:
            raise RuntimeError(
                "the memory of a memory_attention call was written to in place before the call's backward ran; "
                "append through KVMemory.append, which keeps what a backward still needs"
            )
        with torch.autocast(q.device.type, enabled=False), torch.no_grad():
            if result:
                out, lse = result
                grads = fused.backward(q, k, v, ctx.storage, ctx.plan, ctx.spec, out, lse, grad)
            else:
                grads = Products(q, k, v, ctx.storage, ctx.alibi, ctx.spec).backward(ctx.plan, grad)
        ctx.lease = None  # the memory may be overwritten from here on
        if torch.is_grad_enabled():
            grads = _Once.apply(*grads, q, k, v, grad)
        return *grads, None, None, None, None


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
    if torch.compiler.is_compiling():
        return _compiled(q, k, v, memory, piece_start, alibi_slopes, spec)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _MemoryAttention.apply(q, k, v, memory, piece_start, alibi_slopes, spec)
    plan = plan_call(q, k, memory, piece_start, spec)
    return _forward(q, k, v, memory, plan, alibi_slopes, spec, spec.return_lse)


# Operators for torch.compile: what a graph sees of a call. Eager calls do without them, which saves their dispatch.

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? memory_k, Tensor? memory_v, Tensor? length, Tensor? position, "
    "Tensor? piece_start, Tensor? alibi, SymInt horizon, SymInt segment_length, SymInt segment_offset, str visibility, "
    "bool detach_segments, float scale"
)


def _unpack(arguments: tuple[Any, ...], return_lse: bool) -> tuple[Any, ...]:
    """The flat arguments of an operator as (q, k, v, memory, piece_start, alibi, spec)."""
    q, k, v, memory_k, memory_v, length, position, piece_start, alibi, horizon, segment, offset, visibility, *rest = (
        arguments
    )
    detach, scale = rest
    memory = None if memory_k is None else KVMemory(memory_k, memory_v, length, position)
    spec = AttentionSpec(horizon, segment or None, offset, visibility, detach, scale, return_lse)
    return q, k, v, memory, piece_start, alibi, spec


@torch.library.custom_op("dsmr_kernels::sdpa_forward", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k, v, memory, piece_start, alibi, spec = _unpack(arguments, True)
    out, lse = _forward(q, k, v, memory, plan_call(q, k, memory, piece_start, spec), alibi, spec, True)
    assert lse is not None
    return out.contiguous(), lse.contiguous()


@_forward_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = arguments[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "dsmr_kernels::sdpa_backward", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _backward_op(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, memory, piece_start, alibi, spec = _unpack(arguments, False)
    storage = None if memory is None else (memory.k, memory.v)
    plan = plan_call(q, k, memory, piece_start, spec)
    with torch.autocast(q.device.type, enabled=False):
        return Products(q, k, v, storage, alibi, spec).backward(plan, grad)


@_backward_op.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = arguments[:3]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.scalars = inputs[9:]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    grads = torch.ops.dsmr_kernels.sdpa_backward(grad, *ctx.saved_tensors, *ctx.scalars)
    return *grads, *(None,) * 12


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | None,
    piece_start: Tensor | None,
    alibi: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor | None]:
    state = (None,) * 4 if memory is None else (memory.k, memory.v, memory.length, memory.position)
    out, lse = torch.ops.dsmr_kernels.sdpa_forward(
        q,
        k,
        v,
        *state,
        piece_start,
        alibi,
        spec.horizon,
        spec.segment_length or 0,
        spec.segment_offset,
        spec.visibility,
        spec.detach_segments,
        spec.scale,
    )
    return out, lse if spec.return_lse else None
