"""A schedule for your music: which layers need distance, what width costs, and the best of both within a budget.

A trained model is measured with one layer's horizon cut at a time, then with one layer's KV heads merged at a time
(`dsmr.model.reshaped`); nothing is trained. Costs of layers are taken to add up, so that the best schedule of every
size, over horizons and KV heads at once, follows exactly; how far they do add up is then measured on some of them. What
is proposed is a hypothesis: a model trained with the schedule from the start may do better than one that is cut.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.devices import resolve_dtype
from dsmr.console.errors import UserError
from dsmr.corpus.returns import Planter, Return, planted_corpus
from dsmr.corpus.store import Corpus
from dsmr.evaluation.losses import open_run, piece_losses
from dsmr.evaluation.returns import LEAD
from dsmr.experiments.cell import measured_pieces
from dsmr.experiments.table import Measure
from dsmr.model.reshaped import with_schedule
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel
from dsmr.profiling.budget import parse_bytes
from dsmr_kernels.costing.cost import memory_bytes

CONFIRMED = 6
"""Schedules of the front that are measured whole."""


HORIZON, KV_HEADS = "horizon", "kv_heads"


@dataclass(frozen=True)
class Loss:
    """Nats a token over all tokens, and at planted returns (None: none were planted)."""

    tokens: float
    returns: float | None

    def on(self, what: str) -> float:
        """That of `what`, "tokens" or "returns"."""
        found = self.tokens if what == "tokens" else self.returns
        assert found is not None
        return found

    def __sub__(self, other: "Loss") -> "Loss":
        returns = None if self.returns is None or other.returns is None else self.returns - other.returns
        return Loss(self.tokens - other.tokens, returns)


@dataclass(frozen=True)
class Cost:
    """How much more loss there is once a layer's `what`, its horizon or its KV heads, is `value`."""

    layer: int
    what: str
    value: int
    more: Loss


@dataclass(frozen=True)
class Point:
    """A schedule of the front, and how much more loss than with the model's own schedule; `measured` where it was."""

    horizons: tuple[int, ...]
    kv_heads: tuple[int, ...]
    bytes: int
    predicted: float
    measured: Loss | None = None

    @property
    def schedule(self) -> MemorySchedule:
        return MemorySchedule.explicit(self.horizons, self.kv_heads)


@dataclass(frozen=True)
class Search:
    """What `search` found.

    Attributes:
        on: what costs are counted on, "tokens" or "returns".
        own: the model's own schedule, bytes its memory of one stream (bfloat16).
        base: its losses.
        costs: one change of one layer each.
        front: the best schedules, the smallest first.
        budget: bytes asked for.
        best: the cheapest within the budget, by what was predicted.
    """

    run: str
    corpus: str
    split: str
    pieces: int
    on: str
    own: str
    bytes: int
    base: Loss
    costs: tuple[Cost, ...]
    front: tuple[Point, ...]
    budget: int
    best: Point

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)


def ladder(horizon: int, shortest: int) -> list[int]:
    """Horizons to try: the layer's own, halved down to `shortest`, and none."""
    rungs = [horizon]
    while rungs[-1] // 2 >= max(shortest, 1):
        rungs.append(rungs[-1] // 2)
    return sorted({*rungs, 0}, reverse=True)


def divisors(heads: int) -> list[int]:
    """Numbers of KV heads that `heads` can be merged into, its own first."""
    return [n for n in range(heads, 0, -1) if heads % n == 0]


def search(
    run: str | Path,
    data: str | Path | None = None,
    *,
    budget: int | float = 0.5,
    on: str = "tokens",
    split: str = "validation",
    tokens: int | None = 100_000,
    distance: tuple[int, int] = (1000, 16000),
    batch_size: int = 4,
    dtype: str = "float32",
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Search:
    """Measure what each layer of `run` needs and find the best schedule within `budget`.

    Args:
        budget: bytes of one stream's memory in bfloat16, or, as a fraction below 1, of what the run's own takes.
        on: "tokens", all of them; "returns", passages planted into the pieces `distance` tokens after they were heard,
            as the far memory is for: in natural music it hardly shows in the mean (docs/experiments.md).
        tokens: measure on a fixed choice of pieces of about so many; None = all of the split.
        progress: told the measurements done, of how many.

    Raises:
        UserError: for a run without a memory, one that keeps others than the newest tokens, or a budget that is none.
    """
    if on not in ("tokens", "returns"):
        raise UserError(f"costs are counted on 'tokens' or 'returns', not on {on!r}")
    model, corpus = open_run(run, data, device)
    own = model.config.schedule
    check_searchable(own, str(run))
    sizes = {"n_heads": model.config.n_heads, "head_dim": model.config.d_model // model.config.n_heads}
    most = own.budget_bytes(**sizes)
    allowed = int(budget * most) if budget < 1 else int(budget)
    if allowed < 1:
        raise UserError(f"the budget must be more than 0 bytes, but it is {budget}")
    pieces = measured_pieces(corpus, Measure(split=split, tokens=tokens))
    how = {"batch_size": batch_size, "dtype": resolve_dtype(dtype, next(model.parameters()).device)}
    yardstick = _Yardstick(model, corpus, split, pieces, on, distance, seed, how)
    changes = list(_changes(own, model.config.n_heads, model.config.segment_length))
    total, done = len(changes) + CONFIRMED + 1, itertools.count(1)

    def measure(schedule: MemorySchedule) -> Loss:
        found = yardstick(with_schedule(model, schedule))
        if progress is not None:
            progress(min(next(done), total), total)
        return found

    base = measure(own)
    costs = tuple(Cost(layer, what, value, measure(schedule) - base) for layer, what, value, schedule in changes)
    front = best_schedules(own, costs, on=on, **sizes)
    best = [point for point in front if point.bytes <= allowed][-1]  # the front begins with no memory at all
    chosen = {best, *_spread(front, CONFIRMED - 1)}
    seen = {point: replace(point, measured=measure(point.schedule) - base) for point in chosen}
    return Search(
        run=Path(run).name,
        corpus=corpus.name,
        split=split,
        pieces=len(pieces),
        on=on,
        own=str(own),
        bytes=most,
        base=base,
        costs=costs,
        front=tuple(seen.get(point, point) for point in front),
        budget=allowed,
        best=seen[best],
    )


def check_searchable(schedule: MemorySchedule, run: str) -> None:
    """`UserError` for a schedule with nothing to cut, or whose memories are not of the newest tokens."""
    if not any(schedule.horizons):
        raise UserError(f"{run} has no memory, so there is nothing to cut: search from a model of a full schedule")
    if not schedule.newest:
        raise UserError(f"{run} keeps other tokens than the newest, which cannot be cut: search from a full schedule")


class _Yardstick:
    """Mean losses of a model: over all tokens of the pieces, and at returns planted into them."""

    def __init__(
        self,
        model: DSMRModel,
        corpus: Corpus,
        split: str,
        pieces: np.ndarray,
        on: str,
        distance: tuple[int, int],
        seed: int,
        how: dict[str, Any],
    ) -> None:
        self.corpus, self.pieces, self.how = corpus, pieces, how
        self.planted: tuple[Corpus, list[tuple[Return, ...]]] | None = None
        if on == "returns":
            planter = Planter(corpus.vocabulary, distance=distance)
            self.planted = planted_corpus(corpus, split, planter, seed, pieces)

    def __call__(self, model: DSMRModel) -> Loss:
        losses = piece_losses(model, self.corpus, self.pieces, **self.how)
        tokens = float(np.concatenate(losses).mean(dtype=np.float64))
        if self.planted is None:
            return Loss(tokens, None)
        corpus, returns = self.planted
        chosen = [i for i, found in enumerate(returns) if found]
        at = [
            loss[found.begin + LEAD - 1 : found.end - 1]  # as `dsmr.evaluation.returns` counts them
            for i, loss in zip(chosen, piece_losses(model, corpus, chosen, **self.how), strict=True)
            for found in returns[i]
        ]
        return Loss(tokens, float(np.mean([part.mean(dtype=np.float64) for part in at if len(part)])))


def _changes(schedule: MemorySchedule, n_heads: int, segment: int) -> Iterator[tuple[int, str, int, MemorySchedule]]:
    """One layer changed at a time: (layer, what, its new value, the schedule)."""
    horizons, heads = schedule.horizons, schedule.heads(n_heads)

    def put(values: Sequence[int], layer: int, value: int) -> list[int]:
        return [*values[:layer], value, *values[layer + 1 :]]

    for layer, (horizon, own) in enumerate(zip(horizons, heads, strict=True)):
        for shorter in ladder(horizon, segment)[1:]:
            yield layer, HORIZON, shorter, MemorySchedule.explicit(put(horizons, layer, shorter), heads)
        for fewer in divisors(own)[1:] if horizon else []:  # heads cost no memory where there is none
            yield layer, KV_HEADS, fewer, MemorySchedule.explicit(horizons, put(heads, layer, fewer))


def best_schedules(
    own: MemorySchedule, costs: Sequence[Cost], *, n_heads: int, head_dim: int, on: str = "tokens"
) -> list[Point]:
    """The front over horizons and KV heads of all layers, the smallest first: no other schedule of the measured
    choices costs less and is no larger, if the costs of layers add up. Exact: layer by layer, what is no smaller and no
    better than another is let go.

    A choice that came out better than the layer's own counts as costing nothing: it is chance, or a fault of training.
    """
    found = {(cost.layer, cost.what, cost.value): max(0.0, cost.more.on(on)) for cost in costs}
    front: list[tuple[int, float, tuple[int, ...], tuple[int, ...]]] = [(0, 0.0, (), ())]
    for layer, (horizon, heads) in enumerate(zip(own.horizons, own.heads(n_heads), strict=True)):
        horizons, widths = (
            {value: 0.0} | {v: price for (at, kind, v), price in found.items() if (at, kind) == (layer, what)}
            for what, value in ((HORIZON, horizon), (KV_HEADS, heads))
        )
        choices = []
        for h, w in itertools.product(horizons, widths):
            if h or w == heads:  # heads cost no memory where there is none
                size = memory_bytes(batch=1, horizon=h, kv_heads=w, head_dim=head_dim, bytes_per_element=2)
                choices.append((size, horizons[h] + widths[w], h, w))
        grown = [
            (size + more, price + extra, (*hs, h), (*ws, w))
            for size, price, hs, ws in front
            for more, extra, h, w in choices
        ]
        front = _undominated(grown)
    return [Point(horizons, heads, size, price) for size, price, horizons, heads in front]


def _undominated(points: list[tuple[int, float, tuple[int, ...], tuple[int, ...]]]) -> list[Any]:
    """Sorted by size, each better than all smaller ones."""
    kept: list[Any] = []
    least = math.inf
    for point in sorted(points):
        if point[1] < least - 1e-12:
            kept.append(point)
            least = point[1]
    return kept


def _spread(front: Sequence[Point], count: int) -> list[Point]:
    """So many points of the front, evenly by the logarithm of their size, its ends among them."""
    if len(front) <= count:
        return list(front)
    sizes = np.log2([max(point.bytes, 1) for point in front])
    sizes[0] = min(sizes[0], sizes[1] - 1)
    low = sizes[1] if front[0].bytes == 0 and len(sizes) > 1 else sizes[0]
    wanted = np.linspace(low, sizes[-1], count)
    return [front[i] for i in sorted({int(np.abs(sizes - w).argmin()) for w in wanted})]


def parse_budget(text: str) -> int | float:
    """Bytes of "2MiB", or the share below 1 of "50%"; `UserError` for anything else."""
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share is None:
        return parse_bytes(text)
    if not 0 < float(share[1]) < 100:
        raise UserError(f"the budget's share must lie between 0% and 100%, but it is {text!r}")
    return float(share[1]) / 100


def parse_distance(text: str) -> tuple[int, int]:
    """Nearest and farthest of "1000,16000"; `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text)
    if found is None or not 0 < int(found[1]) <= int(found[2]):
        raise UserError(f"distances must be two numbers of tokens such as 1000,16000, but they are {text!r}")
    return int(found[1]), int(found[2])
