"""`DSMR_CHECK=1`: the oracle beside the backend that serves, on a sample of the calls of a real run.

Of every kind of call (backend, shapes, dtypes, options) the first is looked at, and then one in `EVERY`: the reference
computes two corners of it again in float64, the first row and KV head and the last, since rows and heads do not depend
on each other, and what the backend gave must keep the rule of `dsmr_kernels.tolerance`. Where a backward may follow,
the backend is called once more, for gradients of q, k and v into these corners. A long call is looked at in its first
tokens. Nothing is looked at while a graph is captured or compiled, inside `torch.func`, or of the reference itself.
"""

import math
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends import reference
from dsmr_kernels.memory import in_backward
from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Inputs
from dsmr_kernels.tolerance import assert_within_rule

EVERY = 100
SCORES = 1 << 23  # that the oracle writes out at most for a corner, in float64

every = EVERY if os.environ.get("DSMR_CHECK") == "1" else 0
"""How often a kind of call is looked at, once it has been; 0: never. What the environment said on import."""
_calls: dict[tuple[Any, ...], int] = {}
Corner = tuple[slice, slice, slice]  # of rows, query heads and KV heads


class DisagreementError(RuntimeError):
    """A backend's result lies further from the oracle's than the tolerance rule allows."""


def _due(module: ModuleType, q: Tensor, *kind: Any) -> bool:
    """Whether this call is one to look at; counts it."""
    if module is reference or torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return False
    if q.device.type == "meta" or 0 in q.shape or in_backward():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    key = (module.__name__, str(q.device), *kind)
    before = _calls.get(key, 0)
    _calls[key] = before + 1
    return before % every == 0


def _kind(x: Any) -> Any:
    """What of an argument makes a call one of another kind."""
    if isinstance(x, Ring):
        return (*map(_kind, x.storage()), x.retention)
    return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x


def _corners(q: Tensor, kv_heads: int) -> Iterator[Corner]:
    group = q.shape[1] // kv_heads
    for row, head in dict.fromkeys(((0, 0), (q.shape[0] - 1, kv_heads - 1))):
        yield slice(row, row + 1), slice(head * group, (head + 1) * group), slice(head, head + 1)


def _ring(memory: Ring, rows: slice, kv: slice) -> Ring:
    stored = {id(x) for x in memory.storage()}
    parts: dict[str, Any] = {name: x[rows, kv] if id(x) in stored else x[rows] for name, x in memory.tensors().items()}
    return Ring(**parts, room=memory.room)


def _tokens(inputs: Inputs) -> int:
    """So many of the first queries does the oracle look at."""
    queries, before = inputs.q.shape[2], inputs.k.shape[2] - inputs.q.shape[2]
    before += 0 if inputs.memory is None else inputs.memory.capacity
    most = SCORES * inputs.k.shape[1] // inputs.q.shape[1]  # n * (before + n) of them
    return max(1, min(queries, (math.isqrt(before * before + 4 * most) - before) // 2))


def _part(inputs: Inputs, corner: Corner, count: int) -> Inputs:
    """The call of one corner and its first `count` queries."""
    rows, heads, kv = corner
    tokens = inputs.k.shape[2] - inputs.q.shape[2] + count
    return inputs._replace(
        q=inputs.q[rows, heads, :count],
        k=inputs.k[rows, kv, :tokens],
        v=inputs.v[rows, kv, :tokens],
        memory=None if inputs.memory is None else _ring(inputs.memory, rows, kv),
        piece_start=None if inputs.piece_start is None else inputs.piece_start[rows, :tokens],
        alibi=None if inputs.alibi is None else inputs.alibi[heads],
        offsets=None if inputs.offsets is None else inputs.offsets[rows],
        bias=None if inputs.bias is None else inputs.bias[heads],
        alike=None,
    )


def _exactly(part: Inputs) -> Inputs:
    bias = None if part.bias is None else part.bias.double()
    return part._replace(q=part.q.double(), k=part.k.double(), v=part.v.double(), bias=bias)


def _differentiated(attention: Callable[..., Any], inputs: Inputs, grad: Tensor, **how: Any) -> dict[str, Tensor]:
    """out, and the gradients that the gradient of out gives q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with torch.enable_grad():
        out, _ = attention(inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2]), **how)
        found = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), found, strict=True))}


def hold(
    who: str, found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """`DisagreementError` unless what was found keeps the rule; what is no number by the oracle must be none."""
    for name, right in exact.items():
        none = ~right.isfinite()
        if bool((found[name].isfinite() & none).any()):
            raise DisagreementError(f"DSMR_CHECK: {who}: {name} is a number where the oracle has none")
        found[name], plain[name], exact[name] = (x.masked_fill(none, 0.0) for x in (found[name], plain[name], right))
    try:
        assert_within_rule(who, found, plain, exact, dtype)
    except AssertionError as error:
        raise DisagreementError(f"DSMR_CHECK: {error}, by the oracle at one row and KV head") from None


def attention(module: ModuleType, inputs: Inputs, out: Tensor, lse: Tensor | None) -> None:
    """Hold the results of `module.memory_attention(inputs)` against the oracle's, if it is their turn."""
    q, k = inputs.q, inputs.k
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, inputs.v))
    if not _due(module, q, learning, *map(_kind, inputs[:9]), inputs.spec._replace(segment_offset=0, scale=0.0)):
        return
    who, count = f"backend {_name(module)!r}, memory_attention", _tokens(inputs)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        grad, gradients = torch.zeros_like(out), {}
        if learning:  # nothing comes from tokens that the oracle does not look at
            draw = torch.Generator(q.device).manual_seed(0)
            grad[:, :, :count].normal_(generator=draw)
            gradients = _differentiated(module.memory_attention, inputs, grad)
        for corner in _corners(q, k.shape[1]):
            rows, heads, kv = corner
            part = _part(inputs, corner, count)
            part = part._replace(spec=part.spec._replace(return_lse=lse is not None and inputs.spec.return_lse))
            exact, plain, found = {}, {}, {"out": out[rows, heads, :count]}
            exact["out"], exact_lse = reference.memory_attention(_exactly(part))
            plain["out"], plain_lse = reference.memory_attention(part, work=q.dtype)
            if exact_lse is not None and plain_lse is not None and lse is not None:
                exact["lse"], plain["lse"], found["lse"] = exact_lse, plain_lse, lse[rows, heads, :count]
            if learning:
                g, tokens = grad[rows, heads, :count], part.k.shape[2]
                exact |= _differentiated(reference.memory_attention, _exactly(part), g.double())
                plain |= _differentiated(reference.memory_attention, part, g, work=q.dtype)
                found["dq"] = gradients["dq"][rows, heads, :count]
                found |= {name: gradients[name][rows, kv, :tokens] for name in ("dk", "dv")}
            hold(who, found, plain, exact, q.dtype)


def decoding(module: ModuleType, q: Tensor, memory: Ring, *rest: Any, out: Tensor) -> None:
    """Hold what `module.decode_attention(q, memory, *rest)` gave against the oracle, if it is its turn."""
    if not _due(module, q, *map(_kind, (q, memory, *rest[:-1]))):
        return
    visible, alibi, sinks, bias, buckets, scale = rest
    decode: Callable[..., Tensor] = reference.decode_attention
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for rows, heads, kv in _corners(q, memory.kv_heads):
            of_heads = [None if x is None else x[heads] for x in (alibi, sinks, bias)]
            given: tuple[Any, ...] = (
                _ring(memory, rows, kv),
                None if visible is None else visible[rows],
                *of_heads,
                buckets,
                scale,
            )
            exact = {"out": decode(q[rows, heads].double(), *given)}
            plain = {"out": decode(q[rows, heads], *given, work=q.dtype)}
            who = f"backend {_name(module)!r}, decode_attention"
            hold(who, {"out": out[rows, heads]}, plain, exact, q.dtype)


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]
