"""Forward by PyTorch's flash kernel: over memory, earlier tokens and the run itself apart, merged by log-sum-exp."""

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.sdpa.plan import Group, sources_of

# Private to PyTorch, but the only way to the log-sum-exp; without it, `blocks` serves.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
AVAILABLE = _FLASH is not None


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
