"""The charts of the page: what `plots` draws as pictures, as plain figures that `page.js` draws with hover values.

A chart is a dictionary with a name, a title and axes (label, unit, a note, whether logarithmic). Kind "lines" has
series of (x, y, name of the point) drawn as "points", "line" or "steps"; kind "bars" a stack of values a category.
"""

from __future__ import annotations

from typing import Any

from dsmr.profiling.cost import LAYER_PARTS
from dsmr.profiling.plots import FRONT, MOST_SCHEDULES, TRADE, curve_label, pareto_front, piece_seconds
from dsmr.profiling.profile import Profile, Row, tokens_per_second
from dsmr.profiling.sheets import labels, seconds_by_part

Chart = dict[str, Any]


def charts(found: Profile) -> list[Chart]:
    """All that there is something to draw for."""
    short = labels(found.rows)
    timed = {name: rows["train"] for name, rows in found.rows.items() if "timings" in rows.get("train", {})}
    made = []
    if timed or found.proposals:
        made.append(_budget(found, timed))
    if found.curves:
        made.append(_lengths(found))
    for name, row in list(timed.items())[:MOST_SCHEDULES]:
        made += [_seconds(short[name], row), _bytes(short[name], row)]
    return made


def _axis(label: str, unit: str, log: bool = False, note: str = "") -> Chart:
    return {"label": label, "unit": unit, "log": log, "note": note}


def _series(name: str, mark: str, points: list[Any], colour: int) -> Chart:
    return {"name": name, "mark": mark, "points": points, "colour": colour}


def _budget(found: Profile, timed: dict[str, Row]) -> Chart:
    short = labels(found.rows)
    measured: list[list[Any]] = [
        [sum(row["kv_bytes"]) / 2**20, tokens_per_second(row), short[name]] for name, row in timed.items()
    ]
    proposed: list[list[Any]] = [[p.bytes / 2**20, p.tokens_per_second, p.schedule] for p in found.proposals]
    front = pareto_front([(x, y) for x, y, _ in (measured or proposed)])
    series = [
        _series("measured", "points", measured, 0),
        _series("proposed (predicted)", "points", proposed, 1),
        _series(FRONT, "steps", [[x, y, ""] for x, y in front], 7),
    ]
    return {
        "name": "budget",
        "kind": "lines",
        "title": TRADE,
        "x": _axis("keys and values", "MiB", note="larger remembers more"),
        "y": _axis("training", "tokens/s", note="faster is cheaper"),
        "series": [one for one in series if one["points"]],
    }


def _lengths(found: Profile) -> Chart:
    short = labels(found.rows)
    series = [
        _series(curve_label(name), "line", [[x, y, ""] for x, y in points], number)
        for number, (name, points) in enumerate(found.curves.items())
    ]
    pieces = {name: rows["piece"] for name, rows in found.rows.items() if "timings" in rows.get("piece", {})}
    measured = [[row["tokens"], piece_seconds(row), short[name]] for name, row in pieces.items()]
    if measured:
        series.append(_series("measured", "points", measured, 7))
    return {
        "name": "length",
        "kind": "lines",
        "title": "What a piece costs by its length: lines predicted, points measured",
        "x": _axis("length of the piece", "tokens", log=True),
        "y": _axis("forward and backward", "s", log=True),
        "series": series,
    }


def _bars(name: str, title: str, label: str, unit: str, row: Row, series: list[Chart]) -> Chart:
    return {
        "name": name,
        "kind": "bars",
        "title": title,
        "x": _axis("layer", "", note="0 is the lowest"),
        "y": _axis(label, unit),
        "categories": [str(layer) for layer in range(len(row["kv_bytes"]))],
        "series": series,
    }


def _seconds(short: str, row: Row) -> Chart:
    seconds, layers = seconds_by_part(row["parts"]), range(len(row["kv_bytes"]))
    expected = seconds_by_part(row["predicted"]["parts"])
    series = [
        {
            "name": f"{part}, {direction}",
            "values": [1e3 * seconds[layer, direction, part] for layer in layers],
            "colour": colour,
            "pale": direction == "backward",
        }
        for colour, part in enumerate(LAYER_PARTS)
        for direction in ("forward", "backward")
    ]
    chart = _bars(f"seconds of {short}", f"Time of each layer: {short}", "a training step", "ms", row, series)
    sums = [1e3 * sum(s for key, s in expected.items() if key[0] == layer) for layer in layers]
    return {**chart, "marks": {"name": "predicted, all", "values": sums}}


def _bytes(short: str, row: Row) -> Chart:
    series = [
        {"name": name, "values": [count / 2**20 for count in counts], "colour": colour, "pale": False}
        for name, counts, colour in (
            ("memory (keys, values)", row["kv_bytes"], 0),
            ("kept for the backward", row["activation_bytes"][1:], 3),
        )
    ]
    return _bars(f"bytes of {short}", f"Memory of each layer: {short}", "a training step", "MiB", row, series)
