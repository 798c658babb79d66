"""What a schedule costs: the table of `dsmr budget`, layer by layer and against full memory.

Every number is asked of the schedule; this module only lays them out. "Full" is a model of the same layers and query
heads in which each layer holds the longest horizon of the schedule with all heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dsmr.console.errors import UserError
from dsmr.model.schedule import MemorySchedule
from dsmr_kernels.costing.cost import human_bytes
from dsmr_kernels.quantise import SCALE_BYTES

if TYPE_CHECKING:
    from rich.table import Table

# Of an element, and of a key's or value's scale.
ELEMENT_BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "float16": (2, 0), "int8": (1, SCALE_BYTES)}


@dataclass(frozen=True)
class LayerCost:
    """One layer: bytes of its memory (all streams), its attention's FLOPs for a token once the memory is full, and
    which tokens it keeps."""

    layer: int
    horizon: int
    kv_heads: int
    bytes: int
    flops_per_token: float
    retention: str = "newest"


@dataclass(frozen=True)
class Budget:
    """A schedule's cost, and that of full memory beside it."""

    schedule: str
    n_heads: int
    head_dim: int
    dtype: str
    batch: int
    segment_length: int
    visibility: str
    layers: tuple[LayerCost, ...]
    bytes: int
    flops_per_token: float
    full_schedule: str
    full_bytes: int
    full_flops_per_token: float

    @property
    def bytes_ratio(self) -> float:
        """State against full memory; 1 for a schedule without any memory, whose full memory is nothing too."""
        return self.bytes / self.full_bytes if self.full_bytes else 1.0

    @property
    def flops_ratio(self) -> float:
        return self.flops_per_token / self.full_flops_per_token

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, the ratios included."""
        return {**asdict(self), "bytes_ratio": self.bytes_ratio, "flops_ratio": self.flops_ratio}

    def table(self) -> Table:
        """The table for a terminal (rich)."""
        from rich.table import Table

        streams = "1 stream" if self.batch == 1 else f"{self.batch} streams"
        table = Table(
            title=self.schedule,
            caption=f"{self.n_heads} query heads of {self.head_dim}, {self.dtype}, {streams}, segments of "
            f"{self.segment_length:,} tokens ({self.visibility} visibility); attention FLOPs forward, memories full",
            show_footer=True,
        )
        longest = max(row.horizon for row in self.layers)
        feet = {
            "layer": ("all", "full", "ratio"),
            "horizon": (f"{sum(row.horizon for row in self.layers):,}", f"{len(self.layers) * longest:,}", ""),
            "KV heads": ("", str(self.n_heads), ""),
            "memory": (human_bytes(self.bytes), human_bytes(self.full_bytes), f"{self.bytes_ratio:.3f}"),
            "FLOPs a token": (
                human_count(self.flops_per_token),
                human_count(self.full_flops_per_token),
                f"{self.flops_ratio:.3f}",
            ),
        }
        for name, foot in feet.items():
            table.add_column(name, "\n".join(foot), justify="right")
        others = any(row.retention != "newest" for row in self.layers)
        if others:
            table.add_column("kept")
        for row in self.layers:
            table.add_row(
                str(row.layer),
                f"{row.horizon:,}",
                str(row.kv_heads),
                human_bytes(row.bytes),
                human_count(row.flops_per_token),
                *([row.retention] if others else []),
            )
        return table


def budget_of(
    schedule: MemorySchedule | str,
    *,
    n_heads: int = 8,
    head_dim: int = 64,
    dtype: str = "bfloat16",
    batch: int = 1,
    segment_length: int = 1024,
    visibility: str = "segment",
) -> Budget:
    """The cost of `schedule` in a model of `n_heads` query heads; `UserError` for a dtype or heads that cannot be."""
    schedule = MemorySchedule.parse(schedule)
    if dtype not in ELEMENT_BYTES:
        raise UserError(f"unknown dtype {dtype!r}: use one of {', '.join(ELEMENT_BYTES)}")
    try:
        heads = schedule.heads(n_heads)
    except ValueError as error:
        raise UserError(str(error)) from error
    full = MemorySchedule.full(schedule.layers, max(schedule.horizons))
    element, scale = ELEMENT_BYTES[dtype]
    memory: dict[str, Any] = {
        "n_heads": n_heads,
        "head_dim": head_dim,
        "bytes_per_element": element,
        "scale_bytes": scale,
        "batch": batch,
    }
    work: dict[str, Any] = {
        "n_heads": n_heads,
        "head_dim": head_dim,
        "segment_length": segment_length,
        "visibility": visibility,
    }
    costs = (schedule.layer_bytes(**memory), schedule.layer_attention_flops(**work))
    columns = (schedule.horizons, heads, *costs, schedule.retention)
    return Budget(
        schedule=str(schedule),
        n_heads=n_heads,
        head_dim=head_dim,
        dtype=dtype,
        batch=batch,
        segment_length=segment_length,
        visibility=visibility,
        layers=tuple(LayerCost(layer, *row) for layer, row in enumerate(zip(*columns, strict=True))),
        bytes=schedule.budget_bytes(**memory),
        flops_per_token=schedule.attention_flops(**work),
        full_schedule=str(full),
        full_bytes=full.budget_bytes(**memory),
        full_flops_per_token=full.attention_flops(**work),
    )


def human_count(count: float) -> str:
    """A count for a reader, in powers of a thousand: "12.6 M"."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f}"
