"""Attention of the newest tokens over the ring, where it lies: a slot's age tells who sees it."""

import torch
from torch import Tensor

from dsmr_kernels.memory import KVMemory


def decode_attention(q: Tensor, memory: KVMemory, visible: Tensor, alibi_slopes: Tensor | None, scale: float) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    batch, heads, new, dim = q.shape
    kv_heads, capacity = memory.kv_heads, memory.capacity
    work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
    # The age of each slot, 1 for the newest token; the ring itself stays where it lies.
    age = (memory.position[:, None] - 1 - torch.arange(capacity, device=q.device)).remainder(capacity) + 1  # [B, C]
    younger = torch.arange(new, 0, -1, device=q.device)[:, None]  # [n, 1]: query i sees no slot younger than its own
    oldest = torch.minimum(visible, memory.length)
    seen = (age[:, None] >= younger) & (age <= oldest[:, None])[:, None]  # [B, n, C]
    grouped = q.to(work).reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * n, D]
    scores = torch.matmul(grouped, memory.k.to(work).mT).mul_(scale).view(batch, kv_heads, -1, new, capacity)
    if alibi_slopes is not None:
        distance = age[:, None] - younger  # [B, n, C]
        slopes = alibi_slopes.to(torch.promote_types(work, torch.float32)).view(kv_heads, -1, 1, 1)
        scores = scores - slopes * distance[:, None, None]
    scores = scores.masked_fill_(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).to(work).flatten(2, 3)
    return torch.matmul(weights, memory.v.to(work)).view(batch, heads, new, dim).to(q.dtype)
