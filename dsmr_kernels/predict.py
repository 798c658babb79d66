"""How long work should take: its counts from `cost`, divided by what the device was measured to do.

    attention   (flops / matrix rate + exponentials / exponential rate, or the bytes if they take longer) / share
                + calls * seconds to start one
    the rest    flops / matrix rate, or the bytes if they take longer, + calls * seconds to start an operator

The share is how much of that bound the kernels attain. `ceilings` measures it on the device, for each dtype, pass and
kind of pair at one size, and it is used for all others. Kernels work in whole tiles, so on the causal edge they also
compute pairs that nobody sees: some more keys for each query, the `edge`, measured too. The bound alone needs neither.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from dsmr_kernels.cost import Call, Work, backward_parts, forward_parts


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do at best, and what the attention kernels make of it.

    Attributes:
        device: its name. `threads`: of PyTorch, on a CPU. `torch`, `kernels`: versions that the figures hold for.
        copy_bytes: bytes read and written a second by a copy too large for any cache.
        matrix_flops: operations a second of a large square matrix product, by dtype.
        exponentials: a second, in float32, on data that lies in a cache.
        attention_seconds: to start a part of an attention call; forward, and backward.
        operator_seconds: to start one small PyTorch operator.
        attained: share of the bound, by dtype and then by pass and kind of pair, such as "forward past".
        edge: keys more than it sees that each query costs on the causal edge, by dtype and then by pass.
    """

    device: str
    threads: int
    torch: str
    kernels: str
    copy_bytes: float
    matrix_flops: dict[str, float]
    exponentials: float
    operator_seconds: float
    attention_seconds: dict[str, float] = field(default_factory=dict)
    attained: dict[str, dict[str, float]] = field(default_factory=dict)
    edge: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Ceilings":
        """The inverse of `to_json`; `TypeError` for missing or unknown fields."""
        return cls(**values)


def bound_seconds(work: Work, ceilings: Ceilings, dtype: str) -> float:
    """No less than the matrix products and exponentials take one after the other, and no less than the bytes take."""
    arithmetic = work.flops / ceilings.matrix_flops[dtype] + work.exponentials / ceilings.exponentials
    return max(arithmetic, work.bytes / ceilings.copy_bytes)


PARTS = {"forward": forward_parts, "backward": backward_parts}


def with_edge(call: Call, work: Work, edge: float) -> Work:
    """The work of a call's "own" part with `edge` keys more for each query."""
    pairs = call.pairs.own
    more = 1 + edge * call.queries / pairs if pairs else 1.0
    return replace(work, flops=work.flops * more, exponentials=work.exponentials * more)


def attention_seconds(call: Call, ceilings: Ceilings, dtype: str) -> tuple[float, float]:
    """Seconds of a `memory_attention` call's forward and of its backward."""
    forward, backward = (
        sum(
            bound_seconds(
                with_edge(call, work, ceilings.edge[dtype][direction]) if kind == "own" else work, ceilings, dtype
            )
            / ceilings.attained[dtype][f"{direction} {kind}"]
            + work.calls * ceilings.attention_seconds[direction]
            for kind, work in parts(call).items()
        )
        for direction, parts in PARTS.items()
    )
    return forward, backward


def plain_seconds(work: Work, ceilings: Ceilings, dtype: str) -> float:
    """Anything but attention: matrix products, and operators that only move data."""
    return bound_seconds(work, ceilings, dtype) + work.calls * ceilings.operator_seconds
