"""Decoding the newest tokens: the definition, slot by slot, and the same numbers as a whole call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_kernels import KVMemory, available_backends, decode_attention, memory_attention
from dsmr_kernels.cases import filled_memory
from dsmr_kernels.costing.cost import memory_capacity
from dsmr_kernels.tolerance import error

every = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])


def defined(
    q: torch.Tensor,
    memory: KVMemory,
    visible: list[int],
    scale: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Query i of n sees the newest visible - (n - 1 - i) of the slots that are not newer than itself, row by row."""
    batch, heads, new, dim = q.shape
    k, v, _ = memory.ordered()
    out = torch.empty_like(q)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // memory.kv_heads)
            for i in range(new):
                own = memory.capacity - new + i
                slots = torch.arange(memory.capacity - min(visible[b], int(memory.length[b])), own + 1)
                scores = k[b, kv, slots] @ q[b, h, i] * (dim**-0.5 if scale is None else scale)
                if alibi_slopes is not None:
                    scores = scores - alibi_slopes[h].to(q.dtype) * (own - slots)
                out[b, h, i] = scores.softmax(0) @ v[b, kv, slots]
    return out


@every
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_decode_is_its_definition(backend: str, data: st.DataObject) -> None:
    """Over the whole argument space: 1 to 16 tokens, wrapped and part-full rows, limits, grouped heads, ALiBi."""
    draw = data.draw
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    capacity = draw(st.integers(1, 40))
    new = draw(st.integers(1, min(16, capacity)))
    dim = draw(st.sampled_from([1, 7, 8]))
    seen = draw(st.lists(st.integers(new, 100), min_size=batch, max_size=batch))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    memory = filled_memory(batch, kv_heads, capacity, dim, seen, dtype=torch.float64, generator=generator)
    q = torch.randn(batch, kv_heads * group, new, dim, generator=generator, dtype=torch.float64)
    limits = draw(st.none() | st.lists(st.integers(new, 120), min_size=batch, max_size=batch))
    options = {
        "scale": draw(st.none() | st.just(0.3)),
        "alibi_slopes": torch.rand(kv_heads * group, generator=generator) if draw(st.booleans()) else None,
    }
    visible = None if limits is None else torch.tensor(limits, dtype=torch.int32)
    out = decode_attention(q, memory, visible=visible, backend=backend, **options)
    assert error(out, defined(q, memory, limits or [capacity] * batch, **options)) < 1e-12


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("new", [1, 5, 16])
def test_low_precision_stays_within_its_rounding(backend: str, new: int, dtype: torch.dtype) -> None:
    memory = filled_memory(2, 2, 33, 16, [90, 20], dtype=dtype)
    q = torch.randn(2, 6, new, 16).to(dtype)
    slopes = torch.rand(6)
    exact = defined(q.double(), memory.to(dtype=torch.float64), [30, 18], alibi_slopes=slopes)
    visible = torch.tensor([30, 18], dtype=torch.int32)
    out = decode_attention(q, memory, visible=visible, alibi_slopes=slopes, backend=backend)
    assert out.dtype == dtype
    assert error(out, exact) < 8 * torch.finfo(dtype).eps * float(memory.v.abs().max())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_gradient_is_promised(backend: str, dtype: torch.dtype) -> None:
    memory = filled_memory(1, 1, 8, 16, [9], dtype=dtype)
    q = torch.randn(1, 1, 1, 16).to(dtype).requires_grad_()
    with pytest.raises(RuntimeError, match=r"gives no gradient, but q requires one: call it under torch.no_grad\(\)"):
        decode_attention(q, memory, backend=backend)
    with torch.no_grad():
        assert not decode_attention(q, memory, backend=backend).requires_grad


@every
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("visible", [30, 33])  # two stretches of the ring, and the whole of it
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_rows_in_step_in_every_dtype(
    backend: str, stored: torch.dtype, visible: int, alibi: bool, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one age take a way of their own."""
    if not flash:
        monkeypatch.setattr("dsmr_kernels.backends.sdpa.flash.AVAILABLE", False)
    memory = filled_memory(2, 2, 33, 16, [90, 90]).to(dtype=stored)
    dtype = torch.float32 if stored == torch.int8 else stored
    q = torch.randn(2, 6, 1, 16).to(dtype)
    slopes = torch.rand(6) if alibi else None
    exact = defined(q.double(), memory.to(dtype=torch.float64), [visible] * 2, alibi_slopes=slopes)
    seen = torch.full((2,), visible, dtype=torch.int32)
    out = decode_attention(q, memory, visible=seen, alibi_slopes=slopes, backend=backend)
    assert out.dtype == dtype
    assert error(out, exact) < 8 * torch.finfo(dtype).eps * 4


@every
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("alibi", [False, True])
def test_token_by_token_equals_one_whole_call(backend: str, visibility: str, new: int, alibi: bool) -> None:
    """Append, then decode with as many slots visible as the rule says, past many turns of the ring."""
    length, horizon, tokens = 8, 12, 104
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, tokens, 6, dtype=torch.float64) for heads in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0]) if alibi else None
    whole = memory_attention(
        q, k, v, horizon=horizon, segment_length=length, visibility=visibility, alibi_slopes=slopes, backend="reference"
    )
    capacity = memory_capacity(horizon, length, visibility)
    if visibility == "sliding":
        capacity += new - 1  # the oldest of several new tokens sees further back than the newest
    memory = KVMemory.empty(2, 2, capacity, 6, dtype=torch.float64)
    for first in range(0, tokens, new):
        step = slice(first, first + new)
        memory.append(k[:, :, step], v[:, :, step])
        if visibility == "segment":
            sees = horizon + first % length + new
            out = decode_attention(
                q[:, :, step],
                memory,
                visible=torch.full((2,), sees, dtype=torch.int32),
                alibi_slopes=slopes,
                backend=backend,
            )
            assert error(out, whole[:, :, step]) < 1e-12
        else:  # all queries of a call share the oldest slot, so a sliding window holds for the first of them
            out = decode_attention(
                q[:, :, step],
                memory,
                visible=torch.full((2,), horizon + new, dtype=torch.int32),
                alibi_slopes=slopes,
                backend=backend,
            )
            assert error(out[:, :, 0], whole[:, :, first]) < 1e-12


@every
def test_rows_of_different_age_are_independent(backend: str) -> None:
    memory = filled_memory(3, 1, 10, 4, [37, 3, 10], dtype=torch.float64)
    q = torch.randn(3, 2, 2, 4, dtype=torch.float64)
    together = decode_attention(q, memory, backend=backend)
    for b in range(3):
        row = slice(b, b + 1)
        alone = KVMemory(memory.k[row], memory.v[row], memory.length[row], memory.position[row])
        assert error(together[row], decode_attention(q[row], alone, backend=backend)) < 1e-12


@every
def test_slots_that_are_not_held_weigh_nothing(backend: str) -> None:
    """A reset row keeps its old storage; nothing of it may shine through, however large it is."""
    memory = filled_memory(2, 1, 8, 4, [30, 30])
    memory.k.mul_(1e4)
    memory.reset(torch.tensor([True, False]))
    k = torch.randn(2, 1, 1, 4)
    memory.append(k, k)
    out = decode_attention(torch.randn(2, 1, 1, 4), memory, backend=backend)
    assert error(out[0], k[0]) < 1e-6


@every
def test_the_memory_is_read_only(backend: str) -> None:
    memory = filled_memory(2, 2, 8, 4, [30, 5])
    before = memory.clone()
    decode_attention(torch.randn(2, 4, 3, 4), memory, backend=backend)
    for name in ("k", "v", "length", "position"):
        assert torch.equal(getattr(memory, name), getattr(before, name))


def count(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@every
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": torch.zeros(2, 4, 16)}, ValueError, "q must have shape"),
        ({"q": torch.zeros(2, 4, 0, 16)}, ValueError, "q must hold 1 to 16 new tokens, .* got 0"),
        ({"q": torch.zeros(2, 4, 17, 16)}, ValueError, "q must hold 1 to 16 new tokens, .* got 17"),
        ({"memory": KVMemory.empty(2, 2, 0, 16)}, ValueError, "no more than the memory's capacity of 0, got 1"),
        ({"memory": None}, TypeError, "memory must be a KVMemory that holds the new tokens, got None"),
        ({"memory": torch.zeros(3)}, TypeError, "memory must be a KVMemory that holds the new tokens, got Tensor"),
        ({"memory": KVMemory.empty(2, 2, 9, 8)}, ValueError, r"= \(2, 2, 16\) to fit q and k, got \(2, 2, 8\)"),
        ({"q": torch.zeros(2, 3, 1, 16)}, ValueError, "the 3 query heads must be a multiple of the KV heads, got 2"),
        ({"q": torch.zeros(2, 4, 1, 16).double()}, TypeError, "memory.k must have the dtype of q, torch.float64"),
        ({"visible": torch.ones(2)}, ValueError, r"visible must be int32 of shape \(2,\), got torch.float32"),
        ({"visible": count(1)}, ValueError, r"visible must be int32 of shape \(2,\), got torch.int32 of shape \(1,\)"),
        ({"visible": 3}, ValueError, r"visible must be int32 of shape \(2,\), got 3"),
        ({"visible": count(1, 0)}, ValueError, "each of the 1 new tokens must see itself, but row 1 sees 0"),
        ({"q": torch.zeros(2, 4, 4, 16)}, ValueError, "each of the 4 new tokens must see itself, but row 1 sees 3"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be a floating tensor of shape \(4,\)"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of .*, got 'cudnn'"),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected(backend: str, change: dict, kind: type, message: str) -> None:
    memory = filled_memory(2, 2, 20, 16, [50, 3])
    arguments = {"q": torch.zeros(2, 4, 1, 16), "memory": memory, "backend": backend}
    with pytest.raises(kind, match=message):
        decode_attention(**(arguments | change))


@every
@pytest.mark.parametrize("new", [1, 3])
def test_autocast_does_not_change_what_a_step_computes_in(backend: str, new: int) -> None:
    memory, q = filled_memory(2, 2, 40, 16, [50, 9]), torch.randn(2, 4, new, 16)
    expected = decode_attention(q, memory, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decode_attention(q, memory, backend=backend), expected)
