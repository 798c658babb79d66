"""What a model remembers: how much worse it predicts once it has forgotten, which perplexity alone does not show.

KRCU (KV-Reset Context Utilisation; Full-Horizon Compressed Recurrence, arXiv 2602.19816 v3): all memory is reset at
token 8,192 of each long piece; dNLL of a bin is the loss of its tokens with the reset minus that without, in bins of
1,024 tokens from the reset on. KRCU-AUC is the plain mean over 22 bins. The first of them, the reset bin, dominates
it, so the mean of the others, the tail, is told apart. Retain-k is dNLL over all tokens when only the last k tokens
are kept throughout. A bin's loss is that of all its tokens, whichever piece they come from; intervals are of 95 %,
from resampling the pieces.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsmr.console.devices import resolve_dtype, resolve_memory_dtype
from dsmr.console.errors import UserError
from dsmr.console.figures import available, finish, new_figure
from dsmr.console.files import check_writable, write_json
from dsmr.console.ranks import Ranks
from dsmr.corpus.store import Corpus
from dsmr.evaluation.losses import open_run, piece_losses, pieces_of
from dsmr.evaluation.report import EvaluationReport, report_losses
from dsmr.model.reshaped import with_schedule
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel

if TYPE_CHECKING:
    from rich.table import Table

RESAMPLES = 2000


@dataclass(frozen=True)
class Bins:
    """Where the memory is reset, and the bins from there on; the paper's by default."""

    reset: int = 8192
    width: int = 1024
    count: int = 22

    def __post_init__(self) -> None:
        for name, least in (("reset", 1), ("width", 1), ("count", 1)):
            if getattr(self, name) < least:
                raise UserError(f"the {name} of KRCU must be at least {least}, but it is {getattr(self, name)}")

    def starts(self) -> np.ndarray:
        """(count,) the token at which each bin begins."""
        return self.reset + self.width * np.arange(self.count)


@dataclass(frozen=True)
class Interval:
    """A mean and its interval of 95 % over pieces; all NaN where nothing was measured."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class MemoryBin:
    """dNLL in nats of the tokens predicted from positions `start` to `end` - 1; `pieces` reach into the bin."""

    start: int
    end: int
    pieces: int
    tokens: int
    delta: Interval


@dataclass(frozen=True)
class Krcu:
    """KRCU in nats a token. The means run over the `reached` bins, those that at least one piece reaches."""

    reset: int
    pieces: int
    too_short: int
    reached: int
    auc: Interval
    reset_bin: Interval
    tail: Interval
    bins: tuple[MemoryBin, ...]


@dataclass(frozen=True)
class Retained:
    """dNLL in nats a token when only the last `k` tokens are kept: over all tokens, and over the `tokens_beyond` that
    have more than k before them."""

    k: int
    delta: Interval
    beyond: Interval
    tokens_beyond: int


@dataclass(frozen=True)
class MemoryUse:
    """What `memory_use` found."""

    model: str
    corpus: str
    split: str
    tokenizer_hash: str
    schedule: str
    krcu: Krcu | None
    retain: tuple[Retained, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; null where nothing was measured."""
        found: dict[str, Any] = _plain(asdict(self))
        return found

    def write(self, json_path: str | Path, png_path: str | Path | None = None) -> None:
        """Write it as JSON and, if `png_path` is given and the curve was measured, the curve as a picture."""
        write_json(json_path, self.to_json(), sealed=True)
        if png_path is not None and self.krcu is not None:
            krcu_figure({self.model: self.krcu}, png_path, self.model)

    def table(self) -> "Table":
        """The figures for a terminal (rich)."""
        from rich.table import Table

        table = Table(title=f"what {self.model} remembers, {self.corpus}, {self.split} split")
        for name in ("nats a token more", "mean", "95 % over pieces"):
            table.add_column(name, justify="left" if name.startswith("nats") else "right")
        rows: list[tuple[str, Interval]] = []
        if self.krcu is not None:
            found = self.krcu
            width = found.bins[0].end - found.bins[0].start
            rows += [
                (f"KRCU-AUC, {found.reached} of {len(found.bins)} bins", found.auc),
                (f"reset bin, {width:,} tokens from {found.reset:,} on", found.reset_bin),
                ("tail, the bins after it", found.tail),
            ]
            table.caption = f"{found.pieces} pieces reach past the reset, {found.too_short} are too short"
        for kept in self.retain:
            rows.append((f"only the last {kept.k:,} tokens kept", kept.delta))
            rows.append((f"  for the {kept.tokens_beyond:,} tokens with more behind them", kept.beyond))
        for name, value in rows:
            if math.isnan(value.mean):
                table.add_row(name, "none there", "")
            else:
                table.add_row(name, f"{value.mean:.4f}", f"{value.low:.4f} … {value.high:.4f}")
        return table


def memory_use(
    model: DSMRModel,
    corpus: Corpus,
    split: str,
    pieces: Sequence[int] | np.ndarray,
    losses: Sequence[np.ndarray],
    *,
    bins: Bins | None = None,
    retain: Sequence[int] = (),
    name: str = "model",
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: torch.dtype = torch.float32,
    memory_dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> MemoryUse:
    """KRCU (where `bins` is given) and Retain-k of a model whose ordinary `losses` on `pieces` are known.

    `losses` are as `piece_losses` gives them. `UserError` where no piece is long enough for the reset, or where it does
    not lie at the beginning of a segment.
    """
    pieces = [int(i) for i in pieces]
    if bins is not None:
        check_reset(bins, model.config.segment_length, [len(loss) for loss in losses], corpus.name, split)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "segments_per_call": segments_per_call,
        "dtype": dtype,
        "memory_dtype": memory_dtype,
        "progress": progress,
        "ranks": ranks,
    }
    krcu = None
    if bins is not None:
        long = [j for j, loss in enumerate(losses) if len(loss) > bins.reset]
        end = bins.reset + bins.width * bins.count
        without = [losses[j][bins.reset : end] for j in long]
        reset = piece_losses(model, corpus, [pieces[j] for j in long], begin=bins.reset, **how)
        krcu = _krcu(bins, [a[: len(b)] - b for a, b in zip(reset, without, strict=True)], len(losses) - len(long))
    kept = tuple(_retained(model, corpus, pieces, losses, k, how) for k in retain)
    return MemoryUse(name, corpus.name, split, corpus.vocabulary.hash, str(model.config.schedule), krcu, kept)


def check_reset(bins: Bins, segment: int, lengths: Sequence[int], corpus: str, split: str) -> None:
    """`UserError` unless some piece (predicted tokens in `lengths`) reaches past a reset that begins a segment."""
    if bins.reset % segment:
        raise UserError(
            f"the reset at token {bins.reset:,} lies in the middle of a segment of {segment:,} tokens: choose a "
            f"multiple, such as {max(round(bins.reset / segment), 1) * segment:,}"
        )
    if max(lengths, default=0) <= bins.reset:
        raise UserError(
            f"all {len(lengths)} pieces of {corpus}, split '{split}', are too short for a reset at token "
            f"{bins.reset:,}: the longest has {max(lengths, default=0) + 1:,} tokens"
        )


def run_memory_use(
    run: str | Path,
    data: str | Path | None = None,
    split: str = "validation",
    *,
    bins: Bins | None = None,
    retain: Sequence[int] = (),
    out: str | Path | None = None,
    batch_size: int = 4,
    segments_per_call: int = 1,
    dtype: str = "float32",
    memory_dtype: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> tuple[EvaluationReport, MemoryUse]:
    """Evaluate a run as `evaluate_run` does and measure what it remembers, over the same losses.

    Writes `eval-SPLIT` and `memory-SPLIT`, `.json` and `.png` each, into `out` (by default the run). Errors are those
    of `evaluate_run` and `memory_use`. Several `ranks` share the pieces, and the first writes.
    """
    ranks = ranks or Ranks()
    folder = Path(run) if out is None else Path(out)
    written = {name: folder / f"{name}-{split}.json" for name in ("eval", "memory")}
    for path in written.values() if ranks.first else ():
        check_writable(path)
    model, corpus = open_run(run, data, device, ranks)
    computing = resolve_dtype(dtype, next(model.parameters()).device)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "segments_per_call": segments_per_call,
        "dtype": computing,
        "memory_dtype": resolve_memory_dtype(memory_dtype, computing),
        "progress": progress,
        "ranks": ranks,
    }
    pieces = pieces_of(corpus, split)
    if bins is not None:  # before minutes are spent
        lengths = [int(n) - 1 for n in np.diff(corpus.offsets)[pieces]]
        check_reset(bins, model.config.segment_length, lengths, corpus.name, split)
    losses = piece_losses(model, corpus, pieces, **how)
    report = report_losses(corpus, split, pieces, losses, name=Path(run).name)
    use = memory_use(model, corpus, split, pieces, losses, bins=bins, retain=retain, name=Path(run).name, **how)
    if ranks.first:
        draw = available()
        report.write(written["eval"], written["eval"].with_suffix(".png") if draw else None)
        use.write(written["memory"], written["memory"].with_suffix(".png") if draw else None)
    return report, use


def keeping_only(model: DSMRModel, k: int) -> DSMRModel:
    """The same weights with every horizon cut to the last `k` tokens. A layer that keeps others than the newest tokens
    keeps the newest instead: as many as it has slots, and at most `k`."""
    schedule = model.config.schedule
    cut = MemorySchedule.explicit([min(horizon, k) for horizon in schedule.horizons], schedule.kv_heads)
    return with_schedule(model, cut)


def parse_tokens(text: str) -> tuple[int, ...]:
    """Numbers of tokens such as "1k,4k,512" (1k = 1,024); `UserError` for anything else."""
    found = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)(k?)", part)
        if match is None or not int(match[1]):
            raise UserError(f"'{part}' is not a number of tokens: write such as 1k,4k,8k,16k or 1024,4096")
        found.append(int(match[1]) * (1024 if match[2] else 1))
    if not found:
        raise UserError("no number of tokens is named: write such as 1k,4k,8k,16k")
    return tuple(found)


def _retained(
    model: DSMRModel,
    corpus: Corpus,
    pieces: Sequence[int],
    losses: Sequence[np.ndarray],
    k: int,
    how: dict[str, Any],
) -> Retained:
    cut = list(losses)  # nothing is lost where no horizon is longer, and no layer remembers what is older
    if max(model.config.schedule.horizons) > k or not model.config.schedule.newest:
        cut = piece_losses(keeping_only(model, k), corpus, pieces, **how)
    deltas = [np.asarray(a, np.float64) - b for a, b in zip(cut, losses, strict=True)]
    whole = _interval(*_totals(deltas))
    beyond = [delta[k:] for delta in deltas]
    return Retained(k, whole, _interval(*_totals(beyond)), sum(map(len, beyond)))


def _totals(deltas: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(pieces, 1) sums and counts."""
    return np.array([[d.sum()] for d in deltas]), np.array([[len(d)] for d in deltas])


def _krcu(bins: Bins, deltas: Sequence[np.ndarray], too_short: int) -> Krcu:
    """From dNLL of each long piece's tokens from the reset on."""
    shape = (len(deltas), bins.count)
    sums, counts = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    for row, delta in enumerate(deltas):
        which = np.arange(len(delta)) // bins.width
        sums[row] = np.bincount(which, weights=delta, minlength=bins.count)
        counts[row] = np.bincount(which, minlength=bins.count)
    found = tuple(
        MemoryBin(
            int(start),
            int(start) + bins.width,
            int((counts[:, b] > 0).sum()),
            int(counts[:, b].sum()),
            _interval(sums[:, b : b + 1], counts[:, b : b + 1]),
        )
        for b, start in enumerate(bins.starts())
    )
    return Krcu(
        reset=bins.reset,
        pieces=len(deltas),
        too_short=too_short,
        reached=int((counts.sum(0) > 0).sum()),
        auc=_interval(sums, counts),
        reset_bin=found[0].delta,
        tail=_interval(sums[:, 1:], counts[:, 1:]),
        bins=found,
    )


def _interval(sums: np.ndarray, counts: np.ndarray) -> Interval:
    """The mean over bins of each bin's sum over its count, and its interval, from (pieces, bins)."""
    if not counts.sum():
        return Interval(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(0)
    pieces = len(sums)
    weights = rng.multinomial(pieces, np.full(pieces, 1 / pieces), size=RESAMPLES)  # how often each piece is drawn
    means = _mean_of_bins(weights @ sums, weights @ counts)
    means = means[np.isfinite(means)]  # a draw without any long piece says nothing
    low, high = np.quantile(means, (0.025, 0.975))
    (mean,) = _mean_of_bins(sums.sum(0, keepdims=True), counts.sum(0, keepdims=True))
    return Interval(float(mean), float(low), float(high))


def _mean_of_bins(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n, bins) -> (n,): bins without a token are left out; NaN where none has any."""
    has = counts > 0
    ratios = np.where(has, sums / np.maximum(counts, 1), 0.0)
    return np.where(has.any(1), ratios.sum(1) / np.maximum(has.sum(1), 1), np.nan)


def _plain(value: Any) -> Any:
    """The same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def krcu_figure(curves: "dict[str, Krcu]", png_path: str | Path, title: str = "") -> None:
    """Draw dNLL against how far behind the reset lies, a line and its interval for each model."""
    figure, axes = new_figure()
    for number, (name, krcu) in enumerate(curves.items()):
        bins = [b for b in krcu.bins if b.tokens]
        at = [(b.start + b.end) / 2 - krcu.reset for b in bins]
        axes.plot(at, [b.delta.mean for b in bins], color=f"C{number}", marker="o", markersize=3, label=name)
        axes.fill_between(
            at, [b.delta.low for b in bins], [b.delta.high for b in bins], color=f"C{number}", alpha=0.15, linewidth=0
        )
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("tokens since all memory was reset")
    axes.set_ylabel("loss more than without the reset (nats a token)")
    finish(figure, axes, png_path, title)
