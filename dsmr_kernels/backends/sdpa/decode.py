"""Attention of the newest tokens over the ring, where it lies.

Music is generated one token at a time, all rows in step: then the visible slots are at most two stretches of the ring,
and `StretchAttention` reads just these, with no mask: in float32 by PyTorch's flash kernel over each, merged by
log-sum-exp; with ALiBi, or memories of other dtypes, by batched products into buffers that it keeps. Everything else
(rows of different age, several new tokens, devices whose positions the host should not wait for) takes the whole ring
and masks slots by their age.
"""

import contextlib

import torch
from torch import Tensor

from dsmr_kernels.autocast import without_autocast
from dsmr_kernels.backends.sdpa import flash
from dsmr_kernels.backends.sdpa.masked import ages, held_values
from dsmr_kernels.ring import Ring, ring_slices


class StretchAttention:
    """Attention of one new token a row over stretches of the ring, in q's dtype, float32 or float64, whatever the
    memory's, with scratch that it keeps.

    Shapes: m counts the rows and KV heads, g the query heads of a KV head, n the visible slots.
    """

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}

    def _buffer(self, name: str, like: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """A contiguous tensor of this shape in the scratch called `name`, which grows where it is too small."""
        size = shape[0] * shape[1] * shape[2]
        held = self._scratch.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._scratch[name] = like.new_empty(size + size // 4)
        return held[:size].view(shape)

    def __call__(
        self,
        q: Tensor,
        memory: Ring,
        position: int,
        sees: int,
        scale: float,
        slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        added: Tensor | None = None,
    ) -> Tensor:
        """q (m, g, D), of the token at `position` - 1, which is in `memory` already
        -> (m, g, v_head_dim), new or in scratch: use it before the next call.

        Args:
            sees: how many of the newest slots are visible, the token's own included; all rows hold as many.
            slopes: ALiBi slopes (m, g, 1) in q's dtype.
            sinks: logits (m, g, 1) in q's dtype.
            added: to the scores, (m, g, sees), oldest first.
        """
        m, group = q.shape[:2]
        stretches = ring_slices(position, memory.capacity, -sees, sees)
        plain = slopes is None and sinks is None and added is None and q.dtype == torch.float32
        if plain and flash.fits(q.unsqueeze(0), memory.k, memory.v):
            whole = [(0, sees)] if sees == memory.capacity else stretches  # their order is all one
            with contextlib.suppress(flash.Overlooked):
                return _by_flash(q.view(memory.batch, -1, group, q.shape[2]), memory, whole, scale).view(q.shape)
        k, v = memory.k.flatten(0, 1), memory.v.flatten(0, 1)
        scores = self._buffer("scores", q, (m, group, sees))
        done = 0
        for start, stop in stretches:
            part = scores[:, :, done : done + stop - start]
            torch.baddbmm(part, q, k[:, start:stop].to(q.dtype).mT, beta=0, alpha=scale, out=part)
            if memory.k_scale is not None:
                part *= memory.k_scale.flatten(0, 1)[:, None, start:stop]
            done += stop - start
        if slopes is not None:
            scores.addcmul_(slopes, torch.arange(1 - sees, 1, dtype=q.dtype, device=q.device))
        if added is not None:
            scores += added
        weights = self._buffer("weights", q, (m, group, sees))
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)
        if sinks is not None:  # all weights lose the same share to them
            weights *= torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)
        out = self._buffer("out", q, (m, group, memory.v_head_dim))
        done = 0
        for start, stop in stretches:
            part = weights[:, :, done : done + stop - start]
            if memory.v_scale is not None:
                part *= memory.v_scale.flatten(0, 1)[:, None, start:stop]
            torch.baddbmm(out, part, v[:, start:stop].to(q.dtype), beta=1 if done else 0, out=out)
            done += stop - start
        return out


def _by_flash(q: Tensor, memory: Ring, stretches: list[tuple[int, int]], scale: float) -> Tensor:
    """q (B, Hkv, g, D), all of which see the same slots, in one kernel a stretch."""
    found = [
        flash.attend(q, memory.k[:, :, start:stop], memory.v[:, :, start:stop], scale) for start, stop in stretches
    ]
    return found[0][0] if len(found) == 1 else flash.merge(*found[0], *found[1])


def decode_attention(
    q: Tensor,
    memory: Ring,
    visible: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    buckets: Tensor | None,
    scale: float,
) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    visible = memory.length if visible is None else visible
    batch, heads, new, dim = q.shape
    in_step = _in_step(q, memory, visible)
    if in_step is None:
        with without_autocast(q.device.type):
            return _masked(q, memory, visible, alibi_slopes, sinks, bias, buckets, scale)
    group, work = heads // memory.kv_heads, torch.promote_types(q.dtype, torch.float32)

    def by_head(x: Tensor | None) -> Tensor | None:
        """Something that has an entry (or a row) a query head: (m, g, 1 or n)."""
        if x is None:
            return None
        return x.to(work).view(1, -1, group, x.shape[1] if x.dim() == 2 else 1).expand(batch, -1, -1, -1).flatten(0, 1)

    added = None
    if bias is not None and buckets is not None:
        distance = torch.arange(in_step[1] - 1, -1, -1, device=q.device).clamp_(max=buckets.shape[0] - 1)
        added = by_head(bias[:, buckets[distance]])
    rows = q.to(work).reshape(-1, group, dim)
    out = StretchAttention()(rows, memory, *in_step, scale, by_head(alibi_slopes), by_head(sinks), added)
    return out.view(batch, heads, new, memory.v_head_dim).to(q.dtype)


def _in_step(q: Tensor, memory: Ring, visible: Tensor) -> tuple[int, int] | None:
    """(position, visible slots) that all rows share, where `StretchAttention` can serve the call."""
    known = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if not known or q.shape[2] != 1 or q.shape[0] == 0:
        return None
    positions, counts = memory.position.tolist(), torch.minimum(visible, memory.length).tolist()
    if len(set(counts)) > 1 or len({position % memory.capacity for position in positions}) > 1:
        return None
    return positions[0], counts[0]


def _masked(
    q: Tensor,
    memory: Ring,
    visible: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    learned: Tensor | None,
    buckets: Tensor | None,
    scale: float,
) -> Tensor:
    batch, heads, new, dim = q.shape
    kv_heads = memory.kv_heads
    work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
    age = ages(memory)  # the ring itself stays where it lies
    younger = torch.arange(new, 0, -1, device=q.device)[:, None]  # [n, 1]: query i sees no slot younger than its own
    oldest = torch.minimum(visible, memory.length)
    seen = (age[:, None] >= younger) & (age <= oldest[:, None])[:, None]  # [B, n, C]
    distance = age[:, None] - younger  # [B, n, C]
    wide = torch.promote_types(work, torch.float32)
    bias = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(~seen, -torch.inf)[:, None, None]
    group = heads // kv_heads
    if alibi_slopes is not None:
        bias = bias - alibi_slopes.to(wide).view(kv_heads, group, 1, 1) * distance[:, None, None]
    if learned is not None and buckets is not None:
        columns = buckets[distance.clamp(0, buckets.shape[0] - 1)]
        bias = bias + learned.to(wide)[:, columns].transpose(0, 1).unflatten(1, (kv_heads, group))
    k, v = held_values(memory, age, work)
    # A NaN would outlive both a score of minus infinity and a weight of 0: it is given to those who see it alone.
    broken = ~(k.isfinite().all(-1) & v.isfinite().all(-1))  # [B, Hkv, C]
    k, v = (x.masked_fill(broken.unsqueeze(-1), 0.0) for x in (k, v))
    bias = bias.masked_fill(broken[:, :, None, None] & seen[:, None, None], torch.nan)
    # Grouped heads share their keys: a group's queries are stacked, [B, Hkv, G * n, D]. PyTorch's kernel keeps the
    # scores in float32 whatever the dtype of q.
    bias = bias.expand(-1, -1, group, -1, -1).flatten(2, 3)
    grouped = q.to(work).reshape(batch, kv_heads, group * new, dim)
    if sinks is not None:  # one more key, of zeros, that has its logit for a score and zeros for a value
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        logits = sinks.to(wide).view(1, kv_heads, group, 1).expand(batch, -1, -1, new).reshape(batch, kv_heads, -1, 1)
        bias = torch.cat([bias.expand(-1, kv_heads, -1, -1), logits], -1)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, heads, new, memory.v_head_dim).to(q.dtype)
