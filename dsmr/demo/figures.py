"""The picture of `dsmr demo`: how surprised the two models are, on average and along one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.figures import entitle, save
from dsmr.evaluation.report import EvaluationReport
from dsmr.music.pianoroll import FAINT, INK

WITH_MEMORY, WITHOUT_MEMORY = "#e2711d", "#6c7a89"
REFRAIN = "#f3d27a"
WINDOW = 4.0  # seconds over which the loss along a piece is averaged


@dataclass(frozen=True)
class Refrain:
    """Where the refrain sounds, `start` to `end` in seconds; `returns` is False for its first statement."""

    start: float
    end: float
    returns: bool


def refrains(labels: np.ndarray, clock: np.ndarray) -> list[Refrain]:
    """The stretches of a piece with label 1 (first statement) or 2 (return); `clock` in seconds at each token."""
    borders = np.flatnonzero(np.diff(labels)) + 1
    found = []
    for begin, end in zip([0, *borders], [*borders, len(labels)], strict=True):
        if labels[begin] in (1, 2):
            found.append(Refrain(float(clock[begin]), float(clock[end - 1]), bool(labels[begin] == 2)))
    return found


def smoothed(clock: np.ndarray, losses: np.ndarray, at: np.ndarray, window: float = WINDOW) -> np.ndarray:
    """The mean loss of the tokens within half a `window` of each time of `at`; NaN where there is none."""
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    begin = np.searchsorted(clock, at - window / 2, side="left")
    end = np.searchsorted(clock, at + window / 2, side="right")
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(end > begin, (sums[end] - sums[begin]) / (end - begin), np.nan)


def comparison_figure(
    path: str | Path,
    reports: Mapping[str, EvaluationReport],
    piece: str,
    clock: np.ndarray,
    along: Mapping[str, np.ndarray],
    stretches: Sequence[Refrain],
) -> None:
    """Left: loss on each kind of passage, bars for each model. Right: the loss along one piece, refrains shaded.

    `reports` and `along` have the model with memory first. `clock` and each of `along` are (tokens,).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.1))
    colours = dict(zip(reports, (WITH_MEMORY, WITHOUT_MEMORY), strict=False))
    _bars(left, reports, colours)
    _curves(right, clock, along, stretches, colours)
    title = f"along one validation piece ({piece}), mean over {WINDOW:g} s"
    entitle(right, title, loc="left", color=INK, fontsize=11)
    save(figure, path, dpi=110)


def _bars(ax: Any, reports: Mapping[str, EvaluationReport], colours: Mapping[str, str]) -> None:
    width = 0.8 / len(reports)
    names: list[str] = []
    for number, (model, report) in enumerate(reports.items()):
        losses = report.by_label or ()
        names = [loss.label for loss in losses]
        where = np.arange(len(losses)) + (number - (len(reports) - 1) / 2) * width
        values = [loss.nats_per_token for loss in losses]
        bars = ax.bar(where, values, width * 0.94, color=colours[model], label=model)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], color=INK, fontsize=9, padding=2)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("loss (nats a token)", color=INK)
    ax.set_title("validation, mean by passage", loc="left", color=INK, fontsize=11)
    ax.margins(y=0.14)
    _plain(ax)


def _curves(
    ax: Any,
    clock: np.ndarray,
    along: Mapping[str, np.ndarray],
    stretches: Sequence[Refrain],
    colours: Mapping[str, str],
) -> None:
    at = np.arange(0.0, float(clock[-1]), 0.25)
    for model, losses in along.items():
        ax.plot(at, smoothed(clock, losses, at), color=colours[model], linewidth=1.6, label=model)
    top = 1.12 * ax.get_ylim()[1]  # room for the refrains' names
    for stretch in stretches:
        ax.axvspan(stretch.start, stretch.end, color=REFRAIN, alpha=0.45 if stretch.returns else 0.2, linewidth=0)
        name = "refrain returns" if stretch.returns else "refrain"
        ax.annotate(name, (stretch.start, top), (4, -3), textcoords="offset points", va="top", color=INK, fontsize=9)
    ax.set_xlim(0, float(clock[-1]))
    ax.set_ylim(0, top)
    ax.set_xlabel("time (s)", color=INK)
    ax.legend(loc="lower left", frameon=False, labelcolor=INK)
    _plain(ax)


def _plain(ax: Any) -> None:
    ax.tick_params(colors=INK, length=0)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
