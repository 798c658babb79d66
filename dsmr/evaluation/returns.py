"""Loss at planted returns against their distance: how far back a model finds what it has heard.

The same passage stands in the piece twice, so its first time is the measure of its return: what is saved is the loss
of the passage when it was new minus the loss of its return. The first `LEAD` tokens of both are left out, since nobody
can know that a return begins.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsmr.console.devices import resolve_dtype, resolve_memory_dtype
from dsmr.console.figures import available, finish, new_figure
from dsmr.console.files import check_writable, write_json
from dsmr.console.ranks import Ranks
from dsmr.corpus.returns import Planter, Return, planted_corpus
from dsmr.corpus.store import Corpus
from dsmr.evaluation.losses import open_run, piece_losses
from dsmr.model.transformer import DSMRModel

if TYPE_CHECKING:
    from rich.table import Table

LEAD = 16


@dataclass(frozen=True)
class ReturnLoss:
    """Loss in nats a token of some returns, and of the same passages when they were new.

    `saved` is the mean of the difference over returns, `error` its standard error (0 for one return, which has none);
    distances lie between `start` and `end` - 1 tokens. Where there are no `returns`, all is 0.
    """

    kind: str
    start: int
    end: int
    returns: int
    tokens: int
    nats_per_token: float
    first: float
    saved: float
    error: float


@dataclass(frozen=True)
class ReturnsReport:
    """What `return_losses` found: by distance, all kinds together, and by kind, all distances together."""

    model: str
    corpus: str
    split: str
    seed: int
    tokenizer_hash: str
    pieces: int
    returns: int
    by_distance: tuple[ReturnLoss, ...]
    by_kind: tuple[ReturnLoss, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    def write(self, json_path: str | Path, png_path: str | Path | None = None) -> None:
        """Write it as JSON and, if `png_path` is given, what is saved against the distance as a picture."""
        write_json(json_path, self.to_json(), sealed=True)
        if png_path is not None:
            returns_figure({self.model: self.by_distance}, png_path, self.model)

    def table(self) -> "Table":
        """The figures for a terminal (rich)."""
        from rich.table import Table

        table = Table(title=f"{self.model} at {self.returns} planted returns, {self.corpus}, {self.split} split")
        for name in ("returns", "how many", "nats a token", "when new", "saved"):
            table.add_column(name, justify="left" if name == "returns" else "right")
        for row in (*self.by_distance, *self.by_kind):
            what = f"{row.start:,} to {row.end - 1:,} tokens back" if row.kind == "all" else row.kind
            if not row.returns:
                table.add_row(what, "none there", "", "", "")
                continue
            saved = f"{row.saved:.3f}" + (f" ± {row.error:.3f}" if row.returns > 1 else "")
            table.add_row(what, f"{row.returns}", f"{row.nats_per_token:.3f}", f"{row.first:.3f}", saved)
        return table


def return_losses(
    model: DSMRModel,
    corpus: Corpus,
    split: str,
    planter: Planter,
    *,
    pieces: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    name: str = "model",
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> ReturnsReport:
    """Plant returns into the pieces of `split`, or just `pieces`, and measure the loss there; nothing is written."""
    planted, returns = planted_corpus(corpus, split, planter, seed, pieces)
    chosen = [i for i, found in enumerate(returns) if found]
    losses = piece_losses(
        model,
        planted,
        chosen,
        batch_size=batch_size,
        segments_per_call=segments_per_call,
        dtype=dtype,
        memory_dtype=memory_dtype,
        progress=progress,
        ranks=ranks,
    )
    rows = [
        row
        for i, loss in zip(chosen, losses, strict=True)
        for row in (_measured(found, loss) for found in returns[i])
        if row is not None
    ]
    edges = octaves(*planter.distance)
    low, high = planter.distance
    return ReturnsReport(
        model=name,
        corpus=planted.name,
        split=split,
        seed=seed,
        tokenizer_hash=corpus.vocabulary.hash,
        pieces=len(chosen),
        returns=len(rows),
        by_distance=tuple(
            _summary("all", start, end, [row for row in rows if start <= row[0].distance < end])
            for start, end in itertools.pairwise(edges)
        ),
        by_kind=tuple(_summary(kind, low, high, [r for r in rows if r[0].kind == kind]) for kind in planter.kinds),
    )


def run_returns(
    run: str | Path,
    data: str | Path | None = None,
    split: str = "validation",
    *,
    seed: int = 0,
    distance: tuple[int, int] = (1000, 16000),
    out: str | Path | None = None,
    batch_size: int = 4,
    dtype: str = "float32",
    memory_dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> ReturnsReport:
    """Measure a run at planted returns and write `returns-SPLIT.json` and `.png` into `out` (by default the run).

    Several `ranks` share the pieces, and the first writes.
    """
    ranks = ranks or Ranks()
    path = (Path(run) if out is None else Path(out)) / f"returns-{split}.json"
    if ranks.first:
        check_writable(path)
    model, corpus = open_run(run, data, device, ranks)
    computing = resolve_dtype(dtype, next(model.parameters()).device)
    report = return_losses(
        model,
        corpus,
        split,
        Planter(corpus.vocabulary, distance=distance),
        seed=seed,
        name=Path(run).name,
        batch_size=batch_size,
        dtype=computing,
        memory_dtype=resolve_memory_dtype(memory_dtype, computing),
        progress=progress,
        ranks=ranks,
    )
    if ranks.first:
        report.write(path, path.with_suffix(".png") if available() else None)
    return report


def octaves(low: int, high: int) -> list[int]:
    """Edges from `low` to past `high`, each twice the one before; the last is pulled in to `high` + 1."""
    edges = [low]
    while edges[-1] * 2 <= high:
        edges.append(edges[-1] * 2)
    if len(edges) > 1 and high < 1.5 * edges[-1]:  # no sliver of a bin at the end
        edges.pop()
    return [*edges, high + 1]


Measured = tuple[Return, float, float, int]  # a return, nats of it and of its source (both a token), tokens


def _measured(found: Return, loss: np.ndarray) -> Measured | None:
    """The losses of one return; None for one so short that nothing is left after the lead. Token t is predicted at
    t - 1."""
    again = loss[found.begin + LEAD - 1 : found.end - 1]
    first = loss[found.source + LEAD - 1 : found.source_end - 1]
    if not len(again) or not len(first):
        return None
    return found, float(again.mean(dtype=np.float64)), float(first.mean(dtype=np.float64)), len(again)


def _summary(kind: str, start: int, end: int, rows: Sequence[Measured]) -> ReturnLoss:
    """Means over returns, each weighed alike: a long return tells no more of its distance than a short one."""
    if not rows:
        return ReturnLoss(kind, start, end, 0, 0, 0.0, 0.0, 0.0, 0.0)
    again, first = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    saved = first - again
    error = float(saved.std(ddof=1) / len(saved) ** 0.5) if len(saved) > 1 else 0.0
    tokens = sum(row[3] for row in rows)
    return ReturnLoss(
        kind, start, end, len(rows), tokens, float(again.mean()), float(first.mean()), float(saved.mean()), error
    )


def returns_figure(curves: "dict[str, tuple[ReturnLoss, ...]]", png_path: str | Path, title: str = "") -> None:
    """Draw what is saved at returns against their distance, a line for each model."""
    figure, axes = new_figure()
    for number, (name, rows) in enumerate(curves.items()):
        rows = tuple(row for row in rows if row.returns)
        at = [(row.start * row.end) ** 0.5 for row in rows]
        axes.errorbar(
            at,
            [row.saved for row in rows],
            [row.error if row.returns > 1 else np.nan for row in rows],
            color=f"C{number}",
            marker="o",
            markersize=3,
            capsize=2,
            label=name,
        )
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distance of the return (tokens)")
    axes.set_ylabel("saved at the return (nats a token)")
    finish(figure, axes, png_path, title)
