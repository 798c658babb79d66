"""Forward and backward by PyTorch's flash kernel, over memory, earlier tokens and the run itself apart.

The forward merges the parts by log-sum-exp. Since the backward of a part depends on the others only through the common
log-sum-exp and output, it runs part by part too; a part that takes no gradient needs only its share of dQ.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.sdpa.plan import Group, Source, sources_of
from dsmr_kernels.visibility import Run

# Private to PyTorch, but the only way to the log-sum-exp; without them, `products` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
# A head with more scores than this is served faster by `products`: in bfloat16 always, in float32 in the backward.
SMALL_ELEMENTS = 131_072


def _small(inputs: Inputs) -> bool:
    q, spec, memory = inputs.q, inputs.spec, inputs.memory
    past = min(spec.horizon, memory.capacity if memory is not None else 0)
    queries = min(q.shape[2], spec.segment_length or q.shape[2])
    return queries * (queries + past) * (q.shape[1] // inputs.k.shape[1]) <= SMALL_ELEMENTS


def serves(inputs: Inputs) -> bool:
    """Whether this way can serve the forward, and is the faster one."""
    q, spec = inputs.q, inputs.spec
    if _FLASH is None or _FLASH_BACKWARD is None or q.device.type != "cpu":
        return False
    if inputs.alibi is not None or spec.visibility != "segment":
        return False
    return q.dtype == torch.float32 or (q.dtype == torch.bfloat16 and _small(inputs))


def serves_backward(inputs: Inputs) -> bool:
    """Whether this way is the faster one for the backward too; it then wants the forward's output and log-sum-exp."""
    return serves(inputs) and _small(inputs)


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
                o = torch.lerp(o, past_o, torch.sigmoid(past_l - l).unsqueeze(-1).to(o.dtype))
                l = torch.logaddexp(l, past_l)
            if whole:
                return o, l
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
    """One part's dq in float32, where keys and values take no gradient: three of the five products."""
    kv_heads, tokens, dim = k.shape[1:]

    def stacked(x: Tensor) -> Tensor:
        return x.float().reshape(x.shape[0] * kv_heads, -1, x.shape[-1])

    k, v = (x.float().reshape(-1, tokens, dim) for x in (k, v))
    weights = torch.baddbmm(stacked(-lse.unsqueeze(-1)), stacked(q), k.mT, alpha=scale).exp_()
    dweights = torch.baddbmm(stacked(-delta.unsqueeze(-1)), stacked(grad), v.mT)
    return torch.bmm(weights.mul_(dweights), k).mul_(scale).view(q.shape)


def _parts(run: Run, group: Group, capacity: int, detach: bool) -> list[tuple[Source, bool]]:
    """The stretches of a run's past, and whether each takes a gradient."""
    first = max(run.own if detach else 0, run.floor, 0)
    parts = []
    for source in sources_of(run.floor, run.start, group.position, capacity, False):
        if source.memory or source.stop <= first:
            parts.append((source, False))
            continue
        if source.start < first:
            parts.append((Source(False, source.start, first, 0), False))
        parts.append((Source(False, max(first, source.start), source.stop, 0), True))
    return parts


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
            for source, taking in _parts(run, group, memory[0].shape[2] if memory else 0, spec.detach_segments):
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
