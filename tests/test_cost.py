"""Costs are counted, not estimated: the formulas equal the count of the mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_kernels import KVMemory
from dsmr_kernels.cost import (
    attention_flops,
    human_bytes,
    memory_bytes,
    memory_capacity,
    steady_keys,
    visible_pairs,
)
from dsmr_kernels.visibility import lowest_visible


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
