"""The tables of `dsmr profile` for a terminal (rich): predicted beside measured."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.cost import DIRECTIONS, LAYER_PARTS
from dsmr.profiling.profile import Profile, Row, attention_share, tokens_per_second
from dsmr_kernels.costing.cost import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "train": "One training step: a segment behind full memories, {batch} x {segment_length:,} tokens",
    "piece": "A whole piece in one call, forward and backward: {piece_tokens:,} tokens",
    "decode": "One token at a time, tokens a second",
}
AGAINST = "predicted / measured"


def labels(names: Collection[str]) -> dict[str, str]:
    """A short name for each schedule: its family, numbered where there are several of one family."""
    families = [name.partition("(")[0] for name in names]
    return {
        name: family if families.count(family) == 1 else f"{family} {families[: number + 1].count(family)}"
        for number, (name, family) in enumerate(zip(names, families, strict=True))
    }


def tables(found: Profile) -> Iterator[Table]:
    """All that there is to show, in order."""
    sizes = found.sizes
    if found.rows:
        yield _legend(found)
    for kind in ("train", "piece"):
        rows = {name: rows[kind] for name, rows in found.rows.items() if kind in rows}
        if rows:
            yield _steps(rows, labels(found.rows), TITLES[kind].format(**vars(sizes)))
    for name, rows in found.rows.items():
        if "train" in rows and "error" not in rows["train"]:
            yield _layers(name, rows["train"])
    rows = {name: rows["decode"] for name, rows in found.rows.items() if "decode" in rows}
    if rows:
        yield _decoding(rows, labels(found.rows), TITLES["decode"])
    if found.proposals:
        yield _proposals(found)


def _table(title: str, columns: dict[str, str], caption: str | None = None) -> Table:
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", padding=(0, 0))
    for name, justify in columns.items():
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


def milliseconds(seconds: float) -> str:
    """Three figures."""
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _both(predicted: float, measured: float) -> str:
    return f"{milliseconds(predicted)} / {milliseconds(measured)}"


def _legend(found: Profile) -> Table:
    table = _table("Schedules", {"": "left", "layers from the bottom, horizons in tokens": "left"})
    for name, label in labels(found.rows).items():
        table.add_row(label, name)
    return table


def _steps(rows: dict[str, Row], short: dict[str, str], title: str) -> Table:
    names = ["", "forward", "backward", "update", "all, ms", "spread", "tokens/s", "attention", "KV", "kept", "peak"]
    columns = {name: "right" if name else "left" for name in names}
    caption = (
        f"{AGAINST}; medians, spread: distance between the quartiles over the median; attention: its share; kept: for "
        "the backward; peak: of a fresh process, beyond what Python and PyTorch take (on CUDA: of the allocator)"
    )
    table = _table(title, columns, caption)
    for name, row in rows.items():
        if "error" in row:
            table.add_row(short[name], row["error"])
            continue
        predicted, timings = row["predicted"], row["timings"]
        table.add_row(
            short[name],
            *(
                _both(predicted["seconds"][key], timings[key]["median"])
                for key in ("forward", "backward", "step", "all")
            ),
            f"{100 * timings['all']['spread']:.0f} %",
            f"{tokens_per_second(row):,.0f}",
            f"{100 * predicted['attention_share']:.0f} / {100 * attention_share(row):.0f} %",
            human_bytes(sum(row["kv_bytes"])),
            human_bytes(sum(row["activation_bytes"])),
            human_bytes(row["peak_bytes"]),
        )
    return table


def seconds_by_part(parts: list[dict[str, Any]]) -> dict[tuple[int, str, str], float]:
    """Seconds by layer, direction and part."""
    return {(part["layer"], part["direction"], part["part"]): part["seconds"] for part in parts}


def _layers(name: str, row: Row) -> Table:
    schedule = MemorySchedule.parse(name)
    columns = {"layer": "right", "horizon": "right", "KV": "right", "kept": "right"}
    for direction in DIRECTIONS:
        columns |= {f"{part}\n{direction}": "right" for part in LAYER_PARTS}
    columns["all"] = "right"
    table = _table(f"{name}: the layers of a training step", columns)
    predicted, measured = (seconds_by_part(parts) for parts in (row["predicted"]["parts"], row["parts"]))
    keys = [(direction, part) for direction in DIRECTIONS for part in LAYER_PARTS]
    for layer, horizon in enumerate(schedule.horizons):
        table.add_row(
            str(layer),
            f"{horizon:,}",
            human_bytes(row["kv_bytes"][layer]),
            human_bytes(row["activation_bytes"][layer + 1]),
            *(_both(predicted[layer, *key], measured[layer, *key]) for key in keys),
            _both(*(sum(seconds[layer, *key] for key in keys) for seconds in (predicted, measured))),
        )
    around = [
        f"{part}{'' if direction == 'step' else ' ' + direction} "
        f"{_both(predicted[-1, direction, part], measured[-1, direction, part])}"
        for (layer, direction, part) in measured
        if layer == -1
    ]
    table.caption = f"{AGAINST}, ms; around the layers: {', '.join(around)}"
    return table


def _decoding(rows: dict[str, Row], short: dict[str, str], title: str) -> Table:
    positions: list[Row] = next((row["positions"] for row in rows.values() if "positions" in row), [])
    columns = {"": "left", **{f"at {p['position']:,}": "right" for p in positions}}
    columns |= {"attention": "right", "KV": "right", "peak": "right"}
    caption = (
        f"{AGAINST}; one stream; attention: its predicted share at the last position; KV as allocated, with room for "
        "the segment in progress"
    )
    table = _table(title, columns, caption)
    for name, row in rows.items():
        if "error" in row:
            table.add_row(short[name], row["error"])
            continue
        expected = row["predicted"]["positions"]
        table.add_row(
            short[name],
            *(
                f"{1 / e['seconds']:,.0f} / {1 / m['timing']['median']:,.0f}"
                for e, m in zip(expected, row["positions"], strict=True)
            ),
            f"{100 * expected[-1]['attention_seconds'] / expected[-1]['seconds']:.0f} %",
            human_bytes(sum(row["kv_bytes"])),
            human_bytes(row["peak_bytes"]),
        )
    return table


def _proposals(found: Profile) -> Table:
    columns = {"schedule": "left", "longest": "right", "memory": "right"}
    columns |= {"training, tokens/s": "right", "playing, tokens/s": "right"}
    table = _table("Schedules that fit the budget, the fastest to train first (predicted)", columns)
    for proposal in found.proposals:
        table.add_row(
            proposal.schedule,
            f"{proposal.longest:,}",
            human_bytes(proposal.bytes),
            f"{proposal.tokens_per_second:,.0f}",
            f"{proposal.played_per_second:,.0f}",
        )
    return table
