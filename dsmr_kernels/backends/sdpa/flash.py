"""PyTorch's flash kernel, over each source apart, merged by log-sum-exp; a call's forward by it: over memory, earlier
tokens and the run itself. A short call is over before more than the fewest operators have paid: nothing is copied or
cut that can be taken whole."""

import math

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Part, Plan, Source, parts_of, sources_of
from dsmr_kernels.backends.sdpa.workers import in_parallel, shares
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Inputs
from dsmr_kernels.visibility import Run

# Private to PyTorch, but the only way to the log-sum-exp; without it, `products` serves.
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


def plain(inputs: Inputs) -> bool:
    """Whether what a query sees needs no mask but the causal one of its own segment, and no bias."""
    return inputs.alibi is None and inputs.bias is None and inputs.spec.visibility == "segment"


def serves(inputs: Inputs) -> bool:
    """Whether `forward` can serve a call."""
    return plain(inputs) and fits(inputs.q, inputs.k, inputs.v)


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


def forward(inputs: Inputs, plan: Plan, work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call, computed in `work`; lse only if it is wanted."""
    q, kv_heads = inputs.q, inputs.k.shape[1]
    count, groups = shares(plan.pairs * q.shape[1], q.shape[3]), plan.groups
    if count == 1 and len(groups) == 1 and len(groups[0].runs) == 1:  # a small call notices each operator: no copy
        part = Part(groups[0], groups[0].rows, slice(0, kv_heads))
        out, lse = _attend_run(inputs, part, groups[0].runs[0], work)
        return _in(q.dtype, out), lse if inputs.wants_lse else None
    parts = [part for group in groups for part in parts_of(group, kv_heads, count, q.shape[0] * kv_heads)]
    found = [q.new_empty((*q.shape[:3], inputs.v.shape[3]))]
    if inputs.wants_lse:
        found.append(q.new_empty(q.shape[:3], dtype=torch.float32))
    shift, members = inputs.k.shape[2] - q.shape[2], q.shape[1] // kv_heads

    def fill(part: Part) -> None:
        heads = slice(part.heads.start * members, part.heads.stop * members)
        for run in part.group.runs:
            here = (part.rows, heads, slice(run.start - shift, run.stop - shift))
            for whole, own in zip(found, _attend_run(inputs, part, run, work), strict=False):
                whole[here] = own

    in_parallel(fill, parts)
    return found[0], found[1] if inputs.wants_lse else None


def _attend_run(inputs: Inputs, part: Part, run: Run, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of a part's run: out is in float32 where sources are merged, lse of all of them where it is wanted."""
    q, k, memory, scale = inputs.q, inputs.k, inputs.memory, inputs.spec.scale
    shift, members = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    heads = slice(part.heads.start * members, part.heads.stop * members)
    block = _cut(q, part.rows, heads, run.start - shift, run.stop - shift, work)
    out, lse = attend(block, *_sides(inputs, part, Source(False, run.start, run.stop, 0), work), True, scale)
    capacity = memory.capacity if memory else 0
    sources = sources_of(run.floor, run.start, part.group.position, capacity, False)
    for source in sources:
        more, more_lse = attend(block, *_sides(inputs, part, source, work), False, scale)
        out = merge(out, lse, more, more_lse)
        if inputs.wants_lse or source is not sources[-1]:
            lse = torch.logaddexp(more_lse, lse)
    return out, lse


def _sides(inputs: Inputs, part: Part, source: Source, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """The part's keys and values of a source, in the dtype that is computed in."""
    memory, here = inputs.memory, (part.rows, part.heads, source.start, source.stop)
    if memory is None or not source.memory:
        return _cut(inputs.k, *here, work), _cut(inputs.v, *here, work)
    if memory.k_scale is None or memory.v_scale is None:
        return _cut(memory.k, *here, work), _cut(memory.v, *here, work)
    slots = (part.rows, part.heads, slice(source.start, source.stop))
    k, v = ((x[slots], scale[slots]) for x, scale in ((memory.k, memory.k_scale), (memory.v, memory.v_scale)))
    return dequantise(*k, work), dequantise(*v, work)


def _cut(x: Tensor, rows: slice, heads: slice, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """x[rows, heads, start:stop] in a dtype; x itself where that is all of it, since a view takes as long as a small
    operator."""
    if x.shape[:3] != (rows.stop - rows.start, heads.stop - heads.start, stop - start):
        x = x[rows, heads, start:stop]
    return _in(dtype, x)


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
