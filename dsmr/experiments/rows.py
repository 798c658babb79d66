"""Rows of finished cells, and what they say together: seeds put together as a mean and a spread."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import read_json
from dsmr.console.schema import Maybe, Natural, Real, check
from dsmr.experiments.presets import KNOWN, PRESETS
from dsmr.runs.settings import TrainConfig

FORMAT = 1
MEAN = {"mean": Real}
PERHAPS = {"mean": Maybe(Real)}  # of bins that no piece may reach
SHAPE = {
    **dict.fromkeys(("table", "model", "title", "our_reading", "schedule", "corpus", "split", "tokenizer_hash"), str),
    **dict.fromkeys(("seed", "kv_bytes", "trained_tokens", "parameters", "pieces", "tokens"), Natural),
    **dict.fromkeys(("nats_per_note", "perplexity"), Real),
    "krcu": Maybe(
        {
            **dict.fromkeys(("auc", "reset_bin"), MEAN),
            "tail": PERHAPS,
            "reset": Natural,
            "bins": [{**dict.fromkeys(("start", "end", "tokens"), Natural), "delta": PERHAPS}],
        }
    ),
    "retain": [{"k": Natural, "delta": MEAN}],
    "returns": Maybe({"by_distance": [{**dict.fromkeys(("start", "end", "returns"), Natural), "saved": Maybe(Real)}]}),
    "by_label?": Maybe([{"label": str, "nats_per_token": Real}]),
    "train?": dict,  # its table's settings of training, which rows of earlier versions do not tell
    "learning": [[Real]],
    "measured": {
        "tokens_per_second": Real,
        "peak_bytes": Natural,
        "device": str,
        "device_type?": str,  # "cpu" or "cuda", which rows of earlier versions do not tell
        "dtype": str,
    },
}
"""What a row holds (see `dsmr.console.schema`), besides what is there for a reader."""


@dataclass(frozen=True)
class Figure:
    """A figure over seeds: mean, standard deviation (None for one seed), and how many."""

    mean: float
    spread: float | None
    seeds: int

    def text(self, digits: int) -> str:
        mean = round(self.mean, digits) + 0.0  # no minus before a zero
        return f"{mean:.{digits}f}" + ("" if self.spread is None else f" ± {self.spread:.{digits}f}")


@dataclass(frozen=True)
class Line:
    """One model of the report; a figure that was not measured, or not on one kind of device, is None.

    Attributes:
        devices: what its seeds were trained on, by name.
        device_types: the same as "cpu" or "cuda".
    """

    model: str
    title: str
    schedule: str
    seeds: tuple[int, ...]
    our_reading: str
    kv_bytes: int
    devices: tuple[str, ...]
    device_types: tuple[str, ...]
    figures: dict[str, Figure | None]
    retain: dict[int, Figure]
    returns: dict[str, Figure]
    labels: dict[str, Figure]


FIGURES: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "nats a note": lambda row: row["nats_per_note"],
    "perplexity": lambda row: row["perplexity"],
    "KRCU-AUC": lambda row: row["krcu"]["auc"]["mean"],
    "KRCU reset bin": lambda row: row["krcu"]["reset_bin"]["mean"],
    "KRCU tail": lambda row: row["krcu"]["tail"]["mean"],
    "peak memory": lambda row: row["measured"]["peak_bytes"] or None,  # 0: the system does not tell
    "tokens/s": lambda row: row["measured"]["tokens_per_second"],
}
"""What is said of each row, by name."""


def device_type(row: Mapping[str, Any]) -> str:
    """Whether a row was trained on a "cpu" or on "cuda"."""
    measured = row["measured"]
    told = measured.get("device_type")
    return told or ("cuda" if measured["device"].startswith("NVIDIA") else "cpu")  # earlier rows name the device alone


ALIKE: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "peak memory": device_type,  # of a GPU PyTorch counts what it holds, of a CPU the system what the process holds
    "tokens/s": lambda row: row["measured"]["device"],
}
"""What rows must share for a figure of them to have a mean."""
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
    _check_columns(list(cells.values()))
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


def _check_columns(rows: Sequence[tuple[dict[str, Any], Path]]) -> None:
    """`UserError` where rows, also of two models, would have in one column what was measured in two ways."""
    first: dict[str, tuple[str, str, Path]] = {}
    for row, path in rows:
        krcu, returns = row["krcu"], row["returns"]
        for what, way in (
            ("KRCU", krcu and f"{_which(krcu['bins'])} after a reset at {krcu['reset']:,}"),
            ("planted returns", returns and _which(returns["by_distance"])),
        ):
            if not way:
                continue
            model, former, where = first.setdefault(what, (row["model"], way, path))
            if former != way:
                files = " and ".join(dict.fromkeys((str(where), str(path))))
                raise UserError(
                    f"{files}: one report cannot hold {what} of {model}, measured in {former}, "
                    f"and of {row['model']}, measured in {way}"
                )


def _which(bins: Sequence[Mapping[str, Any]]) -> str:
    """Which bins they are: where all begin and end, or of many alike the first and the last."""
    if len(bins) > 2 and len({one["end"] - one["start"] for one in bins}) == 1:
        return f"{len(bins)} bins from {bins[0]['start']:,} to {bins[-1]['end'] - 1:,}"
    return "bins of " + ", ".join(map(bin_name, bins))


def bin_name(one: Mapping[str, Any]) -> str:
    """The tokens from the first to the last of a bin."""
    return f"{one['start']:,} to {one['end'] - 1:,}"


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
                tuple(dict.fromkeys(row["measured"]["device"] for row in own)),
                tuple(dict.fromkeys(map(device_type, own))),
                {name: _over(own, name) for name in FIGURES},
                {k: _figure([row["retain"][n]["delta"]["mean"] for row in own]) for n, k in enumerate(ks)},
                {
                    bin_name(bins[n]): _figure([row["returns"]["by_distance"][n]["saved"] for row in own])
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


def _over(rows: Sequence[dict[str, Any]], name: str) -> Figure | None:
    if name in ALIKE and len({ALIKE[name](row) for row in rows}) > 1:
        return None
    try:
        return _figure([FIGURES[name](row) for row in rows])
    except TypeError:  # not measured: there is a null on the way
        return None


def _figure(values: Sequence[float]) -> Figure:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Figure(statistics.fmean(values), spread, len(values))


def rank_correlation(lines: Sequence[Line], ours: str, theirs: str) -> tuple[float, int] | None:
    """Spearman's rank correlation of our figure `ours` with the paper's `theirs` over the models that both have, and
    how many those are; None for fewer than three, where all are equal, or for `mixed_devices`."""
    pairs = []
    for line in [] if mixed_devices(lines, ours) else lines:
        preset, figure = PRESETS.get(line.model), line.figures[ours]
        if preset is not None and preset.paper is not None and figure is not None:
            pairs.append((figure.mean, float(getattr(preset.paper, theirs))))
    if len(pairs) < 3:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(len(set(side)) == 1 for side in ranks):
        return None
    return statistics.correlation(*ranks), len(pairs)


def mixed_devices(lines: Sequence[Line], ours: str) -> bool:
    """Whether the paper's models were measured on several kinds of device, and the figure `ours` tells these apart."""
    papers = [line for line in lines if line.model in PRESETS]
    return ours in ALIKE and len({kind for line in papers for kind in line.device_types}) > 1


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]
