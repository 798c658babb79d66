"""Forward by PyTorch's flash kernel: over memory, earlier tokens and the run itself apart, merged by log-sum-exp."""

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, sources_of
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.memory import KVMemory

# Private to PyTorch, but the only way to the log-sum-exp; without it, `products` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def serves(q: Tensor, alibi_slopes: Tensor | None, spec: AttentionSpec) -> bool:
    """The flash kernel returns the log-sum-exp that the merge needs, and in float32 nothing of ours is faster."""
    return (
        _FLASH is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and alibi_slopes is None
        and spec.visibility == "segment"
    )


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


def forward(
    q: Tensor, k: Tensor, v: Tensor, memory: KVMemory | None, plan: list[Group], spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call; lse only if the call asks for it."""
    shift = k.shape[2] - q.shape[2]
    whole = len(plan) == 1 and len(plan[0].runs) == 1
    out = q.new_empty(0 if whole else q.shape)
    lse = q.new_empty(0 if whole or not spec.return_lse else q.shape[:3])
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
                o = torch.lerp(o, past_o, torch.sigmoid(past_l - l).unsqueeze(-1))
                l = torch.logaddexp(l, past_l)
            if whole:
                return o, l if spec.return_lse else None
            out[here] = o
            if spec.return_lse:
                lse[here] = l
    return out, lse if spec.return_lse else None
