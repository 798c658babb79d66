"""How long work should take: its counts from `cost`, divided by what the device was measured to do.

    attention   flops / (matrix rate * share) + exponentials / (exponential rate * share), or the bytes if they take
                longer; + calls * seconds to start one
    the rest    flops / matrix rate, or the bytes if they take longer; + calls * seconds to start an operator

The shares are how much of the two rates the kernels attain: they make thin products, and do more to a score than its
exponential. `ceilings` measures them on the device, for each dtype and pass, at two widths of a head, and they hold for
all other shapes. Kernels work in whole tiles, so on the causal edge they also compute pairs that nobody sees: some more
keys for each query, the `edge`, measured too.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from dsmr_kernels.costing.cost import Call, Work, backward_parts, forward_parts
from dsmr_kernels.costing.load import BUSY_SPREAD, in_words, is_busy


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
        attained: by dtype and then by pass the shares of the rates that the kernels attain, "products" and
            "exponentials", and by how much the segment's own pairs differ: "own", a factor, and "edge", the keys more
            than it sees that each query costs on the causal edge, in segments that have so many.
        load, cores: the load average that others caused meanwhile, and the cores that it fell on; None and 0 where that
            is not known.
        spread: of a yardstick's seconds, taken between the figures: the distance between the quartiles over the median.
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
    attained: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    load: float | None = None
    cores: int = 0
    spread: float | None = None

    @property
    def disturbed(self) -> str | None:
        """By what the figures were disturbed, in words; None if they were taken on a quiet machine, or nobody knows."""
        if self.load is not None and is_busy(self.load, self.cores):
            return in_words(self.load, self.cores)
        if self.spread is not None and self.spread > BUSY_SPREAD:
            return f"a yardstick's rounds {100 * self.spread:.0f} % apart"
        return None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Ceilings":
        """The inverse of `to_json`; `TypeError` for missing or unknown fields."""
        return cls(**values)


def bound_seconds(
    work: Work, ceilings: Ceilings, dtype: str, products: float = 1.0, exponentials: float = 1.0
) -> float:
    """No less than the matrix products and exponentials take one after the other, each at its share of its rate, and no
    less than the bytes take."""
    arithmetic = work.flops / (ceilings.matrix_flops[dtype] * products)
    arithmetic += work.exponentials / (ceilings.exponentials * exponentials)
    return max(arithmetic, work.bytes / ceilings.copy_bytes)


PARTS = {"forward": forward_parts, "backward": backward_parts}


def with_edge(call: Call, work: Work, edge: float) -> Work:
    """The work of a call's "own" part with `edge` keys more for each query, but no more than all of its segment."""
    pairs = call.pairs.own
    longest = min(call.queries, call.segment_length or call.queries)
    more = 1 + min(edge, (longest - 1) / 2) * call.queries / pairs if pairs else 1.0
    return replace(work, flops=work.flops * more, exponentials=work.exponentials * more)


def attention_seconds(call: Call, ceilings: Ceilings, dtype: str) -> tuple[float, float]:
    """Seconds of a `memory_attention` call's forward and of its backward."""
    seconds = []
    for direction, parts in PARTS.items():
        found, share = parts(call), ceilings.attained[dtype][direction]
        rates = (share["products"], share["exponentials"])
        own = bound_seconds(with_edge(call, found["own"], share["edge"]), ceilings, dtype, *rates) / share["own"]
        calls = sum(work.calls for work in found.values())
        past = bound_seconds(found["past"], ceilings, dtype, *rates)
        seconds.append(own + past + calls * ceilings.attention_seconds[direction])
    return seconds[0], seconds[1]


def plain_seconds(work: Work, ceilings: Ceilings, dtype: str) -> float:
    """Anything but attention: matrix products, and operators that only move data."""
    return bound_seconds(work, ceilings, dtype) + work.calls * ceilings.operator_seconds
