"""Costs are counted, not estimated: the formulas equal the count of the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_kernels import KVMemory
from dsmr_kernels.costing.cost import (
    Call,
    Pairs,
    Work,
    attention_flops,
    backward_parts,
    decode_work,
    forward_parts,
    human_bytes,
    linear_work,
    memory_bytes,
    memory_capacity,
    state_bytes,
    steady_keys,
    total,
    visible_pairs,
)
from dsmr_kernels.visibility import lowest_visible, segment_of


def counted_pairs(tokens: int, horizon: int, length: int | None, visibility: str) -> int:
    """Ones of the mask of a whole piece."""
    p = torch.arange(tokens)
    low = lowest_visible(p, horizon=horizon, segment_length=length, segment_offset=0, visibility=visibility)
    return int((p - low.clamp(min=0) + 1).sum())


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 300),
    horizon=st.integers(0, 320),
    length=st.none() | st.integers(1, 320),
    visibility=st.sampled_from(["segment", "sliding"]),
)
def test_visible_pairs_is_the_count_of_the_mask(tokens: int, horizon: int, length: int | None, visibility: str) -> None:
    found = visible_pairs(tokens, horizon=horizon, segment_length=length, visibility=visibility)
    assert found == counted_pairs(tokens, horizon, length, visibility)


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize(("horizon", "length"), [(0, 1), (5, 7), (64, 16), (33, 40)])
def test_steady_keys_is_what_further_whole_segments_cost(horizon: int, length: int, visibility: str) -> None:
    options = {"horizon": horizon, "segment_length": length, "visibility": visibility}
    full = -(-horizon // length) * length  # by then every memory is full
    more = visible_pairs(full + 6 * length, **options) - visible_pairs(full, **options)
    assert steady_keys(**options) == more / (6 * length)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "kv_heads", "horizon", "head_dim"), [(3, 2, 17, 5), (1, 8, 0, 64), (2, 1, 4096, 1)])
def test_memory_bytes_are_those_allocated(
    dtype: torch.dtype, batch: int, kv_heads: int, horizon: int, head_dim: int
) -> None:
    memory = KVMemory.empty(batch, kv_heads, horizon, head_dim, dtype=dtype)
    assert memory.nbytes == memory_bytes(
        batch=batch, horizon=horizon, kv_heads=kv_heads, head_dim=head_dim, bytes_per_element=dtype.itemsize
    )
    assert memory.nbytes == memory.k.untyped_storage().nbytes() + memory.v.untyped_storage().nbytes()


def test_capacity_holds_the_segment_in_progress_or_the_query_itself() -> None:
    assert memory_capacity(100, 16) == 116
    assert memory_capacity(100, None) == 100
    assert memory_capacity(100, 16, "sliding") == 101


def test_flops_are_two_products_of_two_operations_each() -> None:
    assert attention_flops(10, heads=3, head_dim=8) == 2 * (2 * 10 * 8) * 3


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**60, "1048576.0 TiB")],
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": -1}, "tokens and horizon must be >= 0, got -1 and 4"),
        ({"horizon": -2}, "got 8 and -2"),
        ({"visibility": "all"}, 'visibility must be "segment" or "sliding", got \'all\''),
    ],
)
def test_impossible_sizes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visible_pairs(**({"tokens": 8, "horizon": 4, "segment_length": 4} | change))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """A call of any cut: first or behind a memory, in the middle of a segment, with pieces beginning in it."""
    tokens, length = draw(st.integers(0, 60)), draw(st.none() | st.integers(1, 25))
    return Call(
        draw(st.integers(0, tokens)),
        draw(st.integers(0, 70)),
        held=draw(st.integers(0, 50)),
        segment_length=length,
        segment_offset=draw(st.integers(0, 20 if length is None else length - 1)),
        visibility=draw(st.sampled_from(["segment", "sliding"])),
        tokens=tokens,
        piece_starts=tuple(sorted(draw(st.sets(st.integers(0, max(tokens - 1, 0)), max_size=3)))),
    )


def mask_of(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(seen, same segment), (T, held + S) both, and the key indices: the definition, pair by pair."""
    p, j = torch.arange(call.size - call.queries, call.size), torch.arange(-call.held, call.size)
    tokens = torch.arange(call.size)
    start = torch.full((1, call.size), -1)
    for first in call.piece_starts:
        start[:, first:] = first
    low = lowest_visible(
        tokens,
        horizon=call.horizon,
        segment_length=call.segment_length,
        segment_offset=call.segment_offset,
        visibility=call.visibility,
        piece_start=start,
    )[0, call.size - call.queries :]
    seen = (j >= low[:, None]) & (j <= p[:, None])
    same = segment_of(j, call.segment_length, call.segment_offset) == segment_of(
        p, call.segment_length, call.segment_offset
    ).unsqueeze(1)
    return seen, same, j


@pytest.mark.slow
@settings(max_examples=600, deadline=None, derandomize=True)
@given(call=calls())
def test_pairs_keys_and_segments_are_those_of_the_mask(call: Call) -> None:
    seen, same, j = mask_of(call)
    found = Pairs(
        memory=int((seen & (j < 0)).sum()),
        earlier=int((seen & (j >= 0) & ~same).sum()),
        own=int((seen & (j >= 0) & same).sum()),
    )
    assert call.pairs == found
    assert call.keys_read == int(seen.any(0).sum())
    p = torch.arange(call.size - call.queries, call.size)
    assert call.segments == len(segment_of(p, call.segment_length, call.segment_offset).unique())


def test_a_long_piece_is_counted_at_once() -> None:
    """Closed form: a piece of 10 ** 9 tokens takes no longer than one of 10, and the count is exact."""
    n, horizon, length = 10**9, 4096, 512
    pairs = Call(n, horizon, segment_length=length).pairs
    ramp = sum(length * begin for begin in range(0, horizon, length))
    assert pairs.own == n // length * (length * (length + 1) // 2)
    assert pairs.earlier == ramp + (n - horizon) * horizon
    assert pairs.memory == 0


SHAPE = {"batch": 3, "heads": 8, "kv_heads": 2, "head_dim": 16, "bytes_per_element": 2}


def test_memory_costs_three_products_and_the_segment_five_or_seven() -> None:
    call = Call(32, 64, held=64, segment_length=16, **SHAPE)
    pairs, once = call.pairs, 2 * 16 * 8 * 3  # one product, all heads and rows
    assert pairs.memory
    assert pairs.earlier
    assert total(forward_parts(call).values()).flops == attention_flops(pairs.total, heads=8, head_dim=16) * 3
    for backward, products in (("fused", 5), ("split", 7)):
        work = total(backward_parts(call, backward=backward).values())
        assert work.flops == once * (products * pairs.own + 3 * pairs.past)
        assert work.nominal_flops == once * products * pairs.total
    attached = Call(32, 64, held=64, segment_length=16, detach_segments=False, **SHAPE)
    work = total(backward_parts(attached).values())
    assert work.flops == once * (5 * (pairs.own + pairs.earlier) + 3 * pairs.memory)
    assert total(forward_parts(call).values()).exponentials == pairs.total * 8 * 3


def test_the_memory_of_a_layer_needs_57_percent_less_backward_work_when_it_is_long() -> None:
    """The saving that the design states: three of seven products where keys take no gradient."""
    parts = backward_parts(Call(1024, 4096, held=4096, segment_length=1024, **SHAPE), backward="split")
    assert parts["past"].flops / parts["past"].nominal_flops == pytest.approx(1 - 0.57, abs=0.002)


def test_bytes_are_those_of_the_tensors_of_a_call() -> None:
    """Each tensor once, those of the memory as far as they are seen; checked against tensors of these shapes."""
    call = Call(16, 40, held=100, segment_length=16, **SHAPE)

    def size(*shape: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return torch.empty(shape, dtype=dtype).nbytes

    q, kv, seen = size(3, 8, 16, 16), 2 * size(3, 2, 16, 16), 2 * size(3, 2, 40, 16)
    lse = size(3, 8, 16, dtype=torch.float32)
    forward, backward = (total(parts(call).values()) for parts in (forward_parts, backward_parts))
    assert (forward.bytes_read, forward.bytes_written) == (q + kv + seen, q + lse)
    assert (backward.bytes_read, backward.bytes_written) == (3 * q + kv + seen + lse, q + kv)
    memory = KVMemory.empty(3, 2, 40, 16, dtype=torch.bfloat16)
    assert state_bytes(call) == memory.nbytes
    decode = decode_work(Call(2, 40, **SHAPE), visible=41)
    assert decode.bytes_read == 2 * size(3, 8, 1, 16) + 2 * size(3, 2, 41, 16)
    assert decode.flops == 3 * attention_flops(40 + 41, heads=8, head_dim=16)


def test_calls_count_the_stretches_that_are_started() -> None:
    first = forward_parts(Call(64, 32, segment_length=16, **SHAPE))
    assert (first["past"].calls, first["own"].calls) == (4, 4)
    assert forward_parts(Call(64, 0, segment_length=16, **SHAPE))["past"] == Work()


def test_a_linear_layer_has_two_products_backward() -> None:
    forward = linear_work(10, 4, 6, bytes_per_element=4)
    backward = linear_work(10, 4, 6, bytes_per_element=4, backward=True)
    assert (forward.flops, backward.flops) == (480, 960)
    assert (forward.bytes_read, forward.bytes_written) == (4 * (40 + 24), 4 * 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"held": -1}, "held must be >= 0, got -1"),
        ({"segment_offset": 4}, "segment_offset must be < segment_length = 4, got 4"),
        ({"heads": 3, "kv_heads": 2}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"tokens": 7}, "tokens must be at least the 8 queries, got 7"),
        ({"piece_starts": (3, 1)}, "rising order"),
    ],
)
def test_impossible_calls_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Call(**({"queries": 8, "horizon": 4, "segment_length": 4} | change))
