"""PyTorch's flash kernel, over each source apart, merged by log-sum-exp; a call's forward by it: over memory, earlier
tokens and the run itself. A short call is over before more than the fewest operators have paid: nothing is copied or
cut that can be taken whole."""

import functools
import math

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Part, Plan, Source, cut, parts_of, sources_of
from dsmr_kernels.backends.sdpa.workers import in_parallel, shares
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Inputs
from dsmr_kernels.visibility import Run

# Private to PyTorch, but the only way to the log-sum-exp; without it, `products` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
AVAILABLE = _FLASH is not None
# The kernel makes the scores of its causal edge in blocks of up to 512 keys, whole: of 512 queries twice the half that
# they see. On a thread of its own a call of so many queries is cut into one for every `EDGE_QUERIES`, each with the
# keys that it sees and a mask: with 8 heads of 64 1.1 times as fast for 256 queries, 1.35 for 512, 1.1 for 1,024. With
# fewer than `CUT` there is little to save, with more its own blocks do; calls of fewer than `WORTH` numbers in q times
# queries are over too soon; and all threads on one call would wait for each other more often. (A mask is added: where a
# score beyond float32 is hidden, above 3e38, the result is NaN, and products make the call.)
CUT, EDGE_QUERIES, WORTH = range(192, 1025), 128, 6 << 20


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


class Overlooked(Exception):
    """The kernel has taken scores that are seen for masked ones: the call is not its."""


def _looked_at(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What the kernel gave, if it has overlooked nothing.

    A row whose scores are all -inf, or all NaN and few, sees nothing for it, and has zeros and a log-sum-exp of 0: as
    much as a key of its own would, where sources are merged. Rows of zeros that are right are taken for such, too.
    """
    if not lse.all() and not out[lse == 0].any(-1).all():
        raise Overlooked
    return out, lse


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One source, seen whole. q (b, Hq, n, D), k and v (b, Hkv, s, D) -> out (b, Hq, n, D), lse (b, Hq, n).

    Raises:
        Overlooked: if other operators must make the call.
    """
    assert _FLASH is not None
    queries, group = q.shape[2], q.shape[1] // k.shape[1]
    if group == 1:
        return _looked_at(*_FLASH(q, k, v, 0.0, False, scale=scale))
    # No order among the queries: stack the group's along the query axis, against the same keys.
    out, lse = _looked_at(*_FLASH(q.unflatten(1, (-1, group)).flatten(2, 3), k, v, 0.0, False, scale=scale))
    return out.unflatten(2, (group, queries)).flatten(1, 2), lse.unflatten(2, (group, queries)).flatten(1, 2)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float, alone: bool) -> tuple[Tensor, Tensor]:
    """Each query sees its own key, and those before. q (b, Hq, n, D), k and v (b, Hkv, n, D) -> as `attend`.

    `alone`: the call has one thread to itself.
    """
    group = q.shape[1] // k.shape[1]
    if group == 1:
        return _edge(q, k, v, scale, alone)
    # A group's queries have an order, so they are not stacked: each KV head becomes a row of `group` heads, which all
    # read its keys where they lie.
    rows, kv_heads = k.shape[:2]
    k, v = (x.reshape(rows * kv_heads, 1, *x.shape[2:]).expand(-1, group, -1, -1) for x in (k, v))
    out, lse = _edge(q.reshape(rows * kv_heads, group, *q.shape[2:]), k, v, scale, alone)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _edge(q: Tensor, k: Tensor, v: Tensor, scale: float, alone: bool) -> tuple[Tensor, Tensor]:
    """`attend_causally` where each query head has its own keys, cut where that pays."""
    assert _FLASH is not None
    queries = q.shape[2]
    if not alone or queries not in CUT or q.numel() * queries < WORTH or q.dtype != torch.float32:
        return _looked_at(*_FLASH(q, k, v, 0.0, True, scale=scale))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for start, stop in cut(0, queries, EDGE_QUERIES):
        first = CUT.stop - start  # of the table's columns: that of the call's first key
        mask = _seen()[: stop - start, first : first + stop] if start else None
        out[:, :, start:stop], lse[:, :, start:stop] = _FLASH(
            q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], 0.0, mask is None, attn_mask=mask, scale=scale
        )
    return _looked_at(out, lse)


@functools.cache
def _seen() -> Tensor:
    """What is added to the scores of some queries with the `CUT.stop` keys before them and their own: 0 or -inf."""
    shape = EDGE_QUERIES, CUT.stop + EDGE_QUERIES
    with torch.inference_mode(False):  # a table for every call, whoever comes first
        return torch.full(shape, -math.inf, dtype=torch.float32, device="cpu").triu_(CUT.stop + 1)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> Tensor:
    """The output over two sources, float32, from those over each and their log-sum-exps; may be written over `out`.

    Each softmax is over one source: the two are weighed by their shares of the common sum of exponentials. In place,
    since in a small call fresh pages cost as much as the arithmetic; rounded once, at the end.
    """
    return out.float().lerp_(more.float(), torch.sigmoid(more_lse - lse).unsqueeze_(-1))


def forward(inputs: Inputs, plan: Plan, work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call, computed in `work`; lse only if it is wanted.

    Raises:
        Overlooked: if another engine must make the call.
    """
    q, kv_heads = inputs.q, inputs.k.shape[1]
    count, groups = shares(plan.pairs * q.shape[1], q.shape[3]), plan.groups
    alone = count > 1 or torch.get_num_threads() == 1
    if count == 1 and len(groups) == 1 and len(groups[0].runs) == 1:  # a small call notices each operator: no copy
        part = Part(groups[0], groups[0].rows, slice(0, kv_heads))
        out, lse = _attend_run(inputs, part, groups[0].runs[0], work, alone)
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
            for whole, own in zip(found, _attend_run(inputs, part, run, work, alone), strict=False):
                whole[here] = own

    in_parallel(fill, parts)
    return found[0], found[1] if inputs.wants_lse else None


def _attend_run(inputs: Inputs, part: Part, run: Run, work: torch.dtype, alone: bool) -> tuple[Tensor, Tensor]:
    """(out, lse) of a part's run: out is in float32 where sources are merged, lse of all of them where it is wanted."""
    q, k, memory, scale = inputs.q, inputs.k, inputs.memory, inputs.spec.scale
    shift, members = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
    heads = slice(part.heads.start * members, part.heads.stop * members)
    block = _cut(q, part.rows, heads, run.start - shift, run.stop - shift, work)
    own = _sides(inputs, part, Source(False, run.start, run.stop, 0), work)
    out, lse = attend_causally(block, *own, scale, alone)
    capacity = memory.capacity if memory else 0
    sources = sources_of(run.floor, run.start, part.group.position, capacity, False)
    for source in sources:
        more, more_lse = attend(block, *_sides(inputs, part, source, work), scale)
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
