"""Schedules for a budget: every named family, its parameters solved so that it uses the budget, ranked by predicted
cost; and, last, the control without memory, which every budget holds and nothing is cheaper than.

Where a family has two horizons, the long one is eight times the short one and a quarter of the layers, at least one, is
long, as in the paper's pictures (our reading).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from dsmr.console.errors import UserError
from dsmr.model.schedule import MOST_TOKENS, MemorySchedule
from dsmr.profiling.cost import predict_step, predict_token
from dsmr.profiling.job import Sizes
from dsmr_kernels.costing.cost import human_bytes
from dsmr_kernels.costing.predict import Ceilings

LONG_OVER_SHORT = 8
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Proposal:
    """A schedule within the budget, and what it should cost: training tokens a second, and tokens a second when it
    plays with full memories. The `control` has no memory."""

    schedule: str
    bytes: int
    longest: int
    tokens_per_second: float
    played_per_second: float
    control: bool = False


def parse_bytes(text: str) -> int:
    """Bytes of "64MiB", "1.5 GB" or "4096"; `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise UserError(f"the budget {text!r} cannot be read: write bytes such as 64MiB, 1.5GB or 65536")
    count = int(float(found[1]) * UNITS[found[2].upper()])
    if not 0 < count <= 2**60:
        raise UserError(f"the budget must be more than 0 and at most 1 EiB, got {text!r}")
    return count


def families(layers: int, heads: int) -> dict[str, Callable[[int], MemorySchedule]]:
    """For every named family, the schedule whose longest horizon is so many tokens."""
    n_long = max(layers // 4, 1)
    make = MemorySchedule

    def short(long: int) -> int:
        return long // LONG_OVER_SHORT

    found: dict[str, Callable[[int], MemorySchedule]] = {
        "full": lambda long: make.full(layers, long),
        "uniform": lambda long: make.uniform(layers, long),
        "two_scale": lambda long: make.two_scale(layers, long, short(long), n_long),
        "reverse_two_scale": lambda long: make.reverse_two_scale(layers, long, short(long), n_long),
        "ascending": lambda long: make.ascending(layers, short(long), long),
        "descending": lambda long: make.descending(layers, short(long), long),
        "alternating": lambda long: make.alternating(layers, long, short(long)),
        "binary": lambda long: make.binary(layers, long, list(range(n_long))),
        "none": lambda long: make.none(layers),
    }
    few = next((count for count in (2, 1) if heads % count == 0 and count < heads), None)
    if few is not None:
        found["fhcr"] = lambda long: make.fhcr(layers, long, few)
    return found


def solve(family: Callable[[int], MemorySchedule], budget: int, sizes: Sizes) -> MemorySchedule | None:
    """The member of the family with the longest horizon that fits, or None if not even one token does."""

    def fits(long: int) -> bool:
        held = family(long).budget_bytes(
            n_heads=sizes.heads,
            head_dim=sizes.head_dim,
            bytes_per_element=sizes.element_bytes,
            batch=sizes.batch,
        )
        return held <= budget

    if not fits(1):
        return None
    low, high = 1, 2
    while high < MOST_TOKENS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return family(low)


def propose(budget: int, layers: int, sizes: Sizes, ceilings: Ceilings) -> list[Proposal]:
    """The families within `budget` bytes of state for the whole batch: the fastest to train first, the control last.

    Raises:
        UserError: if the budget does not hold a single token in any family.
    """
    found = []
    for name, family in families(layers, sizes.heads).items():
        schedule = MemorySchedule.none(layers) if name == "none" else solve(family, budget, sizes)
        if schedule is None:
            continue
        sizes.config(schedule)
        step = predict_step(sizes, schedule, "train", ceilings)
        seconds = sum(step.seconds(direction) for direction in ("forward", "backward", "step"))
        longest = max(schedule.horizons)
        token, _ = predict_token(sizes, schedule, longest, ceilings)
        held = schedule.budget_bytes(
            n_heads=sizes.heads, head_dim=sizes.head_dim, bytes_per_element=sizes.element_bytes, batch=sizes.batch
        )
        trained = sizes.batch * sizes.segment_length / seconds
        found.append(Proposal(str(schedule), held, longest, trained, 1 / token, control=name == "none"))
    if len(found) == 1:
        raise UserError(
            f"a budget of {human_bytes(budget)} holds no memory at all: one token in one layer takes "
            f"{human_bytes(2 * sizes.batch * sizes.heads * sizes.head_dim * sizes.element_bytes)}"
        )
    return sorted(found, key=lambda proposal: (proposal.control, -proposal.tokens_per_second))
