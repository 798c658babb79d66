"""What is not finite stays where it is visible: NaN at a query that sees such a token, and at no other."""

import os

import pytest
import torch
from torch import Tensor

from dsmr_kernels import KVMemory, append_rotated, available_backends, decode_attention, memory_attention
from dsmr_kernels.backends.sdpa import flash
from dsmr_kernels.cases import filled_memory, random_case
from dsmr_kernels.quantise import dequantise, quantise

NAN, INF = float("nan"), float("inf")
BACKENDS = [name for name in available_backends() if name != "triton"]  # Triton's has a test of its own
every = pytest.mark.parametrize("backend", available_backends() if not torch.cuda.is_available() else BACKENDS)


def seen_by(case, token: int) -> Tensor:
    """(B, Hq, T): whose result changes if the value of a token of the call (below 0, of the memory) does, by much."""
    q, k, v = case.q.double(), case.k.double(), case.v.double()
    memory = None if case.memory is None else case.memory.to(dtype=torch.float64)
    before = memory_attention(q, k, v, memory, **case.options, backend="reference")
    if token < 0:
        slots = (memory.position + token) % memory.capacity
        for row, slot in enumerate(slots.tolist()):
            memory.v[row, :, slot] += 1e9
    else:
        v[:, :, token] += 1e9
    after = memory_attention(q, k, v, memory, **case.options, backend="reference")
    return ((after - before).abs() > 1e-6).any(-1)


CASES = {
    "segments": {"segment_length": 13, "horizon": 20},
    "one segment": {"horizon": 30},
    "sliding": {"horizon": 9, "visibility": "sliding"},
    "more keys than queries": {"horizon": 40, "queries": 20, "tokens": 33},
    "alibi": {"horizon": 30, "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    "bias": {"horizon": 30, "biased": True},
}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_who_sees_a_broken_token_of_the_call_is_broken(backend: str, name: str, side: str, value: float) -> None:
    if side == "k" and value != NAN:
        value = NAN  # infinite keys are weights of 1 or 0, as the scores go
    case = random_case(seen=[50, 9], **CASES[name])
    for token in (0, 7, case.k.shape[2] - 1):
        seen = seen_by(case, token)
        x = getattr(case, side).clone()
        x[:, :, token, 3] = value
        tensors = {"q": case.q, "k": case.k, "v": case.v, side: x}
        out = memory_attention(*tensors.values(), case.memory, **case.options, backend=backend)
        assert torch.equal(~out.isfinite().all(-1), seen)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_who_sees_a_broken_token_of_the_memory_is_broken(
    backend: str, name: str, side: str, stored: torch.dtype
) -> None:
    case = random_case(seen=[50, 45], **CASES[name])
    for token in (-1, -5, -40):
        seen = seen_by(case, token)
        memory = case.memory.clone()
        for row, slot in enumerate(((memory.position + token) % memory.capacity).tolist()):
            getattr(memory, side)[row, :, slot, 3] = NAN
        out = memory_attention(case.q, case.k, case.v, memory.to(dtype=stored), **case.options, backend=backend)
        assert torch.equal(~out.isfinite().all(-1), seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ["flash", "products"])
def test_every_engine_keeps_it_apart(engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine != "flash":
        monkeypatch.setattr(flash, "fits", lambda *given: False)
    case = random_case(queries=70, horizon=30, segment_length=64, dtype=dtype, seen=[50, 9], kv_heads=4)
    seen = seen_by(case, 40)
    for side in ("k", "v"):
        x = getattr(case, side).clone()
        x[:, :, 40, 3] = NAN
        tensors = {"q": case.q, "k": case.k, "v": case.v, side: x}
        out = memory_attention(*tensors.values(), case.memory, **case.options, backend="sdpa")
        assert torch.equal(~out.isfinite().all(-1), seen)


ALIKE = {"equal_nan": True, "atol": 2e-3, "rtol": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("seen", [None, [5]])
@pytest.mark.parametrize("queries", [1, 2, 5, 12, 40])
def test_a_broken_query_is_broken(queries: int, seen: list[int] | None, dtype: torch.dtype) -> None:
    """Also where it sees so few keys that PyTorch's kernel takes NaN for scores that are masked."""
    case = random_case(batch=1, heads=2, queries=queries, seen=seen, horizon=8, capacity=8, dtype=dtype)
    for token in {0, queries // 2, queries - 1}:
        q = case.q.clone()
        q[:, :, token, 3] = NAN
        out, lse = memory_attention(q, case.k, case.v, case.memory, **case.options, return_lse=True, backend="sdpa")
        wrong = torch.zeros(queries, dtype=torch.bool)
        wrong[token] = True
        assert torch.equal(out.isnan().all(-1), wrong.expand(1, 2, -1))
        assert torch.equal(lse.isnan(), wrong.expand(1, 2, -1))


@pytest.mark.parametrize("value", [NAN, -INF], ids=str)
@pytest.mark.parametrize("held", [1, 2, 3, 15, 16, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_memory_that_is_broken_throughout_is_not_outvoted(backend: str, held: int, value: float) -> None:
    """Nor is one that scores lowest a source of zeros."""
    case = random_case(batch=1, heads=2, kv_heads=2, queries=5, seen=[held], horizon=40, capacity=40)
    case.q.abs_()
    case.memory.k[:, :, :held] = value
    found = memory_attention(case.q, case.k, case.v, case.memory, **case.options, return_lse=True, backend=backend)
    assert case.memory is not None
    if value == -INF:  # as if it were not there
        expected = memory_attention(case.q, case.k, case.v, **case.options, return_lse=True, backend="reference")
        assert all(torch.allclose(*pair, **ALIKE) for pair in zip(found, expected, strict=True))
    else:
        assert all(x.isnan().all() for x in found)
    out = decode_attention(case.q[:, :, :1], case.memory, backend=backend)
    assert out.isnan().all()  # no other key is there


@pytest.mark.parametrize("held", [1, 3, 20])
def test_scores_beyond_float32_weigh_nothing(held: int) -> None:
    """All values are finite: the products of queries with the memory's keys are not."""
    case = random_case(batch=1, heads=2, kv_heads=2, queries=5, seen=[held], horizon=40, capacity=40)
    case.q.fill_(1e20)
    case.k.zero_()
    case.memory.k[:, :, :held] = -1e20
    found = memory_attention(case.q, case.k, case.v, case.memory, **case.options, return_lse=True, backend="sdpa")
    expected = memory_attention(case.q, case.k, case.v, **case.options, return_lse=True, backend="reference")
    assert all(torch.allclose(*pair, **ALIKE) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("held", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_query_is_broken_in_a_step(backend: str, held: int, group: int) -> None:
    memory, q = filled_memory(1, 2, 8, 16, [held]), torch.randn(1, 2 * group, 1, 16)
    q[:, 1, :, 3] = NAN
    broken = decode_attention(q, memory, backend=backend).isnan().all(-1).flatten()
    assert broken.tolist() == [head == 1 for head in range(2 * group)]


def test_a_stretch_of_the_ring_that_scores_lowest_is_no_source_of_zeros() -> None:
    memory, visible, q = filled_memory(1, 2, 8, 16, [11]), torch.tensor([6], dtype=torch.int32), torch.rand(1, 2, 1, 16)
    memory.k[:, :, 3:] = -INF  # the older of two stretches, all of it
    found, expected = (decode_attention(q, memory, visible=visible, backend=b) for b in ("sdpa", "reference"))
    assert torch.allclose(found, expected, **ALIKE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_large_values_of_heavy_keys_stay_in_range(visibility: str, dtype: torch.dtype) -> None:
    """A key that outweighs a query's own by e**40, whose value such a weight would take out of range."""
    q, k, v = (torch.zeros(1, 8, 300, 16, dtype=dtype) for _ in range(3))
    q[..., 0], k[:, :, 0, 0], v[:, :, 0] = 1.0, 40.0, 1e25
    out = memory_attention(q, k, v, horizon=300, visibility=visibility, scale=1.0, backend="sdpa")
    assert torch.allclose(out.double(), torch.tensor(1e25, dtype=torch.float64), rtol=1e-2)


def test_accelerators_without_kernels_keep_it_apart_too() -> None:
    from dsmr_kernels.backends.sdpa.masked import Masked
    from dsmr_kernels.spec import AttentionSpec, Inputs

    case = random_case(seen=[50, 9], horizon=20, segment_length=13)
    seen = seen_by(case, 7)
    case.v[:, :, 7, 3] = NAN
    spec = AttentionSpec(20, 13, 0, "segment", True, 0.25, False)
    out, _ = Masked(Inputs(case.q, case.k, case.v, case.memory, None, None, None, None, None, spec)).forward()
    assert torch.equal(~out.isfinite().all(-1), seen)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_who_sees_a_broken_token_when_decoding_is_broken(
    backend: str, new: int, side: str, stored: torch.dtype
) -> None:
    q, visible = torch.randn(2, 4, new, 16), torch.tensor([20, 9], dtype=torch.int32)
    for back in (1, 2, 9, 20, 30):
        memory = filled_memory(2, 2, 40, 16, [50, 45])
        for row, slot in enumerate(((memory.position - back) % memory.capacity).tolist()):
            getattr(memory, side)[row, :, slot, 3] = NAN
        out = decode_attention(q, memory.to(dtype=stored), visible=visible, backend=backend)
        younger = torch.arange(new, 0, -1)[None, :]  # how far back each query's own token lies
        seen = (back >= younger) & (back <= visible[:, None])
        assert torch.equal(~out.isfinite().all(-1), seen[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_eight_bits_say_that_a_vector_was_not_finite(value: float) -> None:
    x = torch.randn(2, 3, 8)
    x[1, 2, 5] = value
    stored, scale = quantise(x)
    assert bool(scale[1, 2].isnan())
    assert int(scale.isnan().sum()) == 1
    assert bool(dequantise(stored, scale)[1, 2].isnan().all())


@every
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_a_step_that_stores_in_eight_bits_says_so_too(backend: str, value: float) -> None:
    memory, (q, k, v) = KVMemory.empty(2, 2, 7, 16, dtype=torch.int8), (torch.randn(2, h, 1, 16) for h in (4, 2, 2))
    k[0, 1, 0, 3], v[1, 0, 0, 12] = value, value
    append_rotated(q, k, v, memory, backend=backend)
    assert memory.k_scale[:, :, 0].isnan().tolist() == [[False, True], [False, False]]
    assert memory.v_scale[:, :, 0].isnan().tolist() == [[False, False], [True, False]]


# The virtual GPU knows no threads that part ways, as they do in CUDA's log2 of NaN.
interpreted = pytest.mark.skipif(
    "triton" not in available_backends() or torch.cuda.is_available() or "DSMR_VIRTUAL_GPU" in os.environ,
    reason="the interpreter's",
)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("side", ["k", "v"])
def test_the_triton_kernels_keep_it_apart_in_eight_bits(side: str) -> None:
    """As well as keys of any dtype; values in floating point reach the queries of their tile, see docs/kernels.md."""
    case = random_case(seen=[50, 45], horizon=9, visibility="sliding")
    seen, memory = seen_by(case, -5), case.memory.clone()
    for row, slot in enumerate(((memory.position - 5) % memory.capacity).tolist()):
        getattr(memory, side)[row, :, slot, 3] = NAN
    out = memory_attention(case.q, case.k, case.v, memory.to(dtype=torch.int8), **case.options, backend="triton")
    assert torch.equal(~out.isfinite().all(-1), seen)
    visible, q = torch.tensor([20, 9], dtype=torch.int32), torch.randn(2, 4, 3, 16)
    for back in (1, 2, 9, 30):
        memory = filled_memory(2, 2, 40, 16, [50, 45])
        for row, slot in enumerate(((memory.position - back) % memory.capacity).tolist()):
            getattr(memory, side)[row, :, slot, 3] = NAN
        out = decode_attention(q, memory.to(dtype=torch.int8), visible=visible, backend="triton")
        seen = (back >= torch.arange(3, 0, -1)[None, :]) & (back <= visible[:, None])
        assert torch.equal(~out.isfinite().all(-1), seen[:, None].expand(-1, 4, -1))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("name", CASES)
def test_in_the_triton_kernels_a_broken_value_reaches_no_further_than_its_tile(name: str) -> None:
    """Of 16 queries here; keys reach nobody who does not see them."""
    case = random_case(seen=[50, 45], **CASES[name])
    seen = seen_by(case, 7)
    for side in ("k", "v"):
        x = getattr(case, side).clone()
        x[:, :, 7, 3] = NAN
        tensors = {"q": case.q, "k": case.k, "v": case.v, side: x}
        out = memory_attention(*tensors.values(), case.memory, **case.options, backend="triton")
        broken = ~out.isfinite().all(-1)
        assert bool(broken[seen].all())
        tiles = seen.split(16, 2) if side == "v" else [seen]
        for tile, found in zip(tiles, broken.split(16, 2) if side == "v" else [broken], strict=True):
            assert torch.equal(found, tile) if side == "k" else bool(tile.any()) or not found.any()
