"""Memory in int8: half the bytes of bfloat16, the values that it holds the same for every backend."""

from pathlib import Path

import pytest
import torch

from dsmr.model.config import DSMRConfig
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr_kernels import KVMemory, append_rotated, available_backends, decode_attention, memory_attention
from dsmr_kernels.cases import filled_memory, random_case
from dsmr_kernels.quantise import dequantise, quantise
from dsmr_kernels.testing import run
from dsmr_kernels.tolerance import error

every = pytest.mark.parametrize(
    "backend", [name for name in available_backends() if name != "triton" or not torch.cuda.is_available()]
)


def in_int8(seen: list[int], capacity: int = 40, kv_heads: int = 2, dim: int = 16) -> KVMemory:
    return filled_memory(len(seen), kv_heads, capacity, dim, seen).to(dtype=torch.int8)


def as_float(memory: KVMemory, dtype: torch.dtype = torch.float64) -> KVMemory:
    return memory.to(dtype=torch.float32).to(dtype=dtype)


def test_the_error_is_at_most_half_a_step_of_127() -> None:
    x = torch.randn(3, 2, 9, 24) * torch.logspace(-20, 20, 9)[:, None]
    stored, scale = quantise(x)
    assert stored.dtype == torch.int8
    assert bool((stored.abs().amax(-1) == 127).all())
    assert bool(((dequantise(stored, scale) - x).abs() <= 0.5001 * scale[..., None]).all())


def test_vectors_of_zeros_stay_zeros_and_nothing_is_divided_by_nothing() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [1e38, 0.0]])
    stored, scale = quantise(x)
    values = dequantise(stored, scale)
    assert torch.equal(values[:2], torch.zeros(2, 2))
    assert bool(values.isfinite().all())
    least = torch.finfo(torch.float32).tiny  # the least scale of which there is a reciprocal
    stored, scale = quantise(torch.tensor([[127 * least, 0.0]]))
    assert (stored.tolist(), scale.tolist()) == ([[127, 0]], [least])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_append_stores_what_quantise_gives_past_many_turns(dtype: torch.dtype) -> None:
    memory, plain = KVMemory.empty(2, 2, 7, 8, dtype=torch.int8), KVMemory.empty(2, 2, 7, 8, dtype=dtype)
    for tokens in (3, 1, 9, 5, 7, 2):
        k, v = (torch.randn(2, 2, tokens, 8).to(dtype) for _ in range(2))
        memory.append(k, v)
        plain.append(k, v)
        for found, exact in zip(memory.ordered()[:2], plain.ordered()[:2], strict=True):
            assert torch.equal(found, dequantise(*quantise(exact)))
            assert found.dtype == torch.float32


def test_half_the_bytes_of_bfloat16() -> None:
    bytes_of = {dtype: KVMemory.empty(2, 2, 100, 64, dtype=dtype).nbytes for dtype in (torch.bfloat16, torch.int8)}
    assert bytes_of[torch.int8] == 2 * 2 * 2 * 100 * (64 + 4)
    assert bytes_of[torch.int8] / bytes_of[torch.bfloat16] == pytest.approx(0.5, abs=0.04)


def test_reset_clone_and_conversion_take_the_scales_along() -> None:
    memory = in_int8([50, 9])
    copy = memory.clone()
    memory.append(*(100 * torch.randn(2, 2, 30, 16) for _ in range(2)))
    assert not torch.equal(copy.k_scale, memory.k_scale)
    again = as_float(copy, torch.float32).to(dtype=torch.int8)
    assert torch.equal(again.k, copy.k)
    assert torch.allclose(again.v_scale, copy.v_scale, rtol=1e-6)
    assert copy.to(dtype=torch.int8) is copy
    copy.reset(torch.tensor([True, False]))
    assert copy.length.tolist() == [0, 9]


@pytest.mark.slow
@every
@pytest.mark.parametrize("options", [{}, {"visibility": "sliding"}, {"segment_length": 5, "alibi": True}], ids=str)
def test_attention_reads_what_is_stored_forward_and_backward(backend: str, options: dict) -> None:
    """Against the oracle on the values that the int8 memory stands for."""
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(4)
    case = random_case(queries=11, seen=[57, 13], horizon=30, **options)
    case.memory = case.memory.to(dtype=torch.int8)
    exact = case.to(torch.float64)
    exact.memory = as_float(case.memory)
    found, wanted = run(case, backend), run(exact, "reference")
    for name in found:
        assert error(found[name], wanted[name]) < 2e-5, name


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("group", "new", "dim", "seen"),
    [(1, 1, 16, [150, 9]), (1, 1, 16, [150, 150]), (2, 1, 16, [150, 150]), (2, 5, 40, [150, 9]), (8, 3, 64, [150, 9])],
)
def test_decode_reads_what_is_stored(
    backend: str, dtype: torch.dtype, group: int, new: int, dim: int, seen: list[int]
) -> None:
    memory = in_int8(seen, capacity=90, dim=dim)
    memory.v_scale.mul_(1e-4)  # small values must not underflow in float16
    q, visible = (
        torch.randn(2, 2 * group, new, dim).to(dtype),
        torch.tensor([80, 7 if seen[1] == 9 else 80], dtype=torch.int32),
    )
    options = {"visible": visible, "alibi_slopes": torch.rand(2 * group)}
    exact = decode_attention(q.double(), as_float(memory), backend="reference", **options)
    out = decode_attention(q, memory, backend=backend, **options)
    assert out.dtype == dtype
    assert error(out, exact) < 8 * torch.finfo(dtype).eps * float(memory.values(torch.float32)[1].abs().max())


@every
def test_a_step_stores_as_append_does_bit_for_bit(backend: str) -> None:
    memory = in_int8([57, 0], capacity=9)
    other = memory.clone()
    q, k, v = (torch.randn(2, heads, 3, 16) for heads in (4, 2, 2))
    v[0, 0, 1] = 0
    v[0, 0, 2] = 1e-40
    assert torch.equal(append_rotated(q, k, v, memory, backend=backend), q)
    other.append(k, v)
    for name, tensor in other.tensors().items():
        assert torch.equal(getattr(memory, name), tensor), name


def test_a_pending_backward_keeps_what_it_saw() -> None:
    memory = in_int8([57, 13])
    before = memory.clone()
    grads = []
    for ring in (memory, before):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 2, 4, 16, requires_grad=True) for _ in range(3))
        out = memory_attention(q, k, v, ring, horizon=40)
        if ring is memory:
            memory.append(*(100 * torch.randn(2, 2, 9, 16) for _ in range(2)))
        out.sum().backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_leased_scales_are_copied_before_they_are_written() -> None:
    memory = in_int8([57, 13])
    kept, before, view = memory.v_scale, memory.v_scale.clone(), memory.snapshot()
    memory.append(*(100 * torch.randn(2, 2, 9, 16) for _ in range(2)))
    assert torch.equal(kept, before)
    assert not torch.equal(memory.v_scale, before)
    del view


def test_what_does_not_fit_is_named() -> None:
    memory = KVMemory.empty(1, 1, 4, 8, dtype=torch.int8)
    with pytest.raises(TypeError, match=r"k must be of a floating dtype, to be stored in int8, got torch.int8"):
        memory.append(*(torch.zeros(1, 1, 1, 8, dtype=torch.int8),) * 2)


def small_model() -> DSMRModel:
    schedule = "two_scale(layers=2, long=12, short=4, n_long=1)"
    return DSMRModel(DSMRConfig(vocab_size=17, schedule=schedule, d_model=32, n_heads=2, segment_length=8)).eval()


@torch.no_grad()
def test_any_way_of_cutting_a_stream_gives_the_same_logits() -> None:
    model, tokens = small_model(), torch.randint(17, (2, 61))
    whole = model(tokens, model.new_state(2, dtype=torch.int8)).logits
    for sizes in ([1] * 61, [5, 1, 30, 25]):
        state, done = model.new_state(2, dtype=torch.int8), []
        for part in tokens.split(sizes, 1):
            done.append(model(part, state).logits)
        assert error(torch.cat(done, 1), whole) < 1e-4
    exact = model(tokens).logits
    assert 0 < error(whole, exact) < 0.1 * float(exact.abs().max())


@torch.no_grad()
def test_a_state_in_int8_goes_on_after_saving_and_loading(tmp_path: Path) -> None:
    model, tokens = small_model(), torch.randint(17, (1, 40))
    state = model.new_state(1, dtype=torch.int8)
    model(tokens, state)
    state.save(tmp_path / "state.safetensors")
    loaded, taken = DSMRState.load(tmp_path / "state.safetensors"), model.new_state(1, dtype=torch.int8)
    taken.load_state_dict(state.state_dict())
    expected = model(tokens, state).logits
    for other in (loaded, taken):
        assert torch.equal(model(tokens, other).logits, expected)
    with pytest.raises(ValueError, match=r"holds k as torch\.int8"):
        model.new_state(1).load_state_dict(state.state_dict())
