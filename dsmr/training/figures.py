"""The picture of a training run: its losses over its steps."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.figures import finish, new_figure


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


def _columns(records: list[Mapping[str, Any]], kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = [record for record in records if record.get("kind") == kind]
    return np.array([r["step"] for r in chosen], dtype=float), np.array([r[key] for r in chosen], dtype=float)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - window, 0)
    return (sums[ends] - sums[begins]) / (ends - begins)
