"""How long a `memory_attention` call of given sizes takes here: ceilings are worked out from it, and checked."""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.api import memory_attention
from dsmr_kernels.costing.cost import Call
from dsmr_kernels.costing.timing import seconds_of
from dsmr_kernels.memory import KVMemory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def timed_attention(call: Call, device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Fastest seconds of a `memory_attention` call of these sizes: of its forward, and of its backward."""
    q, grad = (_normal(call, call.heads, call.queries, device, dtype) for _ in range(2))
    k, v = (_normal(call, call.kv_heads, call.size, device, dtype) for _ in range(2))
    memory = None
    if call.held:
        memory = KVMemory.empty(call.batch, call.kv_heads, call.held, call.head_dim, dtype=dtype, device=device)
        memory.append(*(_normal(call, call.kv_heads, call.held, device, dtype) for _ in range(2)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    options: dict[str, Any] = {
        name: getattr(call, name)
        for name in ("horizon", "segment_length", "segment_offset", "visibility", "detach_segments")
    }

    def forward() -> Tensor:
        out = memory_attention(q, k, v, memory, **options)
        assert isinstance(out, Tensor)
        return out

    out = forward()
    backward = min(seconds_of(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True), device, rounds=rounds))
    with torch.no_grad():
        return min(seconds_of(forward, device, rounds=rounds)), backward


def _normal(call: Call, heads: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(call.batch, heads, tokens, call.head_dim, device=device).to(dtype)
