"""How well a model predicts whole pieces: nats a note first, then nats a second, perplexity, and loss by position.

Every piece is streamed whole, from a segment start with a fresh memory, so a piece's loss does not depend on the batch
that it was computed in nor on its neighbours. The model (or a baseline) gives one loss per predicted token; everything
that is reported follows from those in one place, `report_losses`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsmr.checkpoint import RunDirectory, load_settings
from dsmr.devices import autocast, resolve_device, resolve_dtype, resolve_memory_dtype
from dsmr.errors import UserError
from dsmr.files import check_writable, write_json
from dsmr.loader import IGNORE

if TYPE_CHECKING:
    from rich.table import Table

    from dsmr.data.corpus import Corpus
    from dsmr.model import DSMRModel

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
        write_json(json_path, self.to_json())
        if png_path is not None:
            from dsmr.plots import position_figure

            position_figure({self.model: self}, png_path)

    def table(self) -> "Table":
        """The figures for a terminal (rich)."""
        from rich.table import Table

        table = Table(title=f"{self.model} on {self.corpus}, {self.split} split", show_header=False)
        table.add_row("[bold]nats a note[/bold]", f"[bold]{self.nats_per_note:.4f}[/bold]")
        table.add_row("nats a second", f"{self.nats_per_second:.4f}")
        table.add_row("nats a token", f"{self.nats_per_token:.4f}")
        table.add_row(f"perplexity (tokeniser {self.tokenizer_hash[:16]})", f"{self.perplexity:.3f}")
        for loss in self.by_label or ():
            table.add_row(f"nats a token, {loss.label} ({loss.tokens:,} tokens)", f"{loss.nats_per_token:.4f}")
        table.add_row("pieces, notes, tokens", f"{self.pieces:,}, {self.notes:,}, {self.tokens:,}")
        return table


def evaluate(
    model: "DSMRModel",
    corpus: "Corpus",
    split: str = "validation",
    *,
    pieces: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype | None = None,
    name: str = "model",
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Stream the pieces of `split` (or just `pieces`) through `model` and report its losses.

    `dtype` is computed in, `memory_dtype` remembered in: the same, where it is None. `progress(done, total)` is told
    the predicted tokens after every call. In float32 the result does not depend on
    `batch_size` and `segments_per_call` beyond rounding.
    """
    if model.config.vocab_size != corpus.vocabulary.size:
        raise UserError(
            f"{name} knows {model.config.vocab_size} tokens, but the corpus {corpus.name} has "
            f"{corpus.vocabulary.size}: it was prepared with another tokeniser"
        )
    chosen = _pieces(corpus, split) if pieces is None else np.asarray(pieces, dtype=np.int64)
    losses = piece_losses(
        model,
        corpus,
        chosen,
        batch_size=batch_size,
        segments_per_call=segments_per_call,
        dtype=dtype,
        memory_dtype=memory_dtype,
        progress=progress,
    )
    return report_losses(corpus, split, chosen, losses, name=name)


def evaluate_run(
    run: str | Path,
    data: str | Path | None = None,
    split: str = "validation",
    *,
    out: str | Path | None = None,
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: str = "float32",
    memory_dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Evaluate the best weights of a run directory and write `eval-SPLIT.json` and `.png` into `out` (the run itself).

    Without Matplotlib there is no picture. `data` is the corpus; by default the one that the run was trained on.
    `UserError` if it was prepared with a tokeniser other than the run's.
    """
    from dsmr.data.corpus import Corpus
    from dsmr.data.vocabulary import Vocabulary
    from dsmr.model import DSMRModel
    from dsmr.plots import available

    run = Path(run)
    folder = run if out is None else Path(out)
    json_path, png_path = folder / f"eval-{split}.json", folder / f"eval-{split}.png"
    for needed in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (run / needed).is_file():
            raise UserError(f"{run} is not a trained run: it has no {needed}")
    check_writable(json_path)
    check_writable(png_path)
    if data is None:
        data = corpus_of_run(run)
        if not data.exists():  # train.json keeps the path as it was given, so it may be seen from another folder
            raise UserError(f"{run} was trained on the corpus {data}, which is not there: name it with --data")
    corpus = Corpus.open(data)
    own = Vocabulary.load(run / "tokenizer.json")
    if own.hash != corpus.vocabulary.hash:
        raise UserError(
            f"{run} was trained with tokeniser {own.hash[:16]}, but the corpus {data} was prepared with "
            f"{corpus.vocabulary.hash[:16]}"
        )
    where = resolve_device(device)
    computing = resolve_dtype(dtype, where)
    remembering = resolve_memory_dtype(memory_dtype, computing)
    model = DSMRModel.from_pretrained(run).to(where)
    report = evaluate(
        model,
        corpus,
        split,
        batch_size=batch_size,
        segments_per_call=segments_per_call,
        dtype=computing,
        memory_dtype=remembering,
        name=run.name,
        progress=progress,
    )
    report.write(json_path, png_path if available() else None)
    return report


def corpus_of_run(run: str | Path) -> Path:
    """The corpus that a run directory says it was trained on."""
    return Path(load_settings(RunDirectory(run))["train"]["data"])


@torch.no_grad()
def piece_losses(
    model: "DSMRModel",
    corpus: "Corpus",
    pieces: Sequence[int] | np.ndarray,
    *,
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The loss in nats of every predicted token of every piece: for a piece of n tokens, (n - 1,) float32.

    Rows take the pieces longest first and pad only the end of a piece's last call; each row starts every piece at the
    beginning of a call, hence of a segment, with an empty memory.
    """
    if batch_size < 1 or segments_per_call < 1:
        raise ValueError(
            f"batch_size and segments_per_call must be at least 1, but they are {batch_size} and {segments_per_call}"
        )
    texts = [np.asarray(corpus.piece(int(i))) for i in pieces]
    losses = [np.zeros(max(len(text) - 1, 0), dtype=np.float32) for text in texts]
    waiting = sorted((k for k in range(len(texts)) if len(losses[k])), key=lambda k: len(texts[k]))
    if not waiting:
        return losses
    batch = min(batch_size, len(waiting))
    total, done = sum(map(len, losses)), 0
    segment = model.config.segment_length
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    state = model.new_state(batch, device=device, dtype=memory_dtype or dtype, aligned=True)
    rows: list[tuple[int, int] | None] = [None] * batch  # (index into texts, tokens read)
    try:
        while True:
            rows = [row or ((waiting.pop(), 0) if waiting else None) for row in rows]
            left = max((len(losses[row[0]]) - row[1] for row in rows if row), default=0)
            if not left:
                return losses
            width = segment * min(segments_per_call, -(-left // segment))
            tokens, targets, piece_start = _call(texts, rows, width, corpus.vocabulary.pad_id)
            with autocast(device, dtype):
                output = model(
                    tokens.to(device),
                    state,
                    targets=targets.to(device),
                    piece_start=piece_start.to(device),
                    reduction="none",
                )
            nats = output.loss.float().cpu().numpy()
            for b, row in enumerate(rows):
                if row is None:
                    continue
                k, offset = row
                here = losses[k][offset : offset + width]
                here[:] = nats[b, : len(here)]
                done += len(here)
                rows[b] = (k, offset + width) if offset + width < len(losses[k]) else None
            if progress is not None:
                progress(done, total)
    finally:
        model.train(was_training)


def _call(
    texts: list[np.ndarray], rows: list[tuple[int, int] | None], width: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tokens, targets and piece starts of one call; a row without a piece is an empty piece of padding."""
    tokens = np.full((len(rows), width), pad, dtype=np.int64)
    targets = np.full((len(rows), width), IGNORE, dtype=np.int64)
    piece_start = np.zeros((len(rows), width), dtype=np.int32)
    for b, row in enumerate(rows):
        if row is not None:
            k, offset = row
            following = texts[k][offset + 1 : offset + 1 + width]
            tokens[b, : len(following)] = texts[k][offset : offset + len(following)]
            targets[b, : len(following)] = following
            piece_start[b] = -offset
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(piece_start)


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


def _pieces(corpus: "Corpus", split: str) -> np.ndarray:
    pieces = np.asarray(corpus.pieces_of(split), dtype=np.int64)
    if not len(pieces):
        raise UserError(f"the corpus {corpus.name} has no pieces in its split '{split}'")
    return pieces


def _ratio(nats: float, units: float) -> float:
    return nats / units if units else math.nan
