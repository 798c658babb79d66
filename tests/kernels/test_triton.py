"""The Triton kernels against the oracle, on CPU through Triton's interpreter: correct here means correct arithmetic and
indexing; speed, bfloat16 and real memory bounds are for a GPU to show (`test_triton_gpu.py`)."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from attention_cases import CASES, MORE, pieces
from attention_strategy import LAYOUTS, attention_calls, laid_out
from guard import Buffers, guarded, surrounded_case
from hypothesis import given, settings

from dsmr_kernels import available_backends, memory_attention
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.spec import AttentionSpec
from dsmr_kernels.testing import assert_agrees_with_oracle, run
from dsmr_kernels.tolerance import error
from dsmr_kernels.visibility import lowest_visible, segment_of

if "triton" not in available_backends() or torch.cuda.is_available():
    pytest.skip(
        "needs Triton, and its interpreter (TRITON_INTERPRET=1) on a machine without a GPU", allow_module_level=True
    )
NAN = float("nan")


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    yield from guarded(monkeypatch)


def small(name: str) -> dict:
    """A shared case with as few rows and heads as its promise needs: the interpreter is slow."""
    given = (CASES | MORE)[name]
    case = {"batch": 1, "heads": 2, "kv_heads": 1, **given}
    if not {"queries", "piece_start"} & case.keys():
        case["queries"] = 18
    rows = case["piece_start"].shape[0] if "piece_start" in case else len(set(case.get("seen") or [0]))
    if "batch" not in given:
        case["batch"] = rows
        if case.get("seen"):
            case["seen"] = case["seen"][-rows:]
    if "alibi_slopes" in case:
        case["alibi_slopes"] = case["alibi_slopes"][: case["heads"]]
    return case


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in CASES if CASES[name].get("head_dim", 16) >= 16), *MORE])
def test_kernels_agree_with_oracle(name: str) -> None:
    assert_agrees_with_oracle(random_case(**small(name)), "triton")


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_dims_and_half_precision(head_dim: int, dtype: torch.dtype) -> None:
    case = random_case(
        batch=1, heads=2, kv_heads=1, queries=19, seen=[30], capacity=24, head_dim=head_dim, horizon=20,
        segment_length=8, dtype=dtype,
    )  # fmt: skip
    assert_agrees_with_oracle(case, "triton")


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=attention_calls(dtypes=(torch.float32, torch.float16), head_dims=(16, 20), most_tokens=36, most_heads=2))
def test_any_arguments_agree_with_oracle(case: Case) -> None:
    """Property: over the whole argument space."""
    assert_agrees_with_oracle(case, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    options = {"horizon": 20, "piece_start": pieces([-1] * 5 + [5] * 2, [-1] * 7)}
    case = random_case(heads=2, kv_heads=1, queries=7, seen=[30, 9], capacity=9, **options)
    case.options["alibi_slopes"] = torch.tensor([0.5, 0.1])
    expected = run(case, "triton")
    found = Case(*(laid_out(x, layout) for x in (case.q, case.k, case.v)), case.memory, case.grad, dict(case.options))
    found.grad = laid_out(case.grad, layout)
    found.memory.k, found.memory.v = (laid_out(x, layout) for x in (case.memory.k, case.memory.v))
    found.options["alibi_slopes"] = torch.tensor([0.5, 9.0, 0.1])[::2]
    found.options["piece_start"] = case.options["piece_start"].T.contiguous().T
    for name, value in run(found, "triton").items():
        assert error(value, expected[name]) == 0
    assert found.memory.k.stride() == laid_out(case.memory.k, layout).stride()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["rows differ", "more keys than queries, segments", "memory in int8", "a learned bias"]
)
def test_nothing_around_the_tensors_is_read_and_no_empty_slot(name: str) -> None:
    case = random_case(**small(name) | {"head_dim": 20})
    expected = run(case, "triton")
    for result, value in run(surrounded_case(case), "triton").items():
        assert error(value, expected[result]) == 0


def poisoned(x: torch.Tensor, *slices: slice) -> torch.Tensor:
    x = x.clone()
    for part in slices:
        x[:, :, part] = NAN
    return x


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_blocks_that_no_query_of_a_tile_sees_are_skipped(visibility: str) -> None:
    """A tile holds 16 queries or keys: what lies outside its band is NaN, and would spread if it were touched."""
    options = {"visibility": visibility, "segment_length": 16, "seen": [100], "capacity": 64}
    case = random_case(batch=1, heads=1, kv_heads=1, queries=48, horizon=5, **options)
    memory = case.memory.clone()
    oldest = torch.arange(memory.capacity).roll(-int(memory.position[0]) % memory.capacity)[:-5]
    memory.k[:, :, oldest] = memory.v[:, :, oldest] = NAN
    exact = run(case, "triton")
    first, middle, last = slice(0, 16), slice(16, 32), slice(32, 48)
    for tile, unseen in ((first, (middle, last)), (middle, (slice(0, 11), last)), (last, (slice(0, 27),))):
        ring = memory.clone()
        if tile != first:
            ring.k.fill_(NAN)
            ring.v.fill_(NAN)
        k, v = poisoned(case.k, *unseen), poisoned(case.v, *unseen)
        found = run(Case(case.q, k, v, ring, case.grad, case.options), "triton")
        for name in ("out", "lse", "dq"):
            assert error(found[name][:, :, tile], exact[name][:, :, tile]) == 0
        others = [x for x in (first, middle, last) if x != tile]  # segments are detached: queries of others count not
        q, grad = poisoned(case.q, *others), poisoned(case.grad, *others)
        found = run(Case(q, case.k, case.v, case.memory, grad, case.options), "triton")
        for name in ("dk", "dv"):
            assert error(found[name][:, :, tile], exact[name][:, :, tile]) == 0


def test_queries_of_later_pieces_are_skipped_for_a_key() -> None:
    options = {"piece_start": pieces([-1] * 16 + [16] * 17), "horizon": 40, "seen": [30], "detach_segments": False}
    case = random_case(batch=1, heads=1, kv_heads=1, **options)
    exact = run(case, "triton")
    later = slice(16, 33)
    found = run(
        Case(poisoned(case.q, later), case.k, case.v, case.memory, poisoned(case.grad, later), case.options), "triton"
    )
    for name in ("dk", "dv"):
        assert error(found[name][:, :, :16], exact[name][:, :, :16]) == 0


def test_nothing_is_allocated_for_the_memory(buffers: Buffers) -> None:
    case = random_case(batch=1, heads=2, kv_heads=1, queries=5, capacity=500, seen=[20], horizon=20)
    run(case, "triton")
    q, k, rows = case.q.numel(), case.k.numel(), case.q[..., 0].numel()
    assert sorted(buffers.sizes) == sorted([q, rows, q, k, k, rows])  # out, lse; dq, dk, dv, delta


def test_a_gradient_that_nobody_asks_for_is_not_computed(buffers: Buffers) -> None:
    options = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 5, "capacity": 9, "seen": [20], "horizon": 9}
    q, k, rows = 2 * 5 * 16, 5 * 16, 2 * 5
    for learning, made in {"q": [rows, q], "k": [rows, k], "v": [k], "kv": [rows, k, k]}.items():
        buffers.sizes.clear()
        run(
            random_case(**options, learning=learning), "triton"
        )  # a value alone needs no delta, and no walk over memory
        assert sorted(buffers.sizes) == sorted([q, rows, *made]), learning  # out, lse, and what is asked for


@pytest.mark.slow
def test_a_bias_takes_room_for_its_distances_alone(buffers: Buffers) -> None:
    """Its table in the forward and again in the backward, and there what of its gradient belongs to each distance."""
    from dsmr_kernels.backends.triton.primitives import MARGIN

    options = {"batch": 2, "heads": 2, "kv_heads": 1, "queries": 5, "capacity": 60, "seen": [70, 3], "biased": True}
    q, rows, heads = 2 * 2 * 5 * 16, 2 * 2 * 5, 2
    for horizon, distances, blocks in ((20, 21, 3), (0, 1, 1), (1 << 40, 65, 5)):
        buffers.sizes.clear()
        run(random_case(**options, horizon=horizon, visibility="sliding", learning="b"), "triton")
        table = heads * (distances + 2 * MARGIN.value)
        parts, bias = 2 * heads * 2 * blocks * 16, heads * 6
        assert sorted(buffers.sizes) == sorted([q, rows, rows, table, table, parts, bias])


def test_distances_of_a_call_are_those_that_are_seen() -> None:
    from dsmr_kernels.backends.triton.limits import distances_seen, limits_of

    tokens, capacity = 9, 5
    p = torch.arange(tokens)
    for length, offset, horizon, sliding in itertools.product((None, 3, 7, 40), (0, 2), (0, 4, 99), (False, True)):
        visibility = "sliding" if sliding else "segment"
        low = lowest_visible(
            p, horizon=horizon, segment_length=length, segment_offset=offset, visibility=visibility
        ).clamp(min=-capacity)
        spec = AttentionSpec(horizon, length, offset, visibility, True, 1.0, False)
        for rows in (False, True):
            found = distances_seen(limits_of(spec, rows, tokens, capacity), sliding, tokens, capacity)
            assert int((p - low).max()) < found <= tokens + capacity


def test_a_call_like_an_earlier_one_is_not_worked_out_anew() -> None:
    from dsmr_kernels.backends.triton import training

    plans = (training._forward, training._dq, training._dkv, training._dbias)
    options = {"batch": 1, "heads": 1, "kv_heads": 1, "queries": 3, "capacity": 9, "horizon": 7, "biased": True}
    run(random_case(**options, seen=[20]), "triton")
    before = [plan.cache_info() for plan in plans]
    run(random_case(**options, seen=[5], seed=1), "triton")  # other tensors, another place in the ring
    for old, new in zip(before, (plan.cache_info() for plan in plans), strict=True):
        assert new.misses == old.misses


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_segments_in_one_launch_equal_sequential_calls(visibility: str) -> None:
    case = random_case(batch=1, heads=2, kv_heads=1, queries=21, seen=[30], capacity=11)
    memory = case.memory.clone()
    options = {"horizon": 11, "visibility": visibility, "backend": "triton"}
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*whole, case.memory, segment_length=7, **options)
    out.backward(case.grad)
    parts = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    for begin in range(0, 21, 7):
        q, k, v = (x[:, :, begin : begin + 7] for x in parts)
        piece = memory_attention(q, k, v, memory, **options)
        assert error(piece, out[:, :, begin : begin + 7]) < 1e-6
        piece.backward(case.grad[:, :, begin : begin + 7])
        memory.append(k, v)
    for one, many in zip(whole, parts, strict=True):
        assert error(one.grad, many.grad) < 1e-5


@pytest.mark.slow
def test_repeated_runs_give_the_same_bits() -> None:
    case = random_case(**small("segments"))
    first = run(case, "triton")
    for name, value in run(case, "triton").items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("length", [None, 1, 3, 7, 1 << 40])
def test_arguments_too_large_for_32_bits_are_brought_down_without_a_change(length: int | None) -> None:
    from dsmr_kernels.backends.triton.limits import bounded

    tokens, capacity = 9, 5
    p = torch.arange(tokens)
    big = length or 1 << 40
    offsets = [offset for offset in (0, 1, 4, big - tokens, big - 8, big - 3, big - 1) if 0 <= offset < big]
    for offset in offsets:
        for horizon in (0, 2, 13, 14, 15, 1 << 40):
            spec = AttentionSpec(horizon, length, offset, "segment", True, 1.0, False)
            near, most, begin = bounded(spec, tokens, capacity)
            assert max(near, most, begin) <= tokens + capacity
            for visibility in ("segment", "sliding"):
                exact, found = (
                    lowest_visible(p, horizon=h, segment_length=n, segment_offset=o, visibility=visibility)
                    for h, n, o in ((horizon, length, offset), (near, most or None, begin))
                )
                assert torch.equal(exact.clamp(min=-capacity), found.clamp(min=-capacity))
            exact, found = segment_of(p, length, offset), segment_of(p, most or None, begin)
            assert torch.equal(exact[:, None] == exact, found[:, None] == found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_head_dim": 8}, "head_dim of v from 16 to 256, not 8; nearest: 16.*backend 'sdpa' serves"),
        (
            {"dtype": torch.float64},
            "computes in float16, float32, not float64; nearest: float32.*backend 'sdpa' serves",
        ),
        ({"head_dim": 8}, "head_dim from 16 to 256, not 8; nearest: 16.*backend 'sdpa' serves"),
        ({"head_dim": 272}, "head_dim from 16 to 256, not 272; nearest: 256.*backend 'sdpa' serves"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_what_can(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(random_case(queries=3, horizon=2, **change), "triton")


def test_scale_zero_is_a_plain_mean() -> None:
    case = random_case(batch=1, heads=1, kv_heads=1, queries=3, horizon=0, scale=0.0)
    out, lse = memory_attention(case.q, case.k, case.v, horizon=0, scale=0.0, return_lse=True, backend="triton")
    assert error(out[:, :, 2], case.v.mean(2)) < 1e-6
    assert error(lse[0, 0], torch.tensor([math.log(n) for n in (1, 2, 3)])) < 1e-6
