"""A new token's attention read as bags of rows is what the oracle computes, wherever the ring stands."""

import pytest
import torch

from dsmr_kernels import KVMemory, decode_attention
from dsmr_kernels.backends.sdpa.bags import BLOCK, BagAttention, Indices, fast_bags, serves

pytestmark = pytest.mark.skipif(not fast_bags(), reason="this processor has no compiled kernels for bags")

DIM = 8
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003, torch.int8: 1e-5}


def errors(dtype: torch.dtype, capacity: int, group: int, heard: int, tokens: int) -> list[float]:
    """Of `tokens` steps behind `heard` tokens, against the oracle over the same memory; it sees 1 to all slots."""
    generator = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    memory = KVMemory.empty(2, 2, capacity, DIM, dtype=dtype)
    for storage in (memory.k, memory.v) if memory.k_scale is None else (memory.k_scale, memory.v_scale):
        storage.fill_(torch.nan)  # what is not held takes no part
    if heard:
        stored = torch.float32 if dtype == torch.int8 else dtype
        memory.append(made(2, 2, heard, DIM).to(stored), made(2, 2, heard, DIM).to(stored))
    bags, found = BagAttention(memory, Indices()), []
    for position in range(heard, heard + tokens):
        q, k, v = made(2, 2 * group, DIM), made(2, 2, DIM), made(2, 2, DIM)
        bags.write(memory, k, v, position)
        memory.position.add_(1)
        memory.length.add_(1).clamp_(max=capacity)
        held = int(memory.length[0])
        sees = 1 + position * 7 % held
        out = bags(q.view(4, group, DIM), memory, position + 1, sees, DIM**-0.5).view(2, 2 * group, 1, DIM)
        visible = torch.full((2,), sees, dtype=torch.int32)
        exact = memory.to(dtype=torch.float64)
        wanted = decode_attention(q.double()[:, :, None], exact, visible=visible, backend="reference")
        found.append(float((out - wanted).abs().max()))
    return found


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("capacity", [5, BLOCK, 2 * BLOCK + 3])
def test_every_step_is_what_the_oracle_says_past_every_wrap(dtype, group, capacity):
    young = errors(dtype, capacity, group, 0, 12)
    old = errors(dtype, capacity, group, 3 * capacity - 4, 2 * BLOCK + 40 if capacity > BLOCK else 40)
    assert max(young + old) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", ALLOWED)
def test_neither_the_default_dtype_nor_the_default_device_matters(dtype):
    expected = errors(dtype, 5, 2, 3, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            memory = KVMemory.empty(2, 2, 5, DIM, dtype=dtype, device="cpu")
            one = torch.ones(2, 2, DIM, dtype=torch.float32, device="cpu")
            bags = BagAttention(memory, Indices())
            bags.write(memory, one, one, 0)
            out = bags(torch.ones(4, 2, DIM, dtype=torch.float32, device="cpu"), memory, 1, 1, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32
    assert torch.allclose(out, torch.ones(4, 2, DIM))
    assert errors(dtype, 5, 2, 3, 8) == expected


def test_what_bags_cannot_read_is_not_given_to_them():
    assert serves(KVMemory.empty(1, 1, 4, DIM))
    assert not serves(KVMemory.empty(1, 1, 0, DIM))
    assert not serves(KVMemory.empty(1, 1, 4, DIM, dtype=torch.float64))
    assert not serves(KVMemory.empty(1, 1, 4, DIM, retention="uniform", room=2))
    assert not serves(KVMemory.empty(1, 1, 4, 6, dtype=torch.int8))  # no place for a float32 behind six bytes


@pytest.mark.parametrize("dtype", ALLOWED)
def test_bags_made_in_inference_mode_are_written_to_outside_of_it(dtype):
    memory, one = KVMemory.empty(1, 2, 5, DIM, dtype=dtype), torch.ones(1, 2, DIM)
    with torch.inference_mode():
        bags = BagAttention(memory, Indices())
    with torch.no_grad():
        bags.write(memory, one, one, 0)
        assert torch.allclose(bags(torch.ones(2, 1, DIM), memory, 1, 1, 1.0), torch.ones(2, 1, DIM))
