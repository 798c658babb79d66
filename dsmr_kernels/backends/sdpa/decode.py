"""Attention of the newest tokens over the ring, where it lies: a slot's age tells who sees it."""

import torch
from torch import Tensor

from dsmr_kernels.memory import KVMemory


def decode_attention(
    q: Tensor, memory: KVMemory, visible: Tensor | None, alibi_slopes: Tensor | None, scale: float
) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    batch, heads, new, dim = q.shape
    kv_heads, capacity = memory.kv_heads, memory.capacity
    work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
    # The age of each slot, 1 for the newest token; the ring itself stays where it lies.
    age = (memory.position[:, None] - 1 - torch.arange(capacity, device=q.device)).remainder(capacity) + 1  # [B, C]
    younger = torch.arange(new, 0, -1, device=q.device)[:, None]  # [n, 1]: query i sees no slot younger than its own
    oldest = memory.length if visible is None else torch.minimum(visible, memory.length)
    seen = (age[:, None] >= younger) & (age <= oldest[:, None])[:, None]  # [B, n, C]
    wide = torch.promote_types(work, torch.float32)
    bias = torch.zeros(seen.shape, dtype=wide, device=q.device).masked_fill_(~seen, -torch.inf)[:, None, None]
    group = heads // kv_heads
    if alibi_slopes is not None:
        distance = age[:, None] - younger  # [B, n, C]
        bias = bias - alibi_slopes.to(wide).view(kv_heads, group, 1, 1) * distance[:, None, None]
    # Grouped heads share their keys: a group's queries are stacked, [B, Hkv, G * n, D]. PyTorch's kernel keeps the
    # scores in float32 whatever the dtype of q.
    bias = bias.expand(-1, -1, group, -1, -1).flatten(2, 3)
    grouped = q.to(work).reshape(batch, kv_heads, group * new, dim)
    k, v = memory.values(work)
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, scale=scale)
    return out.reshape(batch, heads, new, dim).to(q.dtype)
