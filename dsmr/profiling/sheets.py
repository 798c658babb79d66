"""What the tables of `dsmr profile` say, for the terminal (`report`) and for the page (`page`) alike.

A cell is a text with its unit, unless the head of its column has the unit for all of them, and the figure of
`profile.json` that the text stands for, by which a page sorts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.cost import DIRECTIONS, LAYER_PARTS
from dsmr.profiling.profile import Profile, Row, attention_share, tokens_per_second
from dsmr_kernels.costing.cost import human_bytes

BOTH = "Two figures in a cell: predicted / measured"
PEAK = "peak: the most memory taken in a fresh process, beyond what Python and PyTorch take (on CUDA: of the allocator)"
AROUND_NAMES = {"embedding": "embedding", "head": "output and loss", "optimizer": "optimiser"}


@dataclass(frozen=True)
class Cell:
    """`text` as shown; `value` as measured, in seconds, bytes, tokens or tokens a second, or a word; `predicted` beside
    it where there are both."""

    text: str
    value: float | str | None = None
    predicted: float | None = None


@dataclass(frozen=True)
class Column:
    """`unit`: of every cell, where it is the same; else the cells have their own."""

    name: str
    unit: str = ""
    left: bool = False


@dataclass
class Sheet:
    """One table. A row with fewer cells than columns ends in a sentence that takes the rest of the line."""

    name: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)


def labels(names: Collection[str]) -> dict[str, str]:
    """A short name for each schedule: its family, numbered where there are several of one family."""
    families = [name.partition("(")[0] for name in names]
    return {
        name: family if families.count(family) == 1 else f"{family} {families[: number + 1].count(family)}"
        for number, (name, family) in enumerate(zip(names, families, strict=True))
    }


def sheets(found: Profile) -> Iterator[Sheet]:
    """All that there is to show, in order."""
    sizes, short = found.sizes, labels(found.rows)
    if found.rows:
        yield _legend(short)
    titles = {
        "train": f"One training step: {sizes.batch} x {sizes.segment_length:,} tokens behind full memories",
        "piece": f"A whole piece in one call, forward and backward: {sizes.piece_tokens:,} tokens",
    }
    for kind, title in titles.items():
        if rows := _rows(found, kind):
            yield _steps(kind, rows, short, title)
    for number, (name, row) in enumerate(_rows(found, "train").items()):
        if "error" not in row:
            yield _layers(f"layers-{number}", name, row)
    if rows := _rows(found, "decode"):
        yield _decoding(rows, short)
    if found.proposals:
        yield proposals(found)


def _rows(found: Profile, kind: str) -> dict[str, Row]:
    return {name: rows[kind] for name, rows in found.rows.items() if kind in rows}


# --- Cells --------------------------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> str:
    """Three figures, without the unit."""
    ms = 1e3 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _both(predicted: float, measured: float) -> Cell:
    return Cell(f"{milliseconds(predicted)} / {milliseconds(measured)}", measured, predicted)


def _bytes(count: float) -> Cell:
    return Cell(human_bytes(count), count)


def _rate(per_second: float) -> Cell:
    return Cell(f"{per_second:,.0f}", per_second)


def _share(share: float) -> Cell:
    return Cell(f"{100 * share:.0f} %", share)


def _word(text: str) -> Cell:
    return Cell(text, text)


# --- Tables -------------------------------------------------------------------------------------------------------


def _legend(short: dict[str, str]) -> Sheet:
    columns = [Column("schedule", left=True), Column("layers from the bottom, horizons in tokens", left=True)]
    rows = [[_word(label), _word(name)] for name, label in short.items()]
    return Sheet("schedules", "Schedules", "The names that the tables and pictures use.", columns, rows)


def _steps(kind: str, rows: dict[str, Row], short: dict[str, str], title: str) -> Sheet:
    columns = [
        Column("schedule", left=True),
        *(Column(name, "ms") for name in ("forward", "backward", "update", "all")),
        Column("spread"),
        Column("speed", "tokens/s"),
        *(Column(name) for name in ("attention", "keys, values", "kept", "peak")),
    ]
    caption = (
        f"{BOTH}; measured: medians; spread: distance between the quartiles of the rounds over the median; attention: "
        f"its share of the time; kept: for the backward; {PEAK}"
    )
    sheet = Sheet(kind, title, caption, columns)
    for name, row in rows.items():
        if "error" in row:
            sheet.rows.append([_word(short[name]), _word(row["error"])])
            continue
        predicted, timings = row["predicted"], row["timings"]
        expected, share = predicted["attention_share"], attention_share(row)
        sheet.rows.append(
            [
                _word(short[name]),
                *(
                    _both(predicted["seconds"][part], timings[part]["median"])
                    for part in ("forward", "backward", "step", "all")
                ),
                _share(timings["all"]["spread"]) if timings["all"]["rounds"] > 1 else _word("1 round"),
                _rate(tokens_per_second(row)),
                Cell(f"{100 * expected:.0f} % / {100 * share:.0f} %", share, expected),
                _bytes(sum(row["kv_bytes"])),
                _bytes(sum(row["activation_bytes"])),
                _bytes(row["peak_bytes"]),
            ]
        )
    return sheet


def seconds_by_part(parts: list[dict[str, Any]]) -> dict[tuple[int, str, str], float]:
    """Seconds by layer, direction and part."""
    return {(part["layer"], part["direction"], part["part"]): part["seconds"] for part in parts}


def _layers(sheet_name: str, name: str, row: Row) -> Sheet:
    schedule = MemorySchedule.parse(name)
    keys = [(direction, part) for direction in DIRECTIONS for part in LAYER_PARTS]
    columns = [
        *(Column("layer"), Column("horizon", "tokens"), Column("keys, values"), Column("kept")),
        *(Column(f"{part} {direction}", "ms") for direction, part in keys),
        Column("all", "ms"),
    ]
    predicted, measured = (seconds_by_part(parts) for parts in (row["predicted"]["parts"], row["parts"]))
    around = [
        f"{AROUND_NAMES.get(part, part)}{'' if direction == 'step' else ' ' + direction} "
        f"{_both(predicted[-1, direction, part], measured[-1, direction, part]).text} ms"
        for (layer, direction, part) in measured
        if layer == -1
    ]
    caption = f"{BOTH}; layer 0 is the lowest; kept: for the backward; around the layers: {', '.join(around)}"
    sheet = Sheet(sheet_name, f"The layers of a training step: {name}", caption, columns)
    for layer, horizon in enumerate(schedule.horizons):
        whole = (sum(seconds[layer, *key] for key in keys) for seconds in (predicted, measured))
        sheet.rows.append(
            [
                Cell(str(layer), layer),
                Cell(f"{horizon:,}", horizon),
                _bytes(row["kv_bytes"][layer]),
                _bytes(row["activation_bytes"][layer + 1]),
                *(_both(predicted[layer, *key], measured[layer, *key]) for key in keys),
                _both(*whole),
            ]
        )
    return sheet


def _decoding(rows: dict[str, Row], short: dict[str, str]) -> Sheet:
    positions: list[Row] = next((row["positions"] for row in rows.values() if "positions" in row), [])
    columns = [
        Column("schedule", left=True),
        *(Column(f"after {p['position']:,} tokens", "tokens/s") for p in positions),
        *(Column(name) for name in ("attention", "keys, values", "peak")),
    ]
    caption = (
        f"{BOTH}; one stream; attention: its predicted share of the time at the last position; keys, values: as "
        f"allocated, with room for the segment in progress; {PEAK}"
    )
    sheet = Sheet("decode", "Playing, one token at a time", caption, columns)
    for name, row in rows.items():
        if "error" in row:
            sheet.rows.append([_word(short[name]), _word(row["error"])])
            continue
        expected = row["predicted"]["positions"]
        rates = [(1 / e["seconds"], 1 / m["timing"]["median"]) for e, m in zip(expected, row["positions"], strict=True)]
        sheet.rows.append(
            [
                _word(short[name]),
                *(Cell(f"{should:,.0f} / {does:,.0f}", does, should) for should, does in rates),
                _share(expected[-1]["attention_seconds"] / expected[-1]["seconds"]),
                _bytes(sum(row["kv_bytes"])),
                _bytes(row["peak_bytes"]),
            ]
        )
    return sheet


def proposals(found: Profile) -> Sheet:
    """The schedules for a budget, and the control without memory."""
    columns = [
        Column("schedule", left=True),
        Column("longest horizon", "tokens"),
        Column("keys, values"),
        Column("training, predicted", "tokens/s"),
        Column("playing, predicted", "tokens/s"),
    ]
    caption = (
        "What uses the budget stands first, the fastest to train above; the control, a model without memory, stands "
        "last: it is cheap because it remembers nothing. Playing: with full memories"
    )
    rows = [
        [
            Cell(f"{p.schedule}{' (control: no memory)' if p.control else ''}", p.schedule),
            Cell(f"{p.longest:,}", p.longest),
            _bytes(p.bytes),
            _rate(p.tokens_per_second),
            _rate(p.played_per_second),
        ]
        for p in found.proposals
    ]
    return Sheet("proposals", "Schedules that fit the budget", caption, columns, rows)


def first_sheet(schedules: list[MemorySchedule], found: Profile, expected: dict[str, dict[str, Row]]) -> Sheet:
    """What can be said before anything is measured: `expected`, the predicted rows by schedule and kind of work."""
    sizes, short = found.sizes, labels([str(schedule) for schedule in schedules])
    kinds = list(next(iter(expected.values())))
    columns = [Column("schedule", left=True), Column("keys, values")]
    if "train" in kinds:
        columns += [Column("training step", "ms"), Column("training", "tokens/s")]
    if "piece" in kinds:
        columns += [Column(f"a piece of {sizes.piece_tokens:,} tokens", "ms")]
    if "decode" in kinds:
        columns += [Column(f"playing after {sizes.positions[-1]:,} tokens", "tokens/s")]
    caption = (
        "Preliminary: predicted, not measured. The bytes are exact; the times leave out what small operators lose, so "
        "that measured ones are often one and a half times as long, and more"
    )
    sheet = Sheet("first", "What to expect (the measured tables follow)", caption, columns)
    for name, rows in expected.items():
        cells = [_word(short[name]), _bytes(sum(next(iter(rows.values()))["kv_bytes"]))]
        if "train" in rows:
            seconds = rows["train"]["seconds"]["all"]
            cells += [Cell(milliseconds(seconds), seconds), _rate(sizes.batch * sizes.segment_length / seconds)]
        if "piece" in rows:
            seconds = rows["piece"]["seconds"]["all"]
            cells += [Cell(milliseconds(seconds), seconds)]
        if "decode" in rows:
            cells += [_rate(1 / rows["decode"]["positions"][-1]["seconds"])]
        sheet.rows.append(cells)
    return sheet
