"""What every picture begins and ends with: a figure without a window system, and a PNG written whole or not at all.

Matplotlib is imported only when something is drawn; `available()` says whether it can be.
"""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path
from dsmr.console.shown import shown

DPI = 120
BESIDE = 8  # a legend of more names stands beside the picture: it would cover what is drawn


def available() -> bool:
    """Whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.2), **options: Any) -> Any:
    """A figure and its axes, without pyplot: no window system, no state shared with the caller's own plots."""
    if not available():
        raise UserError("drawing needs Matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def entitle(axes: Any, title: str, **options: Any) -> None:
    """A title that may quote a name of the user's, whatever it holds: text that is no Unicode, a newline, a formula."""
    axes.set_title(shown(title), parse_math=False, **options)


def finish(figure: Any, axes: Any, png_path: str | Path, title: str) -> None:
    """Grid, title, legend, and write the picture, whole or not at all."""
    axes.grid(alpha=0.3)
    if title:
        entitle(axes, title)
    named = len(axes.get_legend_handles_labels()[0])
    if named > BESIDE:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, frameon=False)
    elif named:
        axes.legend()
    save(figure, png_path)


def save(figure: Any, png_path: str | os.PathLike[str], dpi: int = DPI) -> None:
    """Write the picture, whole or not at all. A letter that its font has not is drawn as a box, and nothing is said."""
    with atomic_path(png_path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, dpi=dpi, format="png")
