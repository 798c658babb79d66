"""Storing a new token for decoding: rotary positions and ring writes, alike in every backend."""

import pytest
import torch
from torch import Tensor

from dsmr.model.positions import Rotary, token_positions
from dsmr_kernels import KVMemory, append_rotated, available_backends, memory_attention
from dsmr_kernels.cases import filled_memory

every = pytest.mark.parametrize(
    "backend", [name for name in available_backends() if name != "triton" or not torch.cuda.is_available()]
)
FIELDS = ("k", "v", "length", "position")


def by_hand(q: Tensor, k: Tensor, v: Tensor, memory: KVMemory) -> Tensor:
    """The oracle: the model's positions, then `KVMemory.append`."""
    place = Rotary.at(token_positions(memory.position, q.shape[2], None), q.shape[3], 10000.0)
    memory.append(place(k).to(memory.dtype), v.to(memory.dtype))
    return place(q).to(memory.dtype)


def new_tokens(batch: int, group: int, new: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as a fused projection gives them: parts of one tensor (batch, tokens, features)."""
    features = torch.randn(batch, new, (group + 2) * 2 * dim).to(dtype)
    heads = features.unflatten(-1, (-1, dim)).transpose(1, 2)
    return list(heads.split([2 * group, 2, 2], 1))


@pytest.mark.slow
@every
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("group", "new", "dim"), [(1, 1, 16), (3, 5, 40), (2, 16, 64), (1, 2, 128)])
def test_a_step_is_positions_and_append_bit_for_bit(
    backend: str, dtype: torch.dtype, stored: torch.dtype, group: int, new: int, dim: int
) -> None:
    memory = filled_memory(3, 2, 20, dim, [137, 0, 19], dtype=stored)
    other, counters = memory.clone(), (memory.length, memory.position)
    for _ in range(3):
        tokens = new_tokens(3, group, new, dim, dtype)
        place = Rotary.at(token_positions(memory.position, new, None), dim, 10000.0)
        q = append_rotated(*tokens, memory, cos=place.cos, sin=place.sin, backend=backend)
        assert torch.equal(q, by_hand(*tokens, other))
        for name in FIELDS:
            assert torch.equal(getattr(memory, name), getattr(other, name))
    assert memory.length is counters[0]  # in place: a captured graph goes on with the same tensors
    assert memory.position is counters[1]


@every
@pytest.mark.parametrize("dim", [16, 17])
def test_without_angles_it_only_stores(backend: str, dim: int) -> None:
    memory = filled_memory(2, 2, 9, dim, [30, 4])
    other = memory.clone()
    q, k, v = new_tokens(2, 2, 2, dim, torch.float32)
    assert torch.equal(append_rotated(q, k, v, memory, backend=backend), q)
    other.append(k, v)
    for name in FIELDS:
        assert torch.equal(getattr(memory, name), getattr(other, name))


@every
def test_a_pending_backward_keeps_the_memory_that_it_saw(backend: str) -> None:
    memory = filled_memory(1, 2, 8, 16, [20])
    before = memory.clone()
    q, k, v = new_tokens(1, 1, 2, 16, torch.float32)
    grads = []
    for ring in (memory, before):
        leaf = q.clone().requires_grad_()
        out = memory_attention(leaf, k, v, ring, horizon=4, visibility="sliding", backend=backend)
        if ring is memory:
            with torch.no_grad():
                append_rotated(q, k, v, memory, backend=backend)
        out.sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert int(memory.position) == int(before.position) + 2


@every
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, ValueError, "q must have shape"),
        ({"memory": None}, TypeError, "memory must be a KVMemory, got NoneType"),
        ({"memory": KVMemory.empty(1, 2, 9, 16)}, ValueError, r"= \(2, 2, 16\) to fit q and k, got \(1,"),
        ({"memory": KVMemory.empty(2, 3, 9, 16)}, ValueError, "the 4 query heads must be a multiple of the KV heads"),
        ({"k": torch.zeros(2, 2, 2, 16)}, ValueError, r"k must have shape .* = \(2, 2, 1, 16\), got \(2, 2, 2, 16\)"),
        ({"v": torch.zeros(2, 2, 1, 16).half()}, TypeError, "v must have the dtype of q, torch.float32, got"),
        ({"memory": KVMemory.empty(2, 2, 0, 16)}, ValueError, "no more than the memory's capacity of 0, got 1"),
        ({"cos": torch.zeros(2, 1, 1, 8)}, ValueError, r"sin must be float32 of shape .*\(2, 1, 1, 8\), got None"),
        ({"cos": torch.zeros(2, 1, 1, 4), "sin": torch.zeros(2, 1, 1, 8)}, ValueError, "cos must be float32 of shape"),
        ({"q": torch.zeros(2, 4, 1, 16, requires_grad=True)}, RuntimeError, "append_rotated is for inference"),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected(backend: str, change: dict, kind: type, message: str) -> None:
    tokens = {name: torch.zeros(2, heads, 1, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    arguments = tokens | {"memory": filled_memory(2, 2, 20, 16, [50, 3]), "backend": backend}
    with pytest.raises(kind, match=message):
        append_rotated(**(arguments | change))


def test_an_odd_head_has_no_halves_to_turn() -> None:
    q, angle = torch.zeros(1, 1, 1, 17), torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="q must have an even head_dim to be turned, got 17"):
        append_rotated(q, q, q, KVMemory.empty(1, 1, 4, 17), cos=angle, sin=angle)


def test_a_memory_in_another_dtype_counts_for_itself() -> None:
    """`to` must not share counters that a step advances in place."""
    memory = filled_memory(1, 1, 8, 4, [20])
    other = memory.to(dtype=torch.float64)
    append_rotated(*(torch.zeros(1, 1, 1, 4),) * 3, memory)
    assert int(memory.position) == 21
    assert int(other.position) == 20


@every
def test_counters_of_any_stride_advance(backend: str) -> None:
    memory = filled_memory(4, 2, 9, 16, [30, 4, 7, 11])
    other = KVMemory(*(x[::2].clone() for x in (memory.k, memory.v, memory.length, memory.position)))
    strided = KVMemory(*(x[::2] for x in (memory.k, memory.v, memory.length, memory.position)))
    tokens = new_tokens(2, 1, 2, 16, torch.float32)
    append_rotated(*tokens, strided, backend=backend)
    other.append(*tokens[1:])
    for name in FIELDS:
        assert torch.equal(getattr(strided, name), getattr(other, name)), name
    assert memory.position.tolist() == [32, 4, 9, 11]
