"""Short calls on a CPU: as few operators as there can be, and the results of every other call."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsmr_kernels import alike, memory_attention
from dsmr_kernels.backends.sdpa import plan, tuned
from dsmr_kernels.backends.sdpa.processor import Choice
from dsmr_kernels.cases import random_case
from dsmr_kernels.spec import Inputs
from dsmr_kernels.testing import assert_agrees_with_oracle, run

BF16, F32 = torch.bfloat16, torch.float32
CASES: dict[str, dict[str, Any]] = {
    "full memory": {"seen": [40, 40], "horizon": 40},
    "wrapped, seen in part": {"seen": [57, 57], "horizon": 31},
    "part full": {"seen": [9, 9], "horizon": 40},
    "no memory": {"horizon": 40},
    "eight bits": {"seen": [57, 57], "horizon": 40, "stored": torch.int8},
    "rows that differ": {"seen": [57, 9], "horizon": 40},
    "segments": {"seen": [57, 57], "horizon": 40, "segment_length": 13},
    "keys before the queries": {"seen": [57, 57], "horizon": 40, "tokens": 50},
    "grouped heads": {"seen": [57, 57], "horizon": 40, "kv_heads": 2},
    "gradient of the log-sum-exp": {"seen": [57, 57], "horizon": 40, "lse_gradient": True},
    "gradient of keys alone": {"seen": [57, 57], "horizon": 40, "learning": "k"},
}


@pytest.fixture(autouse=True)
def _the_table_again() -> Iterator[None]:
    yield
    tuned.use(None)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_short_call_agrees_with_the_oracle(name: str, dtype: torch.dtype) -> None:
    tuned.use({(BF16, "forward"): Choice("flash", F32)})  # as where bfloat16 is slow
    assert_agrees_with_oracle(random_case(**{"dtype": dtype, "kv_heads": 4, **CASES[name]}), "sdpa")


@pytest.mark.parametrize("slot", [0, 7, 29])
@pytest.mark.parametrize("side", ["k", "v"])
def test_a_broken_token_of_the_memory_breaks_all_who_see_it(side: str, slot: int) -> None:
    for queries in (33, 20):
        case = random_case(kv_heads=4, queries=queries, capacity=30, seen=[30, 30], horizon=30)
        assert case.memory is not None
        getattr(case.memory, side)[1, :, slot, 3] = torch.nan
        found = run(case, "sdpa")
        for name in ("out", "dq"):
            assert found[name][0].isfinite().all()
            assert found[name][1].isnan().any(-1).all()


def test_calls_alike_follow_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their plan is kept by what the memory holds and where, and nothing else of it."""
    planned: list[list[int]] = []
    made = plan._plan

    def counting(inputs: Inputs, held: list[int], ring: list[int]) -> plan.Plan:
        planned.append(ring)
        return made(inputs, held, ring)

    monkeypatch.setattr(plan, "_plan", counting)
    case = random_case(kv_heads=4, seen=[40, 40], horizon=37)
    assert case.memory is not None
    for _ in range(4):
        for _ in range(2):
            found, right = (
                memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend=name)
                for name in ("sdpa", "reference")
            )
            torch.testing.assert_close(found, right)
        case.memory.append(case.k, case.v)
    assert len(planned) == 4  # one for each place that the memory is at


def test_long_plans_are_not_kept() -> None:
    """A call of many segments is long, and calls of any number of them would add up."""
    alike.forget()
    for queries, is_kept in ((plan._MOST_RUNS, True), (plan._MOST_RUNS + 1, False)):
        case = random_case(queries=queries, capacity=9, seen=[9, 9], horizon=9, segment_length=1)
        for _ in range(2):
            memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend="sdpa")
        *_, kind = alike._known.values()
        assert bool(kind.plans) == is_kept
