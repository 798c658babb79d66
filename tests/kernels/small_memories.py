"""What the tests of memories as values share: small memories, calls over them, and the backends to try."""

import pytest
import torch

from dsmr_kernels import KVMemory, MemorySnapshot, available_backends, memory_attention

BACKENDS = [name for name in available_backends() if name != "triton" or not torch.cuda.is_available()]
every = pytest.mark.parametrize("backend", BACKENDS)
reentrant = pytest.mark.parametrize("reentrant", [True, False])


def heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def new(*sizes: int) -> list[torch.Tensor]:
    """Tensors of so many heads and tokens; a third number says how many tensors."""
    many, tokens, count = (*sizes, 1)[:3]
    return [heads(2, many, tokens, 16) for _ in range(count)]


def a_memory(seen: int = 9, capacity: int = 6, batch: int = 2, dtype: torch.dtype = torch.float32) -> KVMemory:
    memory = KVMemory.empty(batch, 2, capacity, 16, dtype=dtype)
    if seen:
        memory.append(
            heads(batch, 2, seen, 16).to(torch.float32 if dtype == torch.int8 else dtype), heads(batch, 2, seen, 16)
        )
    return memory


def attend(memory: KVMemory | MemorySnapshot | None, q: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    out = memory_attention(q, q[:, :2], q[:, 2:], memory, horizon=6, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


def strided(x: torch.Tensor) -> torch.Tensor:
    """Channels first, as a convolution gives them: the last dimension is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)
