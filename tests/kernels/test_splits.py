"""Small grids of the training call, whose tiles several programs share: against the oracle, and bit for bit."""

import itertools
import os
from collections.abc import Iterator

import pytest
import torch
from attention_cases import CASES, MORE, pieces
from guard import Buffers, guarded

from dsmr_kernels import available_backends
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.testing import assert_agrees_with_oracle, run

if "triton" not in available_backends():
    pytest.skip("needs Triton, and a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from dsmr_kernels.backends.triton import configs, splits, training
from dsmr_kernels.backends.triton.splits import shares_of

on_gpu = torch.cuda.is_available()
interpreted = pytest.mark.skipif(
    on_gpu or os.environ.get("TRITON_INTERPRET") != "1", reason="runs through the interpreter, without a GPU"
)


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    yield from guarded(monkeypatch)


@pytest.fixture
def _shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine for which every call of these tests is small."""
    monkeypatch.setattr(training, "processors", lambda device: 20)
    monkeypatch.setattr(training, "LEAST_KEYS", 8)
    monkeypatch.setattr(training, "LEAST_QUERIES", 8)
    monkeypatch.setattr(configs, "generation", configs.generation + 1)  # what is kept was worked out by other rules


NAMES = [
    "memory wrapped",
    "no memory",
    "one row empty",
    "horizon 0",
    "gradients across segments",
    "sliding",
    "pieces, sliding",
    "more keys than queries, segments",
    "multi-query",
    "alibi, segments",
    "gradient of lse",
    "queries learn",
    "keys learn",
    "values learn",
    "rows at their own offsets",
    "values narrower",
    "memory in int8",
]


@pytest.mark.slow
@interpreted
@pytest.mark.usefixtures("_shared")
@pytest.mark.parametrize("name", NAMES)
def test_shared_tiles_agree_with_oracle(name: str) -> None:
    given = (CASES | MORE)[name]
    case = {"batch": 1, "heads": 2, "kv_heads": 1, **given}
    if not {"queries", "piece_start"} & case.keys():
        case["queries"] = 18
    rows = case["piece_start"].shape[0] if "piece_start" in case else len(set(case.get("seen") or [0]))
    case["batch"] = rows
    if case.get("seen"):
        case["seen"] = case["seen"][-rows:]
    if "alibi_slopes" in case:
        case["alibi_slopes"] = case["alibi_slopes"][: case["heads"]]
    assert_agrees_with_oracle(random_case(**case), "triton")


@pytest.mark.slow
@interpreted
@pytest.mark.usefixtures("_shared")
def test_shares_are_taken_and_repeated_runs_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(programs: int, processors: int, walk: int, least: int) -> int:
        seen.append(shares_of(programs, processors, walk, least))
        return seen[-1]

    monkeypatch.setattr(training, "shares_of", noted)
    options = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 40, "seen": [57], "capacity": 40, "horizon": 40}
    case = random_case(**options, dtype=torch.float16)
    first = run(case, "triton")
    assert len(seen) == 6  # of each kernel: with the tile of a call, then with that of one whose tiles are shared
    assert min(seen) >= 2
    run(random_case(**options | {"queries": 7, "heads": 4}), "triton")
    for name, value in run(case, "triton").items():
        assert torch.equal(value, first[name]), name


@interpreted
def test_a_gradient_that_nobody_asks_for_has_no_room_for_its_parts(
    buffers: Buffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "shares_of", lambda *given: 3)
    monkeypatch.setattr(configs, "generation", configs.generation + 1)
    options = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 5, "capacity": 9, "seen": [20], "horizon": 9}
    q, k, rows = 2 * 5 * 16, 5 * 16, 2 * 5
    forward = [q, rows, 3 * q, 3 * rows]
    for learning, made in {"q": [rows, q, 3 * q], "k": [rows, k, 3 * k], "v": [k, 3 * k]}.items():
        buffers.sizes.clear()
        run(random_case(**options, learning=learning), "triton")
        assert sorted(buffers.sizes) == sorted([*forward, *made]), learning


def test_tiles_are_shared_where_processors_would_be_idle_and_there_is_enough_to_share() -> None:
    keys, queries = splits.LEAST_KEYS, splits.LEAST_QUERIES
    assert shares_of(64, 132, 2048, keys) == 2  # batch 1, 8 heads, 1,024 queries
    assert shares_of(16, 132, 4 * 1024, queries) == 8  # dK and dV of 2 heads
    assert shares_of(8, 132, 16384, keys) == 16  # a short prompt behind a long memory
    assert shares_of(8, 132, 2 * keys, keys) == 2  # which is not long
    assert shares_of(8, 132, 2 * keys - 1, keys) == 1
    assert shares_of(67, 132, 1 << 20, keys) == 1
    assert shares_of(1, 132, 1 << 20, keys) == 32
    assert shares_of(0, 132, 1 << 20, keys) == 32


SMALL = {
    "batch 1": {"queries": 1024, "capacity": 4096, "seen": [9000], "horizon": 4096},
    "short prompt, long memory": {"queries": 17, "capacity": 16384, "seen": [20000], "horizon": 16384},
    "rows part full": {"batch": 2, "queries": 100, "capacity": 4000, "seen": [3000, 1], "horizon": 4000},
    "sliding, ALiBi": {
        "queries": 777,
        "capacity": 2000,
        "seen": [2100],
        "horizon": 1900,
        "visibility": "sliding",
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
    },
    "pieces, not detached, more keys than queries": {
        "queries": 900,
        "tokens": 1500,
        "capacity": 2000,
        "seen": [1700],
        "horizon": 2000,
        "segment_length": 700,
        "detach_segments": False,
        "piece_start": pieces([-1] * 700 + [700] * 800),
    },
    "int8, gradient of lse": {
        "queries": 300,
        "capacity": 3000,
        "seen": [5000],
        "horizon": 3000,
        "stored": torch.int8,
        "lse_gradient": True,
    },
}


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu, reason="needs a GPU")
@pytest.mark.parametrize("name", SMALL)
class TestOnGpu:
    def case(self, name: str, head_dim: int) -> Case:
        options = {"batch": 1, "heads": 4, "kv_heads": 2, **SMALL[name]}
        return random_case(**options, head_dim=head_dim, dtype=torch.bfloat16).to(device="cuda")

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_small_grids_agree_with_oracle(self, name: str, head_dim: int) -> None:
        assert_agrees_with_oracle(self.case(name, head_dim), "triton")

    def test_repeated_runs_give_the_same_bits(self, name: str) -> None:
        case = self.case(name, 64)
        first = run(case, "triton")
        for _ in range(20):
            for result, value in run(case, "triton").items():
                assert torch.equal(value, first[result])

    def test_a_captured_call_gives_the_same_bits(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()  # the buffers of a graph belong to its pool
        case = self.case(name, 64)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            first = run(case, "triton")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, "triton")
        for _ in range(20):
            graph.replay()
            for result, value in captured.items():
                assert torch.equal(value, first[result])


def test_no_shared_tile_has_128_queries_and_four_warps() -> None:
    """Such lost keys on an H100: see `configs`."""
    for part, kernel, head_dim in itertools.product(configs.TABLE, ("forward", "dq"), (16, 24, 32, 64, 80, 128, 256)):
        if not part.startswith("gfx"):
            for name in (kernel, f"{kernel}_int8", f"{kernel}_biased", f"{kernel}_int8_biased"):
                tile = configs.from_table(f"{name}_split", part, head_dim, torch.bfloat16)
                assert tile.bm < 128 or tile.warps >= 8, (part, name, head_dim)
