"""PyTorch's flash kernel on a CPU: a causal edge that is cut gives what the whole of it gives, with fewer scores."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsmr_kernels import memory_attention
from dsmr_kernels.backends.sdpa import flash, tuned
from dsmr_kernels.backends.sdpa.processor import Choice
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.testing import assert_agrees_with_oracle

BF16, F32 = torch.bfloat16, torch.float32
CASES: dict[str, dict[str, Any]] = {
    "the fewest": {"queries": flash.CUT.start},
    "a rest of one": {"queries": 2 * flash.EDGE_QUERIES + 1},
    "behind memory": {"queries": 300, "seen": [57, 57], "horizon": 40, "lse_gradient": True},
    "grouped heads": {"queries": 300, "kv_heads": 2, "seen": [57, 9], "horizon": 40},
    "all heads share": {"queries": 300, "kv_heads": 1},
    "segments": {"queries": 600, "segment_length": 250, "seen": [57, 57], "horizon": 270},
    "the most": {"queries": flash.CUT.stop - 1, "batch": 1, "heads": 2, "kv_heads": 2},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash, "WORTH", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned.use({(dtype, "forward"): Choice("flash", F32) for dtype in (F32, BF16)})
    yield
    tuned.use(None)
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each call of the kernel."""
    made: list[tuple[int, int]] = []
    kernel = flash._FLASH
    assert kernel is not None

    def counting(q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made.append((q.shape[2], k.shape[2]))
        return kernel(q, k, *rest, **options)

    monkeypatch.setattr(flash, "_FLASH", counting)
    return made


def forward(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend="sdpa")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_cut_edge_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    assert_agrees_with_oracle(random_case(**{"dtype": dtype, "kv_heads": 4, "horizon": 0, **CASES[name]}), "sdpa")


def test_only_the_keys_that_a_cut_sees_are_taken(calls: list[tuple[int, int]]) -> None:
    step = flash.EDGE_QUERIES
    forward(random_case(queries=2 * step + 44, kv_heads=4, horizon=0))
    assert calls == [(step, step), (step, 2 * step), (44, 2 * step + 44)]


@pytest.mark.parametrize("queries", [flash.CUT.start - 1, flash.CUT.stop])
def test_a_short_or_a_long_edge_is_one_call(queries: int, calls: list[tuple[int, int]]) -> None:
    forward(random_case(batch=1, heads=2, kv_heads=2, queries=queries, horizon=0))
    assert calls == [(queries, queries)]


def test_a_small_call_is_one_call(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 rows of 4 heads of 16: 38,400 numbers, and 300 queries."""
    for worth, made in ((38_400 * 300 + 1, 1), (38_400 * 300, 3)):
        monkeypatch.setattr(flash, "WORTH", worth)
        calls.clear()
        forward(random_case(queries=300, kv_heads=4, horizon=0))
        assert len(calls) == made


def test_where_all_threads_share_a_call_its_edge_is_whole(calls: list[tuple[int, int]]) -> None:
    torch.set_num_threads(2)
    forward(random_case(batch=1, heads=2, kv_heads=2, queries=300, horizon=0))
    assert calls == [(300, 300)]


@pytest.mark.parametrize("seen", [None, [9, 9]])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_token_alone_with_its_broken_key_is_broken(kv_heads: int, seen: list[int] | None) -> None:
    """Which the kernel takes for a masked one."""
    case = random_case(queries=1, kv_heads=kv_heads, seen=seen, horizon=40)
    case.k[0, :, 0, 3] = torch.nan
    out = forward(case)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("seen", [None, [9, 9]])
def test_an_infinite_score_that_is_alone_is_no_zero(seen: list[int] | None) -> None:
    """Of the first query with its own key, which all others score as the lowest there is."""
    case = random_case(queries=20, kv_heads=4, seen=seen, horizon=40)
    case.q[..., 3] = -1.0
    case.q[:, :, 0, 3] = 1.0
    case.k[0, :, 0, 3] = torch.inf
    out = forward(case)
    assert out[0, :, 0].isnan().all()
    assert out[0, :, 1:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_hidden_score_may_be_out_of_range(dtype: torch.dtype) -> None:
    """That of the last key with the query before it, which a mask would have to be added to."""
    case = random_case(queries=300, kv_heads=4, horizon=0, dtype=dtype)
    case.q[:, :, -2, 3] = 1e20
    case.k[:, :, :-1, 3] = 0.0
    case.k[:, :, -1, 3] = 1e20
    case.q[:, :, -1, 3] = 0.0
    assert forward(case).isfinite().all()
    assert_agrees_with_oracle(case, "sdpa")


def test_the_table_is_everybodys() -> None:
    """Whoever comes first makes it, and leaves nothing of its own settings in it."""
    flash._seen.cache_clear()
    case = random_case(queries=300, kv_heads=4, horizon=0)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            first = memory_attention(case.q, case.k, case.v, **case.options, backend="sdpa")
    finally:
        torch.set_default_dtype(F32)
    out = memory_attention(case.q.requires_grad_(), case.k, case.v, **case.options, backend="sdpa")
    assert torch.equal(out, first)
    out.sum().backward()
