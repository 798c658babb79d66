"""The oracle: attention as the definitions say it, with the mask written out; any device, any dtype, any derivative.

Slow and simple on purpose. Every other backend is tested against this one, in float64. A token whose value is not
finite makes NaN of what sees it, and of nothing else.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsmr_kernels.autocast import without_autocast
from dsmr_kernels.memory import MOVED, in_backward
from dsmr_kernels.ring import Ring
from dsmr_kernels.rotary import append_rotated
from dsmr_kernels.spec import Inputs
from dsmr_kernels.visibility import lowest_visible, segment_of

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]


def unsupported(q: Tensor, v_head_dim: int) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    return None


@torch.library.custom_op("dsmr_kernels::first_computation", mutates_args=())
def first_computation(q: Tensor) -> Tensor:
    """q itself, as a copy; in a recomputation a sentence. A compiled call over a live memory passes through it."""
    if in_backward():
        raise RuntimeError(MOVED)
    return q.clone()


first_computation.register_fake(torch.empty_like)
first_computation.register_autograd(lambda ctx, grad: grad)


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _marked(scores: Tensor, values: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (..., n, m) that are NaN where a value (..., m, D) is seen that is not finite, and zeros for such values:
    a weight of 0 would not silence them where they are not seen."""
    broken = ~values.isfinite().all(-1)
    return scores.masked_fill(broken.unsqueeze(-2) & seen, torch.nan), values.masked_fill(broken.unsqueeze(-1), 0.0)


def _moved(
    scores: Tensor, distance: Tensor, alibi: Tensor | None, bias: Tensor | None, buckets: Tensor | None
) -> Tensor:
    """Scores (..., Hq, n, m) with what their keys' distances (n, m) add; distances that nobody sees may be negative."""
    if alibi is not None:
        scores = scores - alibi.to(scores.dtype)[:, None, None] * distance
    if bias is not None and buckets is not None:
        column = buckets[distance.clamp(0, buckets.shape[0] - 1)]
        scores = scores + bias.to(scores.dtype)[:, column]
    return scores


def memory_attention(inputs: Inputs, work: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """See `dsmr_kernels.memory_attention`; arguments are taken as checked.

    `work` is the dtype that it computes in: by default at least float32. In q's own low precision it is what a user
    would write by hand, and so the yardstick of the project's tolerances.
    """
    with without_autocast(inputs.q.device.type):
        return _attend(inputs, work or _work_dtype(inputs.q))


def _attend(inputs: Inputs, work: torch.dtype) -> tuple[Tensor, Tensor | None]:
    q, k, v, memory, piece_start, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.piece_start, inputs.spec
    if torch.compiler.is_compiling() and inputs.live and forward_ad._current_level < 0:  # an operator drops tangents
        q = first_computation(q)
    queries, tokens, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    p = torch.arange(tokens - queries, tokens, device=q.device)  # [T]
    j = torch.arange(tokens, device=q.device)  # [S]
    offset = spec.segment_offset if inputs.offsets is None else inputs.offsets[:, None]
    low = lowest_visible(
        p,
        horizon=spec.horizon,
        segment_length=spec.segment_length,
        segment_offset=offset,
        visibility=spec.visibility,
        piece_start=None if piece_start is None else piece_start[:, tokens - queries :],
    )  # [B or 1, T]

    keys, values, held = k, v, torch.ones(1, tokens, dtype=torch.bool, device=q.device)
    if memory is not None:
        past_k, past_v, past_held = memory.ordered()
        keys, values = torch.cat([past_k.detach().to(k.dtype), k], 2), torch.cat([past_v.detach().to(v.dtype), v], 2)
        held = torch.cat([past_held, held.expand(past_held.shape[0], -1)], 1)
        j = torch.cat([torch.arange(-memory.capacity, 0, device=q.device), j])
    seen = (j >= low[:, :, None]) & (j <= p[:, None]) & held[:, None, :]  # [B or 1, T, C + S]
    # The pairs whose key takes a gradient when segments are detached: [B or 1, 1, T, C + S]
    own = segment_of(p, spec.segment_length, offset).unsqueeze(-1) == segment_of(
        j, spec.segment_length, offset
    ).unsqueeze(-2)
    own = own.unsqueeze(-3)

    qw = q.to(work)
    kw, vw = (x.to(work).repeat_interleave(group, 1) for x in (keys, values))
    scores = qw @ kw.mT  # [B, Hq, T, C + S]
    if spec.detach_segments:
        scores = torch.where(own, scores, qw @ kw.detach().mT)
    scores = _moved(scores * spec.scale, p[:, None] - j, inputs.alibi, inputs.bias, inputs.buckets)
    scores, vw = _marked(scores.masked_fill(~seen[:, None], -torch.inf), vw, seen[:, None])
    weights = scores.softmax(-1)
    if spec.detach_segments:
        out = (weights * own) @ vw + (weights * ~own) @ vw.detach()
    else:
        out = weights @ vw
    lse = scores.logsumexp(-1).to(torch.promote_types(work, torch.float32)) if spec.return_lse else None
    return out.to(q.dtype), lse


def decode_attention(
    q: Tensor,
    memory: Ring,
    visible: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    scale: float,
    work: torch.dtype | None = None,
) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked, `work` is as in `memory_attention`."""
    work = work or _work_dtype(q)
    with without_autocast(q.device.type):
        new, group = q.shape[2], q.shape[1] // memory.kv_heads
        keys, values, held = memory.ordered()
        kw, vw = (x.to(work).repeat_interleave(group, 1) for x in (keys, values))
        j = torch.arange(-memory.capacity, 0, device=q.device)
        p = torch.arange(-new, 0, device=q.device)
        oldest = -(memory.length if visible is None else visible).to(torch.int64)[:, None, None]
        seen = (j >= oldest) & (j <= p[:, None]) & held[:, None, :]  # [B, n, C]
        scores = _moved((q.to(work) @ kw.mT) * scale, p[:, None] - j, alibi_slopes, bias, buckets)
        scores, vw = _marked(scores.masked_fill(~seen[:, None], -torch.inf), vw, seen[:, None])
        if sinks is not None:  # one more key, without a value
            logits = sinks.to(work).view(-1, 1, 1).expand(*scores.shape[:3], 1)
            return (torch.cat([scores, logits], -1).softmax(-1)[..., :-1] @ vw).to(q.dtype)
        return (scores.softmax(-1) @ vw).to(q.dtype)
