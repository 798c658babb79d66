"""What every fast backend needs around its forward and backward: the autograd node, and operators for `torch.compile`.

Eager calls go through the node alone, which saves the operators' dispatch; a graph sees one operator a call.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsmr_kernels.autocast import without_autocast
from dsmr_kernels.memory import MOVED, KVMemory, MemorySnapshot, in_backward
from dsmr_kernels.spec import (
    Alike,
    AttentionSpec,
    Gradients,
    Inputs,
    Needs,
    Prepared,
    Stored,
    has_tangent,
    layout,
    learning,
)


@dataclass(frozen=True)
class Method:
    """A backend's arithmetic.

    Attributes:
        name: of the backend, for errors and operators.
        forward: Inputs -> (out, lse, plan); lse (B, Hq, T) float32, or None if neither the call nor the backward asks
            for it; plan is whatever the backward would otherwise work out again.
        backward: (Inputs, plan or None, out and lse or None, gradient of out, gradient of lse or None, what is needed)
            -> Gradients.
        keeps_result: whether the backward wants out and lse; they are then kept.
        prepare: Inputs of a call in which nothing takes part but q, k, v and memory -> what serves calls like it from
            then on, or None if there is nothing; such a method keeps its results and has no plan.
    """

    name: str
    forward: Callable[[Inputs], tuple[Tensor, Tensor | None, Any]]
    backward: Callable[[Inputs, Any, tuple[Tensor, Tensor] | None, Tensor, Tensor | None, Needs], Gradients]
    keeps_result: Callable[[Inputs], bool]
    prepare: Callable[[Inputs], Prepared | None] | None = None


@contextlib.contextmanager
def _plainly(device: str) -> Iterator[None]:
    """Without autocast and without gradients."""
    with without_autocast(device), torch.no_grad():
        yield


def _is_plain(device: str) -> bool:
    """Whether they are off already: switching them off would cost time."""
    return not (torch.is_grad_enabled() or (device != "meta" and torch.is_autocast_enabled(device)))


def _not_forwards(name: str) -> RuntimeError:
    return RuntimeError(
        f"memory_attention cannot be differentiated forwards (jvp) with the {name} backend; "
        'use backend="reference", which can'
    )


class _Backward(torch.autograd.Function):
    """The backward as a function of tensors, so that transforms see it whole (`torch.func`) and a second
    differentiation fails with a sentence. Gradients that nobody asks for are left out."""

    @staticmethod
    def forward(
        method: Method, plan: Any, rest: Inputs, needs: Needs, results: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        q, k, v, bias, grad, grad_lse, *result = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert grad is not None
        inputs = rest._replace(q=q, k=k, v=v, bias=bias)
        found = _backward(method, inputs, plan, tuple(result), grad, grad_lse, needs)  # type: ignore[arg-type]
        return tuple(x for x in found if x is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0].name

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"memory_attention cannot be differentiated twice (create_graph=True) with the {ctx.name} backend; "
            'use backend="reference", which can'
        )


WRITTEN = (
    "the memory of a memory_attention call was written to in place before the call's backward ran: write through "
    "KVMemory, which keeps what a first backward needs, and hold a snapshot for a second one"
)


class _Memory:
    """The memory that a recorded call has read, as it was, and the promise that nobody has written to it since."""

    __slots__ = ("versions", "view")

    def __init__(self, memory: KVMemory | MemorySnapshot) -> None:
        self.view = memory.held()
        self.versions = self.view.versions()

    def unchanged(self) -> MemorySnapshot:
        if self.view.versions() != self.versions:
            raise RuntimeError(WRITTEN)
        return self.view


class _Node(torch.autograd.Function):
    """The node of a recorded call: of (method, inputs, q, k, v) and the bias if there is one; of the rest of `inputs`
    nothing takes a gradient. It gives out, and lse only where the call does: PyTorch takes its time for every argument
    and result of a node."""

    @staticmethod
    def forward(ctx: Any, method: Method, inputs: Inputs, *learned: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        inputs = _with(inputs, *learned)
        out, lse, plan = _forward(method, inputs)
        _keep(ctx, method, inputs, (out, lse), plan)
        return (out, lse) if inputs.spec.return_lse else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None = None) -> Any:
        method, plan, read, spec, kind, has_beside = ctx.kept
        q, k, v, *saved = ctx.saved_tensors
        piece_start, alibi, offsets, bias, buckets = saved[:5] if has_beside else (None,) * 5
        result = saved[5:] if has_beside else saved
        memory = None if read is None else read.unchanged()
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            if grad_lse is None:
                return (None,) * (2 + len(needed))
            grad = q.new_zeros((*q.shape[:3], v.shape[3]))
        inputs = Inputs(q, k, v, memory, piece_start, alibi, offsets, bias, buckets, spec, True, False, kind)
        grads = _gradients(method, inputs, plan, result, grad, grad_lse, Needs(*needed))
        if read is not None:  # it may be overwritten from here on; a second backward would notice
            read.view.let_go()
        return None, None, *grads[: len(needed)]


def _gradients(
    method: Method,
    inputs: Inputs,
    plan: Any,
    result: Sequence[Tensor],
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """The gradients of a recorded call, from what it has kept."""
    if has_tangent(grad, grad_lse):  # of what comes after the call
        raise _not_forwards(method.name)
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.alike is not None and inputs.alike.layout != layout(q, k, v):
        inputs = inputs._replace(alike=None)  # hooks on what is saved may have brought it back in another layout
    if not torch.is_grad_enabled():
        return _backward(method, inputs, plan, result, grad, grad_lse, needs)
    rest = inputs._replace(q=None, k=None, v=None, bias=None)  # type: ignore[arg-type]
    tensors = (q, k, v, inputs.bias, grad, grad_lse, *result)
    found = iter(_Backward.apply(method, plan, rest, needs, len(result), *tensors))
    return Gradients(*(next(found) if need else None for need in needs))


class _SwiftNode(torch.autograd.Function):
    """The node of a recorded call of `Swift`: of ((it, memory), q, k, v), as `_Node`, with nothing left to decide."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple["Swift", KVMemory | MemorySnapshot | None], q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        swift, memory = call
        stored = versions = lease = None
        if memory is not None:
            stored = a, b, c, d = memory.k, memory.v, memory.length, memory.position
            versions, lease = (a._version, b._version, c._version, d._version), memory.leased_anew()
        out, lse = swift.prepared.forward(q, k, v, stored)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kept = swift, stored, versions, lease
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        swift, stored, versions, lease = ctx.kept
        q, k, v, out, lse = ctx.saved_tensors
        if stored is not None:
            a, b, c, d = stored
            if (a._version, b._version, c._version, d._version) != versions:
                raise RuntimeError(WRITTEN)
        if grad is None:
            return None, None, None, None
        grads = swift.gradients(q, k, v, stored, out, lse, grad, ctx.needs_input_grad[1:])
        if lease is not None:  # as of `_Node`
            ctx.kept = swift, stored, versions, None
        return None, *grads


class Swift:
    """Calls of one kind, by what a method has `prepared` for them."""

    __slots__ = ("kind", "method", "prepared", "strides")

    def __init__(self, method: Method, prepared: Prepared, kind: Alike) -> None:
        self.method, self.prepared, self.kind, self.strides = method, prepared, kind, kind.layout[:3]

    @staticmethod
    def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether neither a transform is at work nor has one left one of these behind."""
        return not (
            torch._C._are_functorch_transforms_active() or _of_transforms(q) or _of_transforms(k) or _of_transforms(v)
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, memory: KVMemory | MemorySnapshot | None) -> Tensor | None:
        """out of tensors that it `suits`; None once it is outdated."""
        if not self.prepared.stands():
            self.kind.swift = None
            return None
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return cast(Tensor, _apply_swift((self, memory), q, k, v))
        stored = None if memory is None else (memory.k, memory.v, memory.length, memory.position)
        return self.prepared.forward(q, k, v, stored)[0]

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, stored: Stored | None, out: Tensor, lse: Tensor, grad: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        as_saved = (q.stride(), k.stride(), v.stride()) == self.strides and out.is_contiguous() and lse.is_contiguous()
        if as_saved and not torch.is_grad_enabled() and forward_ad._current_level < 0:
            found = self.prepared.backward(q, k, v, stored, out, lse, grad, needs)
            if found is not None:
                return found
        spec = self.kind.spec
        assert spec is not None
        memory = None if stored is None else MemorySnapshot(*stored)
        inputs = Inputs(q, k, v, memory, None, None, None, None, None, spec, True, False, self.kind)
        return _gradients(self.method, inputs, None, (out, lse), grad, None, Needs(*needs))[:3]


class _NodeOfTransforms(torch.autograd.Function):
    """The same, as `torch.func` wants it, lse always among the results; PyTorch then takes several times as long to
    call it."""

    @staticmethod
    def forward(method: Method, inputs: Inputs, *learned: Tensor) -> tuple[Tensor, Tensor | None]:
        return _forward(method, _with(inputs, *learned))[:2]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor | None]) -> None:
        method, given, *learned = inputs
        _keep(ctx, method, _with(given, *learned), output, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _not_forwards(ctx.kept[0].name)

    backward = _Node.backward


def _with(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Inputs:
    """The inputs with the tensors that PyTorch hands over, which it may have unwrapped."""
    if q is inputs.q and k is inputs.k and v is inputs.v and bias is inputs.bias:
        return inputs
    return inputs._replace(q=q, k=k, v=v, bias=bias)


def _keep(ctx: Any, method: Method, inputs: Inputs, output: tuple[Tensor, Tensor | None], plan: Any) -> None:
    """What a backward needs."""
    ctx.set_materialize_grads(False)
    q, k, v, memory, piece_start, alibi, offsets, bias, buckets, spec, _, _, kind = inputs
    # Saved, all of them: PyTorch sees if they change.
    has_beside = not (piece_start is None and alibi is None and offsets is None and bias is None)
    beside = (piece_start, alibi, offsets, bias, buckets) if has_beside else ()
    ctx.save_for_backward(q, k, v, *beside, *(output if method.keeps_result(inputs) else ()))
    read = None if memory is None else _Memory(cast("KVMemory | MemorySnapshot", memory))
    ctx.kept = method, plan, read, spec, kind, has_beside


def _forward(method: Method, inputs: Inputs) -> tuple[Tensor, Tensor | None, Any]:
    device = inputs.q.device.type
    if _is_plain(device):
        return method.forward(inputs)
    with _plainly(device):
        return method.forward(inputs)


def _backward(
    method: Method,
    inputs: Inputs,
    plan: Any,
    result: Sequence[Tensor],
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    device, kept = inputs.q.device.type, (result[0], result[1]) if result else None
    if _is_plain(device):
        return method.backward(inputs, plan, kept, grad, grad_lse, needs)
    with _plainly(device):
        return method.backward(inputs, plan, kept, grad, grad_lse, needs)


# What `_Node.apply` comes to where neither `torch.func` nor what it has left behind is there: finding that out takes it
# half as long as the rest.
_apply: Callable[..., Any] = super(torch.autograd.Function, _Node).apply
_apply_swift: Callable[..., Any] = super(torch.autograd.Function, _SwiftNode).apply
_of_transforms = torch._C._functorch.is_functorch_wrapped_tensor


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? memory_k, Tensor? memory_v, Tensor? length, Tensor? position, "
    "Tensor? k_scale, Tensor? v_scale, Tensor? piece_start, Tensor? alibi, Tensor? offsets, Tensor? buckets, "
    "SymInt horizon, SymInt segment_length, SymInt segment_offset, str visibility, bool detach_segments, float scale, "
    "bool live"
)
_TENSORS, _SCALARS = 14, 7


def _pack(inputs: Inputs) -> tuple[Any, ...]:
    memory, spec = inputs.memory, inputs.spec
    names = ("k", "v", "length", "position", "k_scale", "v_scale")
    ring = (None,) * 6 if memory is None else tuple(getattr(memory, name) for name in names)
    scalars: tuple[Any, ...] = (spec.horizon, spec.segment_length or 0, spec.segment_offset, spec.visibility)
    tensors = (inputs.piece_start, inputs.alibi, inputs.offsets, inputs.buckets)
    return (
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.bias,
        *ring,
        *tensors,
        *scalars,
        spec.detach_segments,
        spec.scale,
        inputs.live,
    )


def _unpack(arguments: tuple[Any, ...]) -> Inputs:
    q, k, v, bias, *ring = arguments[:10]
    piece_start, alibi, offsets, buckets = arguments[10:_TENSORS]
    horizon, segment_length, segment_offset, visibility, detach, scale, _ = arguments[_TENSORS:]
    memory = None if ring[0] is None else MemorySnapshot(*ring)
    spec = AttentionSpec(horizon, segment_length or None, segment_offset, visibility, detach, scale, True)
    return Inputs(q, k, v, memory, piece_start, alibi, offsets, bias, buckets, spec)


def _register(method: Method) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operators dsmr_kernels::<name>_forward and <name>_backward."""
    name = f"dsmr_kernels::{method.name}"

    @torch.library.custom_op(f"{name}_forward", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        if arguments[-1] and arguments[4].shape[2] and in_backward():  # a graph cannot tell whether it has moved on
            raise RuntimeError(MOVED)
        out, lse, _ = _forward(method, _unpack(arguments))
        assert lse is not None
        return out.contiguous(), lse.contiguous()

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor]:
        q, v = arguments[0], arguments[2]
        return q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)

    schema = (
        f"(Tensor grad, Tensor? grad_lse, Tensor out, Tensor lse, bool[4] needs, {_ARGUMENTS}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )

    @torch.library.custom_op(f"{name}_backward", mutates_args=(), schema=schema)
    def backward(
        grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], *arguments: Any
    ) -> tuple[Tensor, ...]:
        inputs = _unpack(arguments)
        result = (out, lse) if method.keeps_result(inputs) else ()
        found = _backward(method, inputs, None, result, grad, grad_lse, Needs(*needs))
        return tuple(grad.new_empty(0) if x is None else x.contiguous() for x in found)

    @backward.register_fake
    def _(
        grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, needs: list[bool], *arguments: Any
    ) -> tuple[Tensor, ...]:
        return tuple(
            x.new_empty(x.shape) if need and x is not None else grad.new_empty(0)
            for need, x in zip(needs, arguments[:4], strict=True)
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:_TENSORS])
        ctx.scalars = inputs[_TENSORS:]

    def differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        needs = [bool(need) for need in ctx.needs_input_grad[:4]]
        grad = torch.zeros_like(out) if grad is None else grad
        found = backward(grad, grad_lse, out, lse, needs, *tensors, *ctx.scalars)
        grads = [x if need else None for need, x in zip(needs, found, strict=True)]
        return *grads, *(None,) * (_TENSORS - 4 + _SCALARS)

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _prepare(method: Method, inputs: Inputs, kind: Alike) -> None:
    """Have calls like this one be `Swift` from now on, if they can be."""
    if inputs.piece_start is None and inputs.alibi is None and inputs.offsets is None and inputs.bias is None:
        assert method.prepare is not None
        prepared = None if inputs.spec.return_lse or kind.negated else method.prepare(inputs)
        kind.swift = False if prepared is None else Swift(method, prepared, kind)


def attention_by(method: Method) -> Callable[[Inputs], tuple[Tensor, Tensor | None]]:
    """`memory_attention` of a backend that computes by `method`."""
    operator = _register(method)

    def memory_attention(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """See `dsmr_kernels.memory_attention`; arguments are taken as checked."""
        if torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:  # an operator drops tangents; what is not compiled can be asked for them
                raise _not_forwards(method.name)
            result = operator(*_pack(inputs))
            return result[0], result[1] if inputs.spec.return_lse else None
        q, k, v, bias = inputs.q, inputs.k, inputs.v, inputs.bias
        if has_tangent(q, k, v, bias, inputs.alibi):
            raise _not_forwards(method.name)
        if not learning(q, k, v, bias):
            out, lse, _ = _forward(method, inputs)
        else:
            inputs = inputs if inputs.recorded else inputs._replace(recorded=True)
            learned = (q, k, v) if bias is None else (q, k, v, bias)
            if torch._C._are_functorch_transforms_active():
                out, lse = _NodeOfTransforms.apply(method, inputs, *learned)
            else:
                wrapped = _of_transforms(q) or _of_transforms(k) or _of_transforms(v) or bias is not None
                result = (_Node.apply if wrapped else _apply)(method, inputs, *learned)
                out, lse = result if inputs.spec.return_lse else (result, None)
        if method.prepare is not None and inputs.alike is not None and inputs.alike.swift is None:
            _prepare(method, inputs, inputs.alike)
        return out, lse if inputs.spec.return_lse else None

    return memory_attention
