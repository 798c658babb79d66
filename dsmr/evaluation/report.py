"""What is said of a model's losses: nats a note first, then nats a second, perplexity, and loss by position.

The model (or a baseline) gives one loss for each predicted token; everything that is reported follows from those in
one place, `report_losses`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.figures import finish, new_figure
from dsmr.console.files import write_json
from dsmr.console.shown import shown
from dsmr.corpus.store import Corpus

if TYPE_CHECKING:
    from rich.table import Table

BIN = 1024


LABELS = ("elsewhere", "first refrain", "refrain return")
"""Names of the labels 0, 1, 2 that composed corpora carry for each token."""


@dataclass(frozen=True)
class PositionBin:
    """Loss of the tokens that are predicted from positions `start` to `end` - 1 of their pieces."""

    start: int
    end: int
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class LabelLoss:
    """Loss of the tokens that carry one label."""

    label: str
    tokens: int
    nats_per_token: float


@dataclass(frozen=True)
class PieceLoss:
    """Loss of one piece."""

    source: str
    tokens: int
    notes: int
    seconds: float
    nats: float
    nats_per_note: float


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` found; `nats_per_note` is the number to compare, whatever the tokeniser."""

    model: str
    corpus: str
    split: str
    tokenizer_hash: str
    pieces: int
    tokens: int
    notes: int
    seconds: float
    nats: float
    nats_per_note: float
    nats_per_second: float
    nats_per_token: float
    perplexity: float
    by_position: tuple[PositionBin, ...]
    by_label: tuple[LabelLoss, ...] | None
    by_piece: tuple[PieceLoss, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def write(self, json_path: str | Path, png_path: str | Path | None = None) -> None:
        """Write the report as JSON and, if `png_path` is given, the loss against the position as a picture."""
        write_json(json_path, self.to_json(), sealed=True)
        if png_path is not None:
            position_figure({self.model: self}, png_path)

    def table(self) -> "Table":
        """The figures for a terminal (rich)."""
        from rich.table import Table
        from rich.text import Text

        rows = [
            ("nats a note", f"{self.nats_per_note:.4f}"),
            ("nats a second", f"{self.nats_per_second:.4f}"),
            ("nats a token", f"{self.nats_per_token:.4f}"),
            (f"perplexity (tokeniser {self.tokenizer_hash[:16]})", f"{self.perplexity:.3f}"),
        ]
        for loss in self.by_label or ():
            rows.append((f"nats a token, {loss.label} ({loss.tokens:,} tokens)", f"{loss.nats_per_token:.4f}"))
        for name, count in (("pieces", self.pieces), ("notes", self.notes), ("tokens", self.tokens)):
            rows.append((name, f"{count:,}"))
        title = Text(f"{shown(self.model)} on {shown(self.corpus)}, {self.split} split")
        table = Table(title=title, show_header=False)
        table.add_column(overflow="fold")  # on a narrow terminal the names give way, the figures never
        table.add_column(no_wrap=True, overflow="fold", min_width=max(len(figure) for _, figure in rows))
        for number, row in enumerate(rows):
            table.add_row(*row, style=None if number else "bold")
        return table


def report_losses(
    corpus: "Corpus",
    split: str,
    pieces: Sequence[int] | np.ndarray,
    losses: Sequence[np.ndarray],
    *,
    name: str = "model",
) -> EvaluationReport:
    """The report that follows from the losses of `pieces`, given as `piece_losses` gives them."""
    pieces = [int(i) for i in pieces]
    for i, loss in zip(pieces, losses, strict=True):
        if not np.isfinite(loss).all():
            at = int(np.flatnonzero(~np.isfinite(loss))[0]) + 1
            raise UserError(f"the loss of {name} on piece '{corpus.source[i]}' is not finite at token {at}")
    rows = tuple(_piece_row(corpus, i, loss) for i, loss in zip(pieces, losses, strict=True))
    nats = math.fsum(row.nats for row in rows)
    tokens, notes = sum(row.tokens for row in rows), sum(row.notes for row in rows)
    seconds = math.fsum(row.seconds for row in rows)
    per_token = _ratio(nats, tokens)
    return EvaluationReport(
        model=name,
        corpus=corpus.name,
        split=split,
        tokenizer_hash=corpus.vocabulary.hash,
        pieces=len(rows),
        tokens=tokens,
        notes=notes,
        seconds=seconds,
        nats=nats,
        nats_per_note=_ratio(nats, notes),
        nats_per_second=_ratio(nats, seconds),
        nats_per_token=per_token,
        perplexity=math.exp(min(per_token, 700.0)),
        by_position=_by_position(losses),
        by_label=_by_label(corpus, pieces, losses),
        by_piece=rows,
    )


def _piece_row(corpus: "Corpus", i: int, loss: np.ndarray) -> PieceLoss:
    nats, notes = float(loss.sum(dtype=np.float64)), int(corpus.n_notes[i])
    return PieceLoss(corpus.source[i], len(loss), notes, float(corpus.seconds[i]), nats, _ratio(nats, notes))


def _by_position(losses: Sequence[np.ndarray]) -> tuple[PositionBin, ...]:
    """Means over bins of the position that each token is predicted from (BOS is position 0)."""
    n_bins = max((-(-len(loss) // BIN) for loss in losses), default=0)
    sums, counts = np.zeros(n_bins), np.zeros(n_bins, dtype=np.int64)
    for loss in losses:
        bins = np.arange(len(loss)) // BIN
        sums += np.bincount(bins, weights=loss, minlength=n_bins)
        counts += np.bincount(bins, minlength=n_bins)
    return tuple(PositionBin(b * BIN, (b + 1) * BIN, int(counts[b]), float(sums[b] / counts[b])) for b in range(n_bins))


def _by_label(corpus: "Corpus", pieces: Sequence[int], losses: Sequence[np.ndarray]) -> tuple[LabelLoss, ...] | None:
    """Means over the labels of the predicted tokens; None for a corpus without labels."""
    labels = corpus.labels
    if labels is None:
        return None
    sums, counts = np.zeros(len(LABELS)), np.zeros(len(LABELS), dtype=np.int64)
    for i, loss in zip(pieces, losses, strict=True):
        of_piece = np.asarray(labels[corpus.offsets[i] + 1 : corpus.offsets[i + 1]], dtype=np.int64)
        sums += np.bincount(of_piece, weights=loss, minlength=len(LABELS))
        counts += np.bincount(of_piece, minlength=len(LABELS))
    found = [k for k in range(len(LABELS)) if counts[k]]
    return tuple(LabelLoss(LABELS[k], int(counts[k]), float(sums[k] / counts[k])) for k in found)


def _ratio(nats: float, units: float) -> float:
    return nats / units if units else math.nan


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
