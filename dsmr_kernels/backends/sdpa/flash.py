"""PyTorch's flash kernel, over each source apart, merged by log-sum-exp; a call's forward by it: over memory, earlier
tokens and the run itself."""

import math

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, Source, sources_of
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Inputs

# Private to PyTorch, but the only way to the log-sum-exp; without it, `blocks` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
AVAILABLE = _FLASH is not None


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What PyTorch's public operator checks before it calls this kernel; called past that, it would read elsewhere."""
    return (
        AVAILABLE
        and q.device.type == k.device.type == v.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.shape[3] == k.shape[3] == v.shape[3]
        and all(x.stride(3) == 1 or x.shape[3] == 1 for x in (q, k, v))
    )


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One source. q (b, Hq, n, D), k and v (b, Hkv, s, D) -> out (b, Hq, n, D), lse (b, Hq, n)."""
    assert _FLASH is not None
    if k.shape[2] == 1 and not math.isfinite(k.sum().item()):
        return _one_key(q, k, v, scale)
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


def _one_key(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` to one key, whose score the kernel would take for a masked one if it is NaN."""
    grouped = q.unflatten(1, (k.shape[1], -1))  # [b, Hkv, G, n, D]
    lse = (grouped * k.unsqueeze(2)).sum(-1) * scale
    out = v.unsqueeze(2) + (lse * 0.0).unsqueeze(-1)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).float()


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """The output over two sources, float32, from those over each and their log-sum-exps; may be written over `out`.

    Each softmax is over one source: the two are weighed by their shares of the common sum of exponentials. In place,
    since in a small call fresh pages cost as much as the arithmetic; rounded once, at the end.
    """
    return out.float().lerp_(more.float(), torch.sigmoid(more_lse - lse).unsqueeze_(-1))


def _stretch(tensor: Tensor, rows: slice, start: int, stop: int) -> Tensor:
    """Some rows and tokens of (B, H, n, ...), without a slice where it is all of them: a small call notices each."""
    if rows.stop - rows.start != tensor.shape[0]:
        tensor = tensor[rows]
    return tensor if stop - start == tensor.shape[2] else tensor.narrow(2, start, stop - start)


def _sides(inputs: Inputs, rows: slice, source: Source) -> list[Tensor]:
    """Keys and values of a source, in q's dtype."""
    memory = inputs.memory
    if memory is None or not source.memory:
        return [_stretch(x, rows, source.start, source.stop) for x in (inputs.k, inputs.v)]
    found = [_stretch(x, rows, source.start, source.stop) for x in (memory.k, memory.v)]
    if memory.k_scale is None or memory.v_scale is None:
        return [x.to(inputs.q.dtype) for x in found]
    scales = [_stretch(x, rows, source.start, source.stop) for x in (memory.k_scale, memory.v_scale)]
    return [dequantise(x, scale, inputs.q.dtype) for x, scale in zip(found, scales, strict=True)]


def forward(inputs: Inputs, plan: list[Group]) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call; lse only if it is wanted."""
    q, k, v, memory, scale, wants_lse = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec.scale, inputs.wants_lse
    shift = k.shape[2] - q.shape[2]
    whole = len(plan) == 1 and len(plan[0].runs) == 1
    if not whole:
        out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
    for group in plan:
        rows = group.rows
        for run in group.runs:
            block = _stretch(q, rows, run.start - shift, run.stop - shift)
            keys, values = (_stretch(x, rows, run.start, run.stop) for x in (k, v))
            o, l = attend(block, keys, values, True, scale)
            sources = sources_of(run.floor, run.start, group.position, memory.capacity if memory else 0, False)
            for source in sources:
                keys, values = _sides(inputs, rows, source)
                past_o, past_l = attend(block, keys, values, False, scale)
                o = merge(o, l, past_o, past_l)
                if wants_lse or source is not sources[-1]:
                    l = torch.logaddexp(past_l, l)
            if whole:
                return o.to(q.dtype), l if wants_lse else None
            here = (rows, slice(None), slice(run.start - shift, run.stop - shift))
            out[here], lse[here] = o, l
    return out, lse if wants_lse else None
