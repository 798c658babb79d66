"""Draw notes as a piano roll: seconds across, pitch upwards, the prompt in one colour and its continuation in another.

A long piece wraps into rows like the systems of a score, so that a note stays visible. Loud notes are strong, soft
notes pale. Sections (for instance a rondo's refrains) may be shaded behind the notes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.figures import entitle, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue and orange that stay apart for colour-blind readers and in grey print.
PROMPT_COLOUR = "#2f5d8a"
CONTINUATION_COLOUR = "#e2711d"
INK, FAINT, PAPER = "#333333", "#dddddd", "#ffffff"
SECTION_COLOURS = ("#f3d27a", "#b9d7c0", "#d3c4e3", "#f2bfb4", "#bcd5ea")

PITCH_NAMES = ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")
BLACK_KEYS = frozenset({1, 3, 6, 8, 10})
ROWS_AT_MOST = 8
SECONDS_A_ROW = 45.0

# onset and duration in seconds, pitch 0 to 127, velocity 1 to 127
NOTE = np.dtype([("onset", "f8"), ("duration", "f8"), ("pitch", "i4"), ("velocity", "i4")])


@dataclass(frozen=True)
class Shading:
    """A stretch of time shaded behind the notes, `start` to `end` in seconds; equal labels share a colour."""

    label: str
    start: float
    end: float


def pitch_name(pitch: int) -> str:
    """The name of a MIDI pitch; 60 is C4."""
    return f"{PITCH_NAMES[pitch % 12]}{pitch // 12 - 1}"


def score_notes(score: Any) -> np.ndarray:
    """The notes of a symusic score at 120 quarters a minute (as `dsmr` reads and decodes them): a `NOTE` array."""
    a_second = score.ticks_per_quarter * 2
    rows = [
        (note.time / a_second, note.duration / a_second, note.pitch, note.velocity)
        for track in score.tracks
        for note in track.notes
    ]
    notes = np.array(rows, dtype=NOTE)
    return notes[np.lexsort((notes["pitch"], notes["onset"]))]


def draw_pianoroll(
    path: str | os.PathLike[str],
    notes: np.ndarray,
    *,
    continuation_from: float | None = None,
    continuation: np.ndarray | None = None,
    sections: Sequence[Shading] = (),
    title: str | None = None,
    seconds_a_row: float | None = None,
) -> None:
    """Write a PNG of `notes` (a `NOTE` array: onset and duration in seconds, pitch, velocity).

    continuation       further notes, in the second colour; by default those of `notes` from `continuation_from` on
    continuation_from  the second at which the prompt ends, marked by a line
    sections           stretches shaded behind the notes and labelled
    seconds_a_row      where the roll wraps; by default 45 seconds, more for pieces too long for eight rows

    Raises `UserError` if there is no note to draw or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prompt = notes
    if continuation is None:
        late = np.zeros(len(notes), dtype=bool) if continuation_from is None else notes["onset"] >= continuation_from
        prompt, continuation = notes[~late], notes[late]
    everything = np.concatenate([prompt, continuation])
    if not len(everything):
        raise UserError(f"there is no note to draw in {path}")
    end = float((everything["onset"] + everything["duration"]).max())
    row_seconds, n_rows = _rows(end, seconds_a_row)
    low, high = _pitch_range(everything["pitch"])

    figure = Figure(figsize=(13, 0.9 + n_rows * max(1.9, 3.4 / n_rows**0.5)), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, 1, squeeze=False)[:, 0]
    colours = _section_colours(sections)
    for row, ax in enumerate(axes):
        start = row * row_seconds
        _draw_keyboard(ax, low, high)
        ax.set_xlim(start, start + row_seconds)
        _draw_sections(ax, sections, colours, start, start + row_seconds, high)
        _draw_notes(ax, prompt, PROMPT_COLOUR, start, start + row_seconds)
        _draw_notes(ax, continuation, CONTINUATION_COLOUR, start, start + row_seconds)
        if continuation_from is not None and start <= continuation_from < start + row_seconds:
            ax.axvline(continuation_from, color=INK, linewidth=1.1, linestyle=(0, (4, 2)), zorder=4)
    axes[-1].set_xlabel("time (s)", color=INK)
    if title:
        entitle(axes[0], title, loc="left", color=INK, fontsize=13, pad=18 if sections else 8)
    if len(continuation) and len(prompt):
        _draw_legend(axes[0], bool(sections))
    save(figure, path, dpi=110)


def _rows(end: float, seconds_a_row: float | None) -> tuple[float, int]:
    """Seconds in a row and number of rows: rows of equal length, as few as hold the piece."""
    if seconds_a_row is None:
        seconds_a_row = max(SECONDS_A_ROW, end / ROWS_AT_MOST)
    n_rows = max(1, math.ceil(end / seconds_a_row - 1e-9))
    even = end / n_rows
    # A row ends on a whole number of seconds where that is not a noticeable waste of paper.
    return (math.ceil(even) if even > 10 else even * 1.01), n_rows


def _pitch_range(pitches: np.ndarray) -> tuple[float, float]:
    """Lowest and highest pitch drawn: at least two octaves, a little air around the notes."""
    low, high = int(pitches.min()) - 2, int(pitches.max()) + 2
    missing = max(0, 24 - (high - low))
    return low - missing // 2 - 0.5, high + (missing + 1) // 2 + 0.5


def _draw_keyboard(ax: Axes, low: float, high: float) -> None:
    """Pale rows for the black keys, a line under every C, the names of the Cs and, in small ranges, of the Gs."""
    pitches = range(math.ceil(low), math.floor(high) + 1)
    for pitch in pitches:
        if pitch % 12 in BLACK_KEYS:
            ax.axhspan(pitch - 0.5, pitch + 0.5, color="#f5f5f5", linewidth=0, zorder=0)
        if pitch % 12 == 0:
            ax.axhline(pitch - 0.5, color=FAINT, linewidth=0.8, zorder=0.5)
    named = [pitch for pitch in pitches if pitch % 12 == 0 or (high - low < 40 and pitch % 12 == 7)]
    ax.set_ylim(low, high)
    ax.set_yticks(named, [pitch_name(pitch) for pitch in named])
    ax.tick_params(colors=INK, length=0, labelsize=9)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#aaaaaa")


def _section_colours(sections: Sequence[Shading]) -> dict[str, str]:
    labels = list(dict.fromkeys(section.label for section in sections))
    return {label: SECTION_COLOURS[index % len(SECTION_COLOURS)] for index, label in enumerate(labels)}


def _draw_sections(
    ax: Axes, sections: Sequence[Shading], colours: dict[str, str], start: float, end: float, high: float
) -> None:
    for section in sections:
        left, right = max(section.start, start), min(section.end, end)
        if left >= right:
            continue
        ax.axvspan(left, right, color=colours[section.label], alpha=0.45, linewidth=0, zorder=0.2)
        if left == section.start or left == start:
            ax.annotate(
                section.label, (left, high), (3, 2), textcoords="offset points", color=INK, fontsize=9, va="bottom"
            )


def _draw_notes(ax: Axes, notes: np.ndarray, colour: str, start: float, end: float) -> None:
    """One rectangle a note; opacity grows with velocity. A thin white edge keeps repeated notes apart."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    shown = notes[(notes["onset"] < end) & (notes["onset"] + notes["duration"] > start)]
    if not len(shown):
        return
    left = np.maximum(shown["onset"], start)
    right = np.minimum(shown["onset"] + np.maximum(shown["duration"], 0.03), end)
    bottom, top = shown["pitch"] - 0.44, shown["pitch"] + 0.44
    corners = np.stack([left, bottom, left, top, right, top, right, bottom], axis=-1).reshape(-1, 4, 2)
    strength = 0.45 + 0.55 * np.clip(shown["velocity"] / 110.0, 0.0, 1.0)
    shades = np.concatenate([np.tile(to_rgb(colour), (len(shown), 1)), strength[:, None]], axis=1)
    ax.add_collection(PolyCollection(list(corners), facecolors=shades, edgecolors="white", linewidths=0.15, zorder=3))


def _draw_legend(ax: Axes, above_sections: bool) -> None:
    from matplotlib.patches import Patch

    ax.legend(
        handles=[Patch(color=PROMPT_COLOUR, label="prompt"), Patch(color=CONTINUATION_COLOUR, label="continuation")],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.06 if above_sections else 1.0),
        ncols=2,
        frameon=False,
        borderaxespad=0.2,
        labelcolor=INK,
    )
