"""Rows of finished cells, and what they say together: seeds put together as a mean and a spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import read_json
from dsmr.console.schema import Maybe, Natural, Number, check
from dsmr.experiments.presets import KNOWN, PRESETS
from dsmr.runs.settings import TrainConfig

FORMAT = 1
MEAN = {"mean": Number}
PERHAPS = {"mean": Maybe(Number)}  # of bins that no piece may reach
SHAPE = {
    **dict.fromkeys(("table", "model", "title", "our_reading", "schedule", "corpus", "split", "tokenizer_hash"), str),
    **dict.fromkeys(("seed", "kv_bytes", "trained_tokens", "parameters", "pieces", "tokens"), Natural),
    **dict.fromkeys(("nats_per_note", "perplexity"), Number),
    "krcu": Maybe(
        {
            **dict.fromkeys(("auc", "reset_bin"), MEAN),
            "tail": PERHAPS,
            "reset": Natural,
            "bins": [{**dict.fromkeys(("start", "end", "tokens"), Natural), "delta": PERHAPS}],
        }
    ),
    "retain": [{"k": Natural, "delta": MEAN}],
    "returns": Maybe(
        {"by_distance": [{**dict.fromkeys(("start", "end", "returns"), Natural), "saved": Maybe(Number)}]}
    ),
    "by_label?": Maybe([{"label": str, "nats_per_token": Number}]),
    "train?": dict,  # its table's settings of training, which rows of earlier versions do not tell
    "learning": [[Number]],
    "measured": {"tokens_per_second": Number, "peak_bytes": Natural, "device": str, "dtype": str},
}
"""What a row holds (see `dsmr.console.schema`), besides what is there for a reader."""


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: mean, standard deviation (0 for one seed), and how many."""

    mean: float
    spread: float
    seeds: int

    def text(self, digits: int) -> str:
        mean = round(self.mean, digits) + 0.0  # no minus before a zero
        return f"{mean:.{digits}f}" + (f" ± {self.spread:.{digits}f}" if self.seeds > 1 else "")


@dataclass(frozen=True)
class Line:
    """One model of the report; a figure that was not measured is None."""

    model: str
    title: str
    schedule: str
    seeds: tuple[int, ...]
    our_reading: str
    kv_bytes: int
    figures: dict[str, Figure | None]
    retain: dict[int, Figure]
    returns: dict[str, Figure]
    labels: dict[str, Figure]


FIGURES = {
    "nats a note": lambda row: row["nats_per_note"],
    "perplexity": lambda row: row["perplexity"],
    "KRCU-AUC": lambda row: row["krcu"]["auc"]["mean"],
    "KRCU reset bin": lambda row: row["krcu"]["reset_bin"]["mean"],
    "KRCU tail": lambda row: row["krcu"]["tail"]["mean"],
    "peak memory": lambda row: row["measured"]["peak_bytes"] or None,  # 0: the system does not tell
    "tokens/s": lambda row: row["measured"]["tokens_per_second"],
}
"""What is said of each row, by name."""
COMMON = ("table", "corpus", "split", "pieces", "tokens", "tokenizer_hash")
"""What a report says once, of all its rows."""
DEFAULTS = {entry.name: entry.default for entry in fields(TrainConfig) if entry.default is not MISSING}
WITHOUT_EFFECT = ("threads", "save_minutes")
"""Settings of training that change none of a row's losses."""


def read_rows(*results: str | Path) -> list[dict[str, Any]]:
    """The rows of finished cells, of folders that `run` wrote or of files of rows; in the order of the presets. Of a
    cell that several of them have, the first one's row counts. `UserError` for rows that cannot stand in one report."""
    rows = [(row, path) for path in map(Path, results) for row in _rows_of(path)]
    for row, path in rows:
        for name in COMMON:
            first, where = rows[0]
            if row[name] != first[name]:
                raise UserError(
                    f"one report cannot hold rows whose {name} is {first[name]!r} ({where}) and {row[name]!r} ({path})"
                )
    told = [(row["train"], path) for row, path in rows if "train" in row]
    for train, path in told:
        if changed := setting_that_differs(told[0][0], train):
            name, former, here = changed
            raise UserError(
                f"one report cannot hold rows that were trained with {name} = {former} ({told[0][1]}) "
                f"and with {here} ({path})"
            )
    cells: dict[tuple[str, int], tuple[dict[str, Any], Path]] = {}
    for row, path in rows:
        cells.setdefault((row["model"], row["seed"]), (row, path))
    _check_alike(list(cells.values()))
    order = {name: place for place, name in enumerate(KNOWN)}
    found = [row for row, _ in cells.values()]
    return sorted(found, key=lambda row: (order.get(row["model"], len(order)), row["model"], row["seed"]))


def setting_that_differs(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The name of the first setting of training that two tables do not share, and what it is in each; None if what they
    name and what they leave at its default comes to the same."""
    for name in sorted({*first, *second}.difference(WITHOUT_EFFECT)):
        former, latter = (_plain(table.get(name, DEFAULTS.get(name))) for table in (first, second))
        if former != latter:
            return name, former, latter
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of one folder or file."""
    if path.is_dir():
        rows = [read_row(row) for row in sorted(path.glob("cells/*/row.json"))]
        if not rows:
            raise UserError(f"{path} has no finished cell to report")
        return rows
    if not path.exists():
        raise UserError(f"there are no results at {path}")
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path} is not a file of rows")
    return [checked_row(row, f"{path}, row {place},") for place, row in enumerate(found, 1)]


def read_row(path: Path) -> dict[str, Any]:
    """One row; `UserError` naming the file and the field for one that is damaged."""
    return checked_row(read_json(path), path)


def checked_row(row: Any, where: object) -> dict[str, Any]:
    """`row`; `UserError` naming `where` and the field if it is none, or damaged."""
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise UserError(f"{where} is a row of another version of dsmr")
    check(row, SHAPE, where)
    if not all(len(pair) == 2 for pair in row["learning"]):
        raise UserError(f"{where} is damaged: its learning is not made of pairs")
    return row


def _check_alike(rows: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """`UserError` where two rows of a model were not trained or measured alike, so that they have no mean."""
    first: dict[str, tuple[Any, Any, Path]] = {}
    for row, path in rows:
        trained = row["schedule"], row.get("settings")
        bins = row["returns"]["by_distance"] if row["returns"] else []
        measured = (
            [kept["k"] for kept in row["retain"]],
            [(one["start"], one["end"], one["returns"] > 0) for one in bins],
            [one["label"] for one in row.get("by_label") or ()],
            [(one["start"], one["end"]) for one in row["krcu"]["bins"]] if row["krcu"] else None,
        )
        former = first.setdefault(row["model"], (trained, measured, path))
        if former[:2] != (trained, measured):
            files = " and ".join(dict.fromkeys((str(former[2]), str(path))))
            how = "measured" if former[0] == trained else "trained"
            raise UserError(f"{files}: rows of {row['model']} that were not {how} alike")


def lines_of(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """A line a model, in the order of the rows."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        first = own[0]
        ks = [kept["k"] for kept in first["retain"]]
        bins = first["returns"]["by_distance"] if first["returns"] else []
        found.append(
            Line(
                model,
                first["title"],
                first["schedule"],
                tuple(row["seed"] for row in own),
                first["our_reading"],
                first["kv_bytes"],
                {name: _over(own, ask) for name, ask in FIGURES.items()},
                {k: _figure([row["retain"][n]["delta"]["mean"] for row in own]) for n, k in enumerate(ks)},
                {
                    f"{bins[n]['start']:,} to {bins[n]['end'] - 1:,}": _figure(
                        [row["returns"]["by_distance"][n]["saved"] for row in own]
                    )
                    for n in range(len(bins))
                    if bins[n]["returns"]
                },
                {
                    label["label"]: _figure([row["by_label"][n]["nats_per_token"] for row in own])
                    for n, label in enumerate(first.get("by_label") or ())
                },
            )
        )
    return found


def _over(rows: Sequence[dict[str, Any]], ask: Any) -> Figure | None:
    try:
        return _figure([ask(row) for row in rows])
    except TypeError:  # not measured: there is a null on the way
        return None


def _figure(values: Sequence[float]) -> Figure:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Figure(statistics.fmean(values), spread, len(values))


def rank_correlation(lines: Sequence[Line], ours: str, theirs: str) -> tuple[float, int] | None:
    """Spearman's rank correlation of our figure `ours` with the paper's `theirs` over the models that both have, and
    how many those are; None for fewer than three, or where all are equal."""
    pairs = []
    for line in lines:
        preset, figure = PRESETS.get(line.model), line.figures[ours]
        if preset is not None and preset.paper is not None and figure is not None:
            pairs.append((figure.mean, float(getattr(preset.paper, theirs))))
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(len(set(side)) == 1 for side in ranks):
        return None
    return statistics.correlation(*ranks), len(pairs)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
