"""How well a model predicts whole pieces: the loss of every token of a split, streamed through it.

Every piece is streamed whole, from a segment start with a fresh memory, so a piece's loss does not depend on the batch
that it was computed in nor on its neighbours. What is said of the losses follows from them in `dsmr.evaluation.report`.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmr.console.devices import autocast, resolve_device, resolve_dtype, resolve_memory_dtype
from dsmr.console.errors import UserError
from dsmr.console.figures import available
from dsmr.console.files import check_apart, check_writable
from dsmr.console.ranks import Ranks, sum_of_bits
from dsmr.console.stopping import StoppedError
from dsmr.corpus.store import Corpus
from dsmr.corpus.streams import IGNORE
from dsmr.evaluation.report import EvaluationReport, report_losses
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary
from dsmr.runs.checkpoint import RunDirectory, load_settings


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
    ranks: Ranks | None = None,
) -> EvaluationReport:
    """Stream the pieces of `split` (or just `pieces`) through `model` and report its losses, over `ranks` if given.

    `dtype` is computed in, `memory_dtype` remembered in: the same, where it is None. `progress(done, total)` is told
    the predicted tokens after every call. In float32 the result does not depend on
    `batch_size` and `segments_per_call` beyond rounding.
    """
    if model.config.vocab_size != corpus.vocabulary.size:
        raise UserError(
            f"{name} knows {model.config.vocab_size} tokens, but the corpus {corpus.name} has "
            f"{corpus.vocabulary.size}: it was prepared with another tokeniser"
        )
    chosen = pieces_of(corpus, split) if pieces is None else np.asarray(pieces, dtype=np.int64)
    losses = piece_losses(
        model,
        corpus,
        chosen,
        batch_size=batch_size,
        segments_per_call=segments_per_call,
        dtype=dtype,
        memory_dtype=memory_dtype,
        progress=progress,
        ranks=ranks,
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
    ranks: Ranks | None = None,
) -> EvaluationReport:
    """Evaluate the best weights of a run directory and write `eval-SPLIT.json` and `.png` into `out` (the run itself).

    Without Matplotlib there is no picture. `data` is the corpus; by default the one that the run was trained on.
    `UserError` if it was prepared with a tokeniser other than the run's. Of several `ranks` each reads a part of the
    pieces, `batch_size` at once, all get the report, and the first writes it.
    """
    run = Path(run)
    ranks = ranks or Ranks()
    folder = run if out is None else Path(out)
    json_path, png_path = folder / f"eval-{split}.json", folder / f"eval-{split}.png"
    if ranks.first:
        check_writable(json_path)
        check_writable(png_path)
    model, corpus = open_run(run, data, device, ranks)
    check_apart([json_path, png_path], {"the corpus": corpus.path})
    computing = resolve_dtype(dtype, next(model.parameters()).device)
    remembering = resolve_memory_dtype(memory_dtype, computing)
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
        ranks=ranks,
    )
    if ranks.first:
        report.write(json_path, png_path if available() else None)
    return report


def open_run(
    run: str | Path, data: str | Path | None = None, device: str = "auto", ranks: Ranks | None = None
) -> tuple[DSMRModel, Corpus]:
    """The best weights of a run directory, and the corpus `data` (by default the one that it was trained on).

    `UserError` if either is missing, if another corpus lies where the run's did and is not named by `data`, if it was
    prepared with a tokeniser other than the run's, or if the `ranks` find different ones.
    """
    run = Path(run)
    for needed in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (run / needed).is_file():
            raise UserError(f"{run} is not a trained run: it has no {needed}")
    trained_on = None
    if data is None:
        trained_on = load_settings(RunDirectory(run))
        data = Path(trained_on["train"]["data"])
        if not data.exists():  # train.json keeps the path as it was given, so it may be seen from another folder
            raise UserError(f"{run} was trained on the corpus {data}, which is not there: name it with --data")
    corpus = Corpus.open(data)
    own = Vocabulary.load(run / "tokenizer.json")
    if own.hash != corpus.vocabulary.hash:
        raise UserError(
            f"{run} was trained with tokeniser {own.hash[:16]}, but the corpus {data} was prepared with "
            f"{corpus.vocabulary.hash[:16]}"
        )
    if trained_on is not None and (then := trained_on["corpus"])["digest"] != corpus.digest:
        raise UserError(
            f"{run} was trained on the corpus {then['name']} ({then['digest'][:16]}), but {data} now holds "
            f"{corpus.name} ({corpus.digest[:16]}): to measure on another corpus on purpose, name it with --data"
        )
    model = DSMRModel.from_pretrained(run)
    if ranks is not None and not ranks.alone:
        ranks.check_agreement({"the corpus": corpus.digest, "the sum of all weights": sum_of_bits(model.parameters())})
    return model.to(resolve_device(device)), corpus


def piece_losses(
    model: "DSMRModel",
    corpus: "Corpus",
    pieces: Sequence[int] | np.ndarray,
    *,
    ranks: Ranks | None = None,
    **how: Any,
) -> list[np.ndarray]:
    """As `losses_alone`, which takes the same options. Of several `ranks` each reads a part of the pieces, dealt by
    length, and all get the losses of all.

    Raises `StoppedError` in every rank where `progress` raised it in one that a signal reached.
    """
    if ranks is None or ranks.alone:
        return losses_alone(model, corpus, pieces, **how)
    dealt = np.argsort([-len(corpus.piece(int(i))) for i in pieces], kind="stable")
    own: list[np.ndarray] = []
    with contextlib.suppress(StoppedError):
        own = losses_alone(model, corpus, [int(pieces[k]) for k in dealt[ranks.rank :: ranks.world]], **how)
    ranks.meet()
    if ranks.signal is not None:
        raise StoppedError
    of_all: list[Any] = [None] * len(pieces)
    for rank, found in enumerate(ranks.everybody(own)):
        for place, loss in zip(dealt[rank :: ranks.world], found, strict=True):
            of_all[place] = loss
    return of_all


@torch.no_grad()
def losses_alone(
    model: "DSMRModel",
    corpus: "Corpus",
    pieces: Sequence[int] | np.ndarray,
    *,
    begin: int = 0,
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The loss in nats of every predicted token of every piece: for a piece of n tokens, (n - 1,) float32.

    Rows take the pieces longest first and pad only the end of a piece's last call; each row starts every piece at the
    beginning of a call, hence of a segment, with an empty memory.

    With `begin`, a whole number of segments, each piece is read from that token on, as if all that was remembered had
    been forgotten there: its position in the piece stays, and so do the tokens that `recall` looks back on. The losses
    are those of the tokens predicted from there on, (n - 1 - begin,), none for a piece that is too short.
    """
    if batch_size < 1 or segments_per_call < 1:
        raise ValueError(
            f"batch_size and segments_per_call must be at least 1, but they are {batch_size} and {segments_per_call}"
        )
    segment = model.config.segment_length
    if begin < 0 or begin % segment:
        raise ValueError(f"begin must be a multiple of the segment of {segment} tokens, but it is {begin}")
    texts = [np.asarray(corpus.piece(int(i))) for i in pieces]
    losses = [np.zeros(max(len(text) - 1 - begin, 0), dtype=np.float32) for text in texts]
    waiting = sorted((k for k in range(len(texts)) if len(losses[k])), key=lambda k: len(texts[k]))
    if not waiting:
        return losses
    batch = min(batch_size, len(waiting))
    total, done = sum(map(len, losses)), 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    state = model.new_state(batch, device=device, dtype=memory_dtype or dtype, aligned=True)
    rows: list[tuple[int, int] | None] = [None] * batch  # (index into texts, tokens read)
    try:
        while True:
            for b in range(batch):
                if rows[b] is None and waiting:
                    k = waiting.pop()
                    rows[b] = (k, begin)
                    if begin:
                        _forget(state, b, begin, texts[k])
            left = max((len(texts[row[0]]) - 1 - row[1] for row in rows if row), default=0)
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
                here = losses[k][offset - begin : offset - begin + width]
                here[:] = nats[b, : len(here)]
                done += len(here)
                rows[b] = (k, offset + width) if offset + width < len(texts[k]) - 1 else None
            if progress is not None:
                progress(done, total)
    finally:
        model.train(was_training)


def _forget(state: DSMRState, row: int, position: int, text: np.ndarray) -> None:
    """Make `row` a stream that stands at `position` of the piece `text` and remembers nothing of it."""
    rows = torch.zeros(state.batch, dtype=torch.bool, device="cpu")
    rows[row] = True
    for memory in state.memories:
        memory.reset(rows)
        memory.position = torch.where(rows.to(memory.position.device), position, memory.position)
    looked_back = state.recent.shape[1]
    before = text[max(position - looked_back, 0) : position]
    state.recent = state.recent.clone()
    state.recent[row] = 0
    if len(before):
        state.recent[row, -len(before) :] = torch.from_numpy(before).to(state.recent.device)


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


def pieces_of(corpus: "Corpus", split: str) -> np.ndarray:
    """The pieces of a split; `UserError` where there is none."""
    pieces = np.asarray(corpus.pieces_of(split), dtype=np.int64)
    if not len(pieces):
        raise UserError(f"the corpus {corpus.name} has no pieces in its split '{split}'")
    return pieces
