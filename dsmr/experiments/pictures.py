"""The pictures of a report: the paper's bars, dNLL after a reset, Pareto fronts against bytes, learning curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.figures import finish, new_figure, save
from dsmr.experiments.rows import Figure, Line

COLOURS = tuple(f"C{n}" for n in range(10))
MARKERS = "osD^v"
NAMES = ("bars", "krcu", "fronts", "returns", "learning")
"""The pictures that a report may have, each a PNG of this name."""
BESIDE, AWAY = 7.0, 24.0  # points from a marker to its name, where that stands beside it or has a line to it


def draw(rows: Sequence[dict[str, Any]], lines: Sequence[Line], folder: Path) -> list[Path]:
    """Draw what was measured; returns the pictures."""
    drawn = [bars(lines, folder / "bars.png")]
    if any(row["krcu"] for row in rows):
        drawn.append(curves(rows, folder / "krcu.png"))
    drawn.append(fronts(lines, folder / "fronts.png"))
    if any(row["returns"] for row in rows):
        drawn.append(returns(rows, folder / "returns.png"))
    if any(row["learning"] for row in rows):
        drawn.append(learning(rows, folder / "learning.png"))
    return drawn


def _style(number: int) -> dict[str, Any]:
    """A colour, and from the eleventh model on another marker and line."""
    again = number // len(COLOURS) % len(MARKERS)
    line = ("-", "--", ":", "-.", "-")[again]
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[again], "markersize": 4, "linestyle": line}


def _models(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [r for r in rows if r["model"] == name] for name in dict.fromkeys(row["model"] for row in rows)}


def bars(lines: Sequence[Line], path: Path) -> Path:
    """The paper's bars: loss, KRCU, bytes; a row of bars for each model."""
    shown = [name for name in ("nats a note", "KRCU-AUC", "KRCU tail") if any(line.figures[name] for line in lines)]
    figure, axes = new_figure(1, len(shown) + 1, (3.4 * (len(shown) + 1), 0.36 * len(lines) + 1.4), sharey=True)
    places = np.arange(len(lines))[::-1]
    for axis, name in zip(axes, shown, strict=False):
        found = [line.figures[name] for line in lines]
        means = [math.nan if f is None else f.mean for f in found]
        spreads = [math.nan if f is None or f.spread is None else f.spread for f in found]
        axis.barh(places, means, xerr=spreads, color="C0", error_kw={"capsize": 2, "ecolor": "0.3"})
        axis.set_xlabel(name)
        if name == "nats a note":  # differences are small beside the loss itself
            begin, end = _limits([f for f in found if f is not None])
            axis.set_xlim(begin, end)
            axis.set_xlabel(f"{name} (axis from {begin:g})")
    axes[-1].barh(places, [line.kv_bytes / 2**20 for line in lines], color="C2")
    axes[-1].set_xlabel("KV memory (MiB a stream)")
    axes[0].set_yticks(places, [line.model for line in lines])
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
    save(figure, path)
    return path


def _limits(found: Sequence[Figure]) -> tuple[float, float]:
    """Of an axis that does not begin at 0: a short number below all bars and their spreads, and one above them."""
    low = min(f.mean - (f.spread or 0.0) for f in found)
    high = max(f.mean + (f.spread or 0.0) for f in found)
    room = max(high - low, 0.01)
    step = 10.0 ** math.floor(math.log10(room))
    begin = math.floor((low - 0.2 * room) / step) * step
    return begin, high + 0.1 * room


def curves(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """What a reset costs, bin by bin, the mean over seeds."""
    figure, axes = new_figure(size=(8.5, 5))
    for number, (name, own) in enumerate(_models(rows).items()):
        if any(row["krcu"] is None for row in own):
            continue
        bins = [b for b in own[0]["krcu"]["bins"] if b["tokens"]]
        at = [(b["start"] + b["end"]) / 2 - own[0]["krcu"]["reset"] for b in bins]
        values = np.mean([[b["delta"]["mean"] for b in row["krcu"]["bins"][: len(bins)]] for row in own], axis=0)
        axes.plot(at, values, label=name, linewidth=1.2, **_style(number))
    axes.set_yscale("symlog", linthresh=0.005)
    axes.set_xlabel("tokens since all memory was reset")
    axes.set_ylabel("loss more than without the reset (nats a token)")
    finish(figure, axes, path, "")
    return path


def fronts(lines: Sequence[Line], path: Path) -> Path:
    """Nats a note and, where it was measured, KRCU's tail against the bytes of memory; the front is drawn through."""
    shown = [("nats a note", 1)] + [("KRCU tail", -1)] * any(line.figures["KRCU tail"] for line in lines)
    figure, axes = new_figure(1, len(shown), (6.2 * len(shown), 4.6), squeeze=False)
    names: dict[Any, list[Any]] = {axis: [] for axis in axes[0]}
    for axis, (name, sign) in zip(axes[0], shown, strict=True):
        points = [(line, line.kv_bytes / 2**20, figure_.mean) for line in lines if (figure_ := line.figures[name])]
        for line, x, y in points:
            style = {**_style(list(lines).index(line)), "linestyle": ""}
            found = line.figures[name]
            assert found is not None
            axis.errorbar([x], [y], found.spread, elinewidth=0.7, capsize=2, **style)
        front = [(x, y) for _, x, y in points if not any(_beats((v, sign * w), (x, sign * y)) for _, v, w in points)]
        axis.plot(*zip(*sorted(front), strict=True), color="0.6", linewidth=0.9, drawstyle="steps-post", zorder=0)
        for line, x, y in points:
            names[axis].append(_name(axis, line.model, (x, y), (BESIDE, -3)))
        axis.margins(0.12)
        axis.set_xlabel("KV memory (MiB a stream)")
        axis.set_ylabel(name if sign > 0 else f"{name} (nats a token)")
        axis.grid(alpha=0.3)
    figure.draw_without_rendering()  # only then is it known where anything stands
    for axis, written in names.items():
        for name in _keep_apart(written, 72 / figure.dpi):
            colour = _style([line.model for line in lines].index(name.get_text()))["color"]
            _name(axis, name.get_text(), name.xy, name.xyann, colour)
            name.remove()
    save(figure, path)
    return path


def _name(axis: Any, text: str, at: tuple[float, float], beside: tuple[float, float], line: str | None = None) -> Any:
    """Write the name of the point `at`, `beside` points from there; with a thin line to it in the colour `line`."""
    leader = None
    if line is not None:
        leader = {"arrowstyle": "-", "color": line, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 2}
    name = axis.annotate(text, at, beside, textcoords="offset points", fontsize=8, arrowprops=leader)
    name.set_in_layout(False)  # else the axes would change where a name is moved
    return name


def _keep_apart(names: Sequence[Any], scale: float) -> list[Any]:
    """Move names that stand beside points up or down until none covers another; returns those that have left their
    points, which stand farther to the right. `scale` is a pixel in points."""
    own = {name: name.xyann[1] for name in names}
    away: list[Any] = []
    while True:
        for name in names:
            name.xyann = AWAY if name in away else BESIDE, own[name]
        _stack(names, scale)
        found = [name for name in names if name in away or abs(name.xyann[1] - own[name]) > 3]
        if found == away:
            return away
        away = found  # farther to the right they may stand in the way of others


def _stack(names: Sequence[Any], scale: float) -> None:
    """Stack names that would cover each other, the stack where they are in the mean."""
    apart = 11.0  # points from name to name, a little more than they are high
    boxes = {name: name.get_window_extent() for name in names}
    left = sorted(names, key=lambda name: boxes[name].x0)
    while left:
        column = [left.pop(0)]  # names of which each overlaps another in width
        end = boxes[column[0]].x1
        while left and boxes[left[0]].x0 < end:
            column.append(left.pop(0))
            end = max(end, boxes[column[-1]].x1)
        stacks: list[tuple[float, list[Any]]] = []  # the middle of each, and who is in it
        for name in sorted(column, key=lambda name: boxes[name].y0):
            middle, stack = boxes[name].y0 * scale, [name]
            while stacks and middle - stacks[-1][0] < apart * (len(stack) + len(stacks[-1][1])) / 2:
                lower, below = stacks.pop()
                middle = (lower * len(below) + middle * len(stack)) / (len(below) + len(stack))
                stack = below + stack
            stacks.append((middle, stack))
        for middle, stack in stacks:
            for place, name in enumerate(stack):
                x, y = name.xyann
                height = middle + apart * (place - (len(stack) - 1) / 2)
                name.xyann = x, y + height - boxes[name].y0 * scale


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether `one` is at most as large as `other` in both, and smaller in one."""
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def returns(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """What is saved at planted returns by distance, the mean over seeds."""
    figure, axes = new_figure(size=(8.5, 5))
    for number, (name, own) in enumerate(_models(rows).items()):
        if any(row["returns"] is None for row in own):
            continue
        found = [[b for b in row["returns"]["by_distance"] if b["returns"]] for row in own]
        at = [(b["start"] * b["end"]) ** 0.5 for b in found[0]]
        saved = np.mean([[b["saved"] for b in bins] for bins in found], axis=0)
        axes.plot(at, saved, label=name, linewidth=1.2, **_style(number))
    axes.set_xscale("log", base=2)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("distance of the return (tokens)")
    axes.set_ylabel("saved at the return (nats a token)")
    finish(figure, axes, path, "")
    return path


def learning(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Validation loss over the tokens read, a line for each cell."""
    figure, axes = new_figure(size=(8.5, 5))
    for number, (name, own) in enumerate(_models(rows).items()):
        label: str | None = name
        for row in own:
            if row["learning"]:
                tokens, losses = zip(*row["learning"], strict=True)
                axes.plot([n / 1e6 for n in tokens], losses, label=label, linewidth=1.0, **_style(number))
                label = None  # a name stands in the legend once
    axes.set_xlabel("tokens of training (millions)")
    axes.set_ylabel("validation loss (nats a note)")
    finish(figure, axes, path, "")
    return path
