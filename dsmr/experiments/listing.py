"""What `dsmr experiments list` prints: each preset's schedule and budget at one size, and where it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsmr.experiments.presets import KNOWN, PRESETS, Preset, Size, check
from dsmr_kernels.costing.cost import human_bytes

if TYPE_CHECKING:
    from rich.table import Table


def listing(size: Size) -> list[dict[str, Any]]:
    """One dictionary a preset, the paper's ten first: plain values, budgets in bytes of one stream in bfloat16."""
    return [_row(preset, size) for preset in KNOWN.values()]


def _row(preset: Preset, size: Size) -> dict[str, Any]:
    schedule = preset.schedule(size)
    check(schedule, size)
    return {
        "name": preset.name,
        "title": preset.title,
        "schedule": str(schedule),
        "budget_bytes": size.bytes(schedule),
        "of_full": size.bytes(schedule) / max(size.bytes(PRESETS["full"].schedule(size)), 1),
        "origin": preset.origin,
        "our_reading": preset.ours,
        "paper": None if preset.paper is None else vars(preset.paper),
    }


def table(rows: list[dict[str, Any]], size: Size) -> Table:
    """The listing for a terminal (rich)."""
    from rich.table import Table

    drawn = Table(
        title=f"{size.layers} layers, {size.n_heads} heads of {size.head_dim}",
        caption="budget: keys and values of one stream in bfloat16; the last columns are the paper's, on MAESTRO",
    )
    drawn.add_column("preset")
    drawn.add_column("schedule", overflow="fold")
    for name in ("budget", "of full", "perplexity", "KRCU-AUC", "peak GB"):
        drawn.add_column(name, justify="right")
    for row in rows:
        paper = row["paper"]
        theirs = ("", "", "")
        if paper is not None:
            theirs = (f"{paper['perplexity']:.2f}", f"{paper['krcu_auc']:.4f}", f"{paper['peak_gb']:.1f}")
        drawn.add_row(row["name"], row["schedule"], human_bytes(row["budget_bytes"]), f"{row['of_full']:.0%}", *theirs)
    return drawn


def sentences(rows: list[dict[str, Any]]) -> list[str]:
    """For each preset a line: its title, where it comes from, what is our reading."""
    lines = []
    for row in rows:
        said = [f"{row['name']} ({row['title']}): {row['origin']}", row["our_reading"]]
        lines.append(" ".join(filter(None, said)))
    return lines
