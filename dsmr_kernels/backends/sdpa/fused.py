"""Forward and backward by PyTorch's flash kernel, over memory, earlier tokens and the run itself apart.

The forward merges the parts by log-sum-exp. Since the backward of a part depends on the others only through the common
log-sum-exp and output, it runs part by part too; a part that takes no gradient needs only its share of dQ. The backward
is for float32.
"""

import math

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.sdpa.plan import Group, past_of, sources_of
from dsmr_kernels.backends.sdpa.workers import in_parallel

# Private to PyTorch, but the only way to the log-sum-exp; without them, `blocks` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
AVAILABLE = _FLASH is not None and _FLASH_BACKWARD is not None
BLOCK_QUERIES, BLOCK_KEYS = 512, 1024
LOG2E = math.log2(math.e)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One source. q (b, Hq, n, D), k and v (b, Hkv, s, D) -> out (b, Hq, n, D), lse (b, Hq, n)."""
    assert _FLASH is not None
    queries, group = q.shape[2], q.shape[1] // k.shape[1]
    if group == 1:
        return _FLASH(q, k, v, 0.0, causal, scale=scale)
    grouped = q.unflatten(1, (-1, group))
    if not causal:  # no order among the queries: stack the group's along the query axis, against the same keys
        out, lse = _FLASH(grouped.flatten(2, 3), k, v, 0.0, False, scale=scale)
        return out.unflatten(2, (group, queries)).flatten(1, 2), lse.unflatten(2, (group, queries)).flatten(1, 2)
    parts = [_FLASH(grouped[:, :, g], k, v, 0.0, True, scale=scale) for g in range(group)]
    return torch.stack([out for out, _ in parts], 2).flatten(1, 2), torch.stack([lse for _, lse in parts], 2).flatten(
        1, 2
    )


def forward(inputs: Inputs, plan: list[Group]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the whole call."""
    q, k, v, memory, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec
    shift = k.shape[2] - q.shape[2]
    whole = len(plan) == 1 and len(plan[0].runs) == 1
    out = q.new_empty(0 if whole else q.shape)
    lse = q.new_empty(0 if whole else q.shape[:3], dtype=torch.float32)
    for group in plan:
        for run in group.runs:
            here = (group.rows, slice(None), slice(run.start - shift, run.stop - shift))
            block = q[here]
            rows = (group.rows, slice(None), slice(run.start, run.stop))
            o, l = _flash(block, k[rows], v[rows], True, spec.scale)
            for source in sources_of(run.floor, run.start, group.position, memory.capacity if memory else 0, False):
                sides = (memory.k, memory.v) if source.memory and memory else (k, v)
                rows = (group.rows, slice(None), slice(source.start, source.stop))
                past_o, past_l = _flash(block, sides[0][rows], sides[1][rows], False, spec.scale)
                # Each softmax is over one source: weigh the two by their shares of the common sum of exponentials.
                share = torch.sigmoid(past_l - l).unsqueeze(-1)
                o = torch.lerp(o.float(), past_o.float(), share)  # rounded once, at the end
                l = torch.logaddexp(l, past_l)
            if whole:
                return o.to(q.dtype), l
            out[here], lse[here] = o, l
    return out, lse


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One part's dq (b, Hq, n, D), dk and dv (b, Hkv, s, D), given the common out and lse."""
    assert _FLASH_BACKWARD is not None
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return _FLASH_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    parts = [
        _FLASH_BACKWARD(
            *(x[:, g::group] for x in (grad, q)), k, v, *(x[:, g::group] for x in (out, lse)), 0.0, causal, scale=scale
        )
        for g in range(group)
    ]
    dq, dk, dv = zip(*parts, strict=True)
    return torch.stack(dq, 2).flatten(1, 2), sum(dk[1:], dk[0]), sum(dv[1:], dv[0])


def _dq_alone(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, grad: Tensor, scale: float) -> Tensor:
    """One part's dq (b, Hq, n, D), where keys and values take no gradient: three of the five products. float32 only."""
    batch, kv_heads, keys = k.shape[:3]

    def stacked(x: Tensor) -> Tensor:  # (b, Hq, n, ...) -> (b * Hkv, group * n, ...)
        return x.reshape(batch * kv_heads, -1, x.shape[-1])

    offset, delta = stacked(lse.unsqueeze(-1)) * -LOG2E, stacked(delta.unsqueeze(-1))  # base 2: three times as fast
    block, above = stacked(q), stacked(grad)
    rows = block.shape[1]
    dq = torch.zeros(block.shape)

    def job(head: int) -> None:
        side_k, side_v = k[head // kv_heads, head % kv_heads], v[head // kv_heads, head % kv_heads]
        scratch = block.new_empty(2, min(rows, BLOCK_QUERIES), min(keys, BLOCK_KEYS))
        for begin in range(0, rows, BLOCK_QUERIES):
            some = slice(begin, min(begin + BLOCK_QUERIES, rows))
            for first in range(0, keys, BLOCK_KEYS):
                ks, vs = side_k[first : first + BLOCK_KEYS], side_v[first : first + BLOCK_KEYS]
                weights, dweights = scratch[:, : some.stop - begin, : ks.shape[0]]
                torch.addmm(offset[head, some], block[head, some], ks.T, alpha=scale * LOG2E, out=weights)
                weights.exp2_()
                torch.mm(above[head, some], vs.T, out=dweights)
                dq[head, some].addmm_(weights.mul_(dweights.sub_(delta[head, some])), ks)

    in_parallel(job, range(batch * kv_heads), worthwhile=True)
    return dq.mul_(scale).view(q.shape)


def backward(
    inputs: Inputs, plan: list[Group], out: Tensor, lse: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the whole call, given its output and log-sum-exp."""
    q, k, v, spec = inputs.q, inputs.k, inputs.v, inputs.spec
    memory = None if inputs.memory is None else (inputs.memory.k, inputs.memory.v)
    shift, scale = k.shape[2] - q.shape[2], spec.scale
    delta = (grad.float() * out.float()).sum(-1)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
    for group in plan:
        for run in group.runs:
            here = (group.rows, slice(None), slice(run.start - shift, run.stop - shift))
            block, above = q[here], grad[here]
            rows = (group.rows, slice(None), slice(run.start, run.stop))
            dq_run, dk_run, dv_run = _flash_backward(block, k[rows], v[rows], out[here], lse[here], above, True, scale)
            dk[rows] += dk_run
            dv[rows] += dv_run
            for source, taking in past_of(run, group, memory[0].shape[2] if memory else 0, spec.detach_segments):
                sides = memory if source.memory and memory else (k, v)
                rows = (group.rows, slice(None), slice(source.start, source.stop))
                ks, vs = sides[0][rows], sides[1][rows]
                if taking:
                    part, dk_run, dv_run = _flash_backward(block, ks, vs, out[here], lse[here], above, False, scale)
                    dk[rows] += dk_run
                    dv[rows] += dv_run
                else:
                    part = _dq_alone(block, ks, vs, lse[here], delta[here], above, scale)
                dq_run = dq_run + part
            dq[here] = dq_run
    return dq, dk.to(k.dtype), dv.to(k.dtype)
