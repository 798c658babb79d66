"""The pictures of training and evaluation: loss over steps, and loss against the position in the piece.

Matplotlib is imported only when something is drawn; `available()` says whether it can be.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr.errors import UserError
from dsmr.files import atomic_path

if TYPE_CHECKING:
    from dsmr.evaluation import EvaluationReport

DPI = 120


def available() -> bool:
    """Whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def loss_figure(records: Iterable[Mapping[str, Any]], png_path: str | Path, title: str = "") -> None:
    """Draw the training and validation losses of a run's metrics (nats a token, over steps)."""
    records = list(records)
    steps, losses = _columns(records, "train", "loss")
    figure, axes = new_figure()
    if len(steps):
        window = max(1, len(losses) // 100)
        smooth = _running_mean(losses, window)
        axes.plot(steps, losses, color="0.8", linewidth=0.6)
        axes.plot(steps, smooth, color="C0", label=f"training (mean of {window} steps)" if window > 1 else "training")
        # The first steps of a run are far above everything that follows and would flatten the rest.
        lowest, usual = float(losses.min()), float(np.quantile(smooth, 0.98))
        axes.set_ylim(lowest - 0.05 * (usual - lowest) - 1e-3, usual + 0.15 * (usual - lowest) + 1e-3)
    steps, losses = _columns(records, "validation", "loss")
    if len(steps):
        axes.plot(steps, losses, color="C1", marker="o", markersize=3, label="validation")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, float(losses.min()) - 0.05), high)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    finish(figure, axes, png_path, title)


def position_figure(reports: "Mapping[str, EvaluationReport]", png_path: str | Path, title: str = "") -> None:
    """Draw the loss against the position in the piece, one line for each report, over how many tokens each bin has."""
    figure, axes = new_figure()
    below = axes.twinx()
    for number, (name, report) in enumerate(reports.items()):
        bins = report.by_position
        middles = [(b.start + b.end) / 2 for b in bins]
        values = [b.nats_per_token for b in bins]
        axes.plot(middles, values, color=f"C{number}", marker="o", markersize=3, label=name)
        if number == 0:
            width = [0.9 * (b.end - b.start) for b in bins]
            below.bar(middles, [b.tokens for b in bins], width=width, color="0.9", zorder=0)
    axes.set_zorder(below.get_zorder() + 1)
    axes.patch.set_visible(False)
    below.set_ylabel("tokens in the bin", color="0.6")
    below.tick_params(axis="y", colors="0.6")
    axes.set_xlabel("position in the piece (tokens)")
    axes.set_ylabel("loss (nats a token)")
    finish(figure, axes, png_path, title)


def _columns(records: list[Mapping[str, Any]], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = [record for record in records if record.get("kind") == kind]
    return np.array([r["step"] for r in chosen], dtype=float), np.array([r[key] for r in chosen], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.2), **options: Any) -> Any:
    """A figure and its axes, without pyplot: no window system, no state shared with the caller's own plots."""
    if not available():
        raise UserError("drawing needs Matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def finish(figure: Any, axes: Any, png_path: str | Path, title: str) -> None:
    """Grid, title, legend, and write the picture, whole or not at all."""
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save(figure, png_path)


def save(figure: Any, png_path: str | Path) -> None:
    """Write the picture, whole or not at all."""
    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
