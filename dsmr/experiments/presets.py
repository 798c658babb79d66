"""The ten models of the paper's table at one size: for each a schedule, and a sentence on where it comes from.

The paper (arXiv 2602.19816) names the models and prints their figures, but not their layers, widths or horizons. What
it leaves open is our reading, and says so. A model that keeps part of the past gets the budget of two-scale, so that
only the shape differs: the paper's peaks of 6.3 GB (two-scale, its reverse, pruning) say it of three of them, and
those of 7.0 to 8.0 GB (progressive horizons, selective retention) lie nearer to it than to full memory's 15.5.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from dsmr.console.errors import UserError
from dsmr.console.words import nearest
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MOST_LAYERS, MOST_TOKENS, MemorySchedule


@dataclass(frozen=True)
class Size:
    """The one size that all presets of a table share.

    Attributes:
        length: the horizon that counts as the whole piece.
        short: the short horizon of two-scale.
        n_long: layers of two-scale that hold `length`.
        few_heads: KV heads of FHCR.
    """

    layers: int = 12
    n_heads: int = 8
    head_dim: int = 64
    length: int = 8192
    short: int = 512
    n_long: int = 3
    few_heads: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "n_heads", "head_dim", "few_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, but it is {getattr(self, name)}")
        if self.layers > MOST_LAYERS:
            raise UserError(f"layers must be at most {MOST_LAYERS:,}, but they are {self.layers}")
        if self.length > MOST_TOKENS:
            raise UserError(f"length must be at most {MOST_TOKENS:,} tokens, but it is {self.length}")
        if not 0 <= self.short <= self.length:
            raise UserError(f"short must lie between 0 and the length {self.length}, but it is {self.short}")
        if not 0 <= self.n_long <= self.layers:
            raise UserError(f"n_long must lie between 0 and the {self.layers} layers, but it is {self.n_long}")
        if self.n_heads % self.few_heads:
            raise UserError(f"n_heads must be a multiple of few_heads, but they are {self.n_heads}, {self.few_heads}")

    @property
    def budget(self) -> int:
        """Tokens that the layers of two-scale hold together: what every partial model gets.

        Raises:
            UserError: if that is less than a token a layer.
        """
        tokens = self.n_long * self.length + (self.layers - self.n_long) * self.short
        if tokens < self.layers:
            raise UserError(
                f"a budget of {tokens} tokens for {self.layers} layers is smaller than a token a layer: "
                "raise length, short or n_long"
            )
        return tokens

    @property
    def mean(self) -> int:
        """The budget spread evenly: tokens a layer."""
        return self.budget // self.layers

    @property
    def half_heads(self) -> int:
        """The most KV heads that are no more than half of the heads, and that these are a multiple of."""
        return next((few for few in range(self.n_heads // 2, 0, -1) if self.n_heads % few == 0), 1)

    def bytes(self, schedule: MemorySchedule, bytes_per_element: int = 2) -> int:
        """Bytes of recurrent state of one stream, in bfloat16 unless said otherwise."""
        return schedule.budget_bytes(n_heads=self.n_heads, head_dim=self.head_dim, bytes_per_element=bytes_per_element)


@dataclass(frozen=True)
class Paper:
    """What the paper prints of a model on MAESTRO."""

    perplexity: float
    krcu_auc: float
    peak_gb: float


@dataclass(frozen=True)
class Preset:
    """A model of the table: how its schedule follows from the size, and what is known of it.

    Attributes:
        origin: a sentence on where it comes from.
        ours: what of it is our reading; empty where the paper says it all.
        settings: fields of `TrainConfig` that it changes beside the schedule.
    """

    name: str
    title: str
    schedule: Callable[[Size], MemorySchedule]
    origin: str
    ours: str = ""
    paper: Paper | None = None
    settings: dict[str, object] = field(default_factory=dict)


def _progressive(size: Size) -> tuple[int, int]:
    """Shortest and longest horizon of an even progression that has the budget of two-scale."""
    shortest = min(size.short, size.mean) if size.layers > 1 else size.mean
    return shortest, 2 * size.mean - shortest


def _retained(retention: str) -> Callable[[Size], MemorySchedule]:
    return lambda size: MemorySchedule.uniform(size.layers, size.mean, retention=retention)


_BUDGET = "the budget of two-scale"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "full",
            "full horizon, multi-head",
            lambda size: MemorySchedule.full(size.layers, size.length),
            "Every layer remembers the whole piece with all its heads: the paper's upper line, and its most expensive.",
            paper=Paper(5.98, 0.0248, 15.5),
        ),
        Preset(
            "perceiver_ar",
            "Perceiver-AR-like pruning",
            lambda size: MemorySchedule.binary(size.layers, size.budget, [0]),
            "Perceiver AR (Hawthorne et al., 2022) lets one layer read the long past and drops it from all above.",
            f"Our reading: the lowest layer alone has a memory, as long as {_BUDGET} allows.",
            Paper(6.54, 0.0007, 6.3),
        ),
        Preset(
            "retain_newest",
            "selective retention, sliding",
            _retained("newest"),
            "Each layer keeps the same number of past tokens, the newest.",
            f"Our reading: {_BUDGET}, spread evenly; to keep the newest is what a horizon does.",
            Paper(6.51, 0.0014, 7.8),
        ),
        Preset(
            "retain_uniform",
            "selective retention, uniform",
            _retained("uniform"),
            "Each layer keeps every n-th past token.",
            f"Our reading: {_BUDGET}, spread evenly; n is a power of two that grows with the piece.",
            Paper(6.52, 0.0017, 7.8),
        ),
        Preset(
            "retain_random",
            "selective retention, random",
            _retained("random"),
            "Each layer keeps a random sample of the past.",
            f"Our reading: {_BUDGET}, spread evenly; the sample is a reservoir.",
            Paper(6.53, 0.0014, 8.0),
        ),
        Preset(
            "ascending",
            "progressive, ascending",
            lambda size: MemorySchedule.ascending(size.layers, *_progressive(size)),
            "Horizons grow with depth.",
            f"Our reading: evenly, from the short horizon to as far as {_BUDGET} allows.",
            Paper(6.15, 0.0024, 7.0),
        ),
        Preset(
            "descending",
            "progressive, descending",
            lambda size: MemorySchedule.descending(size.layers, *_progressive(size)),
            "Horizons shrink with depth.",
            f"Our reading: evenly, to the short horizon from as far as {_BUDGET} allows.",
            Paper(6.33, 0.0014, 7.1),
        ),
        Preset(
            "reverse_two_scale",
            "reverse two-scale",
            lambda size: MemorySchedule.reverse_two_scale(size.layers, size.length, size.short, size.n_long),
            "Two-scale upside down: the highest layers are the long ones.",
            "Our reading: how many, and how long, as in two-scale.",
            Paper(6.01, 0.0088, 6.3),
        ),
        Preset(
            "two_scale",
            "two-scale",
            lambda size: MemorySchedule.two_scale(size.layers, size.length, size.short, size.n_long),
            "The paper's main instance: long horizons in the lower layers, one short horizon in the rest.",
            "Our reading: how many layers are long, and how short the others are, which decides the budget.",
            Paper(5.96, 0.0097, 6.3),
        ),
        Preset(
            "fhcr",
            "FHCR (all positions, few KV heads)",
            lambda size: MemorySchedule.fhcr(size.layers, size.length, size.few_heads),
            "Full-Horizon Compressed Recurrence, of the paper's third version: every position, few KV heads (there 2).",
            paper=Paper(6.01, 0.0312, 5.5),
        ),
    )
}
"""The paper's table, in its order."""

CONTROLS: dict[str, Preset] = {
    "none": Preset(
        "none",
        "no memory (control)",
        lambda size: MemorySchedule.none(size.layers),
        "Ours, not in the paper's table: each segment stands alone, so whatever is remembered shows against it.",
    )
}
"""What stands beside the ten without being of them."""

PROPOSED: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "lowest_half",
            "the lowest layer, half of the budget",
            lambda size: MemorySchedule.binary(size.layers, size.budget // 2, [0]),
            f"Ours, not in the paper's table: half of {_BUDGET} in the lowest layer alone (docs/experiments.md).",
        ),
        Preset(
            "lowest_wide",
            "the lowest layer, half of all KV heads",
            lambda size: MemorySchedule.binary(size.layers, size.budget, [0], size.half_heads),
            f"Ours, not in the paper's table: {_BUDGET} in the lowest layer alone, with half of the KV heads in every "
            "layer: as far back as one long layer, in half of the bytes (docs/experiments.md).",
        ),
        Preset(
            "two_scale_half",
            "two-scale, half of the KV heads",
            lambda size: MemorySchedule.two_scale(size.layers, size.length, size.short, size.n_long, size.half_heads),
            "Ours, not in the paper's table: two-scale in half of its bytes (docs/experiments.md).",
        ),
    )
}
"""Schedules that we propose: what the search for a better one led to."""

KNOWN: dict[str, Preset] = {**PRESETS, **CONTROLS, **PROPOSED}
"""All presets, by name, in the order of tables and reports."""


def preset(name: str) -> Preset:
    """The preset called `name`; `UserError` with the nearest known name for another."""
    if name not in KNOWN:
        raise UserError(f"unknown preset '{name}'{nearest(name, KNOWN)}")
    return KNOWN[name]


def check(schedule: MemorySchedule, size: Size) -> None:
    """`UserError` for a schedule that does not fit the size's heads."""
    try:
        DSMRConfig(vocab_size=1, schedule=schedule, d_model=size.n_heads * size.head_dim, n_heads=size.n_heads)
    except ValueError as error:
        raise UserError(str(error)) from error
