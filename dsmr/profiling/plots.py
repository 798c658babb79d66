"""The pictures of `dsmr profile`: layers, budget against speed, cost against the length of a piece."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.figures import finish, new_figure, save
from dsmr.profiling.cost import LAYER_PARTS
from dsmr.profiling.profile import Profile, tokens_per_second
from dsmr.profiling.sheets import labels, seconds_by_part

COLOURS = {"attention": "C0", "projections": "C1", "ffn": "C2", "memory (keys, values)": "C0", "kept": "C4"}
MOST_SCHEDULES = 4  # of which the layers are drawn
TRADE = "Cheaper against larger: what a memory costs in speed"
FRONT = "Pareto front: nothing with as much memory is faster"


def curve_label(name: str) -> str:
    """What a curve of `Profile.curves` shows: the key, but for the two that a reader could not guess."""
    words = {"full": "unlimited: every layer remembers the whole piece", "none": "no memory: each segment by itself"}
    return f"{words.get(name, name)}, predicted"


def piece_seconds(row: dict[str, Any]) -> float:
    """Of a measured whole piece what the curves predict: forward and backward, without the update."""
    return row["timings"]["forward"]["median"] + row["timings"]["backward"]["median"]


def pictures(found: Profile, folder: Path) -> list[Path]:
    """Draw all that there is something to draw for; the files written."""
    written = []
    timed = {
        name: rows["train"] for name, rows in found.rows.items() if "train" in rows and "error" not in rows["train"]
    }
    if timed:
        written.append(layers_figure(dict(list(timed.items())[:MOST_SCHEDULES]), folder / "layers.png"))
    if timed or found.proposals:
        written.append(pareto_figure(found, timed, folder / "budget.png"))
    if found.curves:
        written.append(length_figure(found, folder / "length.png"))
    return written


def _wrapped(text: str, width: int = 46) -> str:
    return "\n".join(textwrap.wrap(text, width))


def layers_figure(rows: dict[str, dict[str, Any]], path: Path) -> Path:
    """Time and memory of each layer in a training step, stacked; a column of pictures for each schedule."""
    figure, grid = new_figure(2, len(rows), (2.2 + max(5.3, 3.7 * len(rows)), 6.0), sharey="row")
    grid = np.asarray(grid).reshape(2, len(rows))
    for (name, row), above, below in zip(rows.items(), *grid, strict=True):
        seconds, layers = seconds_by_part(row["parts"]), range(len(row["kv_bytes"]))
        expected = seconds_by_part(row["predicted"]["parts"])
        bottom = np.zeros(len(layers))
        for part in LAYER_PARTS:
            for direction, shade in (("forward", 1.0), ("backward", 0.55)):
                values = np.array([1e3 * seconds[layer, direction, part] for layer in layers])
                above.bar(layers, values, bottom=bottom, color=COLOURS[part], alpha=shade, label=f"{part}, {direction}")
                bottom += values
        sums = [1e3 * sum(s for key, s in expected.items() if key[0] == layer) for layer in layers]
        above.plot(layers, sums, "k_", markersize=14, markeredgewidth=2, label="predicted")
        above.set_title(_wrapped(name), fontsize=9)
        held = np.array(row["kv_bytes"]) / 2**20
        kept = np.array(row["activation_bytes"][1:]) / 2**20
        below.bar(layers, held, color=COLOURS["memory (keys, values)"], label="memory (keys, values)")
        below.bar(layers, kept, bottom=held, color=COLOURS["kept"], label="kept for the backward")
        below.set_xlabel("layer (0 = the lowest)")
        for axes in (above, below):
            axes.grid(alpha=0.3, axis="y")
            axes.set_xticks(layers)
    grid[0, 0].set_ylabel("time in a training step (ms)")
    grid[1, 0].set_ylabel("bytes (MiB)")
    for axes in grid[:, -1]:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    save(figure, path)
    return path


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (memory, speed) points those that no other one with as much memory or more outruns, by rising memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, reverse=True):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front[::-1]


def pareto_figure(found: Profile, timed: dict[str, dict[str, Any]], path: Path) -> Path:
    """Bytes of memory against training tokens a second: measured schedules, and those proposed for a budget."""
    figure, axes = new_figure(size=(7.5, 4.6))
    short = labels(found.rows)
    measured = [(sum(row["kv_bytes"]) / 2**20, tokens_per_second(row), short[name]) for name, row in timed.items()]
    proposed = [
        (p.bytes / 2**20, p.tokens_per_second, p.schedule.partition("(")[0] + " (control)" * p.control)
        for p in found.proposals
    ]
    for points, style, label in ((measured, "C0o", "measured"), (proposed, "C1s", "proposed (predicted)")):
        if not points:
            continue
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, label=label)
    _name_points(axes, [*measured, *proposed])
    front = pareto_front([(x, y) for x, y, _ in (measured or proposed)])
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, drawstyle="steps-pre", zorder=0, label=FRONT)
    axes.margins(x=0.22, y=0.15)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), fontsize=8, frameon=False, ncols=3)
    axes.set_xlabel("keys and values of all layers (MiB): larger remembers more →")
    axes.set_ylabel("training (tokens/s): faster is cheaper →")
    axes.set_title(TRADE)
    axes.grid(alpha=0.3)
    save(figure, path)
    return path


def _name_points(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """Names beside points, one text for those that lie together; to the left of what is far right."""
    across, up = [x for x, _, _ in points], [y for _, y, _ in points]
    left, wide, tall = min(across), max(across) - min(across) or 1.0, max(up) - min(up) or 1.0
    placed: list[tuple[float, float, list[str]]] = []
    for x, y, name in points:
        near = next((one for one in placed if abs(one[0] - x) < 0.03 * wide and abs(one[1] - y) < 0.06 * tall), None)
        if near is None:
            placed.append((x, y, [name]))
        else:
            near[2].append(name)
    for x, y, names in placed:
        after = x - left <= wide / 2
        axes.annotate(
            _wrapped(", ".join(names), 30),
            (x, y),
            textcoords="offset points",
            xytext=(7, 0) if after else (-7, 0),
            ha="left" if after else "right",
            va="center",
            fontsize=8,
        )


def length_figure(found: Profile, path: Path) -> Path:
    """Seconds to go forward and back through a piece by its length: predicted as lines, measured as crosses."""
    figure, axes = new_figure(size=(7.5, 4.6))
    for number, (name, points) in enumerate(found.curves.items()):
        axes.plot(*zip(*points, strict=True), color=f"C{number}", marker="o", markersize=3, label=curve_label(name))
    pieces = {name: rows["piece"] for name, rows in found.rows.items() if "timings" in rows.get("piece", {})}
    middle = np.mean([row["timings"]["all"]["median"] for row in pieces.values()]) if pieces else 0.0
    for number, (name, row) in enumerate(pieces.items()):
        label = f"measured ({row['tokens']:,} tokens)" if number == 0 else None
        axes.plot([row["tokens"]], [piece_seconds(row)], "kx", markersize=7, label=label)
        above = row["timings"]["all"]["median"] >= middle
        axes.annotate(
            f"{labels(found.rows)[name]}, measured",
            (row["tokens"], piece_seconds(row)),
            textcoords="offset points",
            fontsize=8,
            xytext=(-6, 4) if above else (6, -10),
            ha="right" if above else "left",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([n for n, _ in next(iter(found.curves.values()))])
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k")
    axes.set_yscale("log")
    axes.set_xlabel("length of the piece (tokens, k: 1,024)")
    axes.set_ylabel("forward and backward (s): lines predicted, crosses measured")
    axes.yaxis.label.set_size(9)
    finish(figure, axes, path, "")
    return path
