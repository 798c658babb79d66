"""What a call's queries see, as plain integers: runs of queries, where their keys lie in storage, and the parts of the
call that can be computed side by side."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsmr_kernels.ring import ring_slices
from dsmr_kernels.spec import Inputs
from dsmr_kernels.visibility import Run, runs_of_row

_MOST_PLANS = 64  # that calls alike keep; beyond, all are made anew
_MOST_RUNS = 64  # of a plan that is kept; a call of more takes long, whoever plans it, and a run 200 bytes


class Group(NamedTuple):
    """Rows that share a plan: the same runs and the same write position in the ring."""

    rows: slice
    position: int
    runs: tuple[Run, ...]


class Plan(NamedTuple):
    """What a call's rows see. `pairs`: query-key pairs of a query head, over all rows, the masked ones too."""

    groups: tuple[Group, ...]
    pairs: int


class Source(NamedTuple):
    """Keys and values of a tile that lie side by side: columns `column` ... of its scores.

    `start` is their first index along the token axis of the storage that they lie in, the memory's or the call's.
    """

    memory: bool
    start: int
    stop: int
    column: int

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.stop - self.start)


def _piece_starts(piece_start: Tensor | None, rows: int) -> list[list[tuple[int, int]]]:
    """For each row, (first token, piece start) of each piece that it touches."""
    if piece_start is None or piece_start.shape[1] == 0:
        return [[(0, -1)]] * rows
    starts = piece_start.to("cpu", torch.int64).clamp(min=-1)
    result: list[list[tuple[int, int]]] = [[(0, int(first))] for first in starts[:, 0].tolist()]
    changes = (starts[:, 1:] != starts[:, :-1]).nonzero()
    for (row, token), value in zip(changes.tolist(), starts[:, 1:][tuple(changes.T)].tolist(), strict=True):
        result[row].append((token + 1, value))
    return result


def plan_call(inputs: Inputs) -> Plan:
    """Group the rows by what they see. Rows in the same situation, the usual case, make one group.

    Calls alike leave their plans for the next ones, by what the memory holds and where: the layers of a model make the
    same call, and a short one takes a few operators' time to plan. Those of many runs, of long calls, are not kept.
    """
    memory, kind, rows = inputs.memory, inputs.alike, inputs.q.shape[0]
    capacity = 0 if memory is None else memory.capacity
    if memory is None or capacity == 0:
        held = ring = [0] * rows
    else:
        held, ring = memory.length.tolist(), [position % capacity for position in memory.position.tolist()]
    if kind is None or inputs.piece_start is not None or inputs.offsets is not None:
        return _plan(inputs, held, ring)
    key = ("seen", *held, *ring)
    plan: Plan | None = kind.plans.get(key)
    if plan is None:
        plan = _plan(inputs, held, ring)
        if sum(len(group.runs) for group in plan.groups) <= _MOST_RUNS:
            if len(kind.plans) >= _MOST_PLANS:
                kind.plans.clear()
            kind.plans[key] = plan
    return plan


def _plan(inputs: Inputs, held: list[int], ring: list[int]) -> Plan:
    """The plan where each row's memory holds so many tokens and is written next at such a slot."""
    q, k, spec, rows = inputs.q, inputs.k, inputs.spec, len(held)
    queries = range(k.shape[2] - q.shape[2], k.shape[2])
    pieces = _piece_starts(inputs.piece_start, rows)
    offsets = [spec.segment_offset] * rows if inputs.offsets is None else inputs.offsets.tolist()
    situations = list(zip(held, ring, pieces, offsets, strict=True))
    if situations and situations.count(situations[0]) == rows:
        spans = [slice(0, rows)]
    else:
        spans = [slice(row, row + 1) for row in range(rows)]
    groups = tuple(
        Group(
            span,
            ring[span.start],
            runs_of_row(
                queries,
                pieces[span.start],
                held[span.start],
                horizon=spec.horizon,
                segment_length=spec.segment_length,
                segment_offset=offsets[span.start],
                visibility=spec.visibility,
            ),
        )
        for span in spans
    )
    return Plan(groups, _pairs_of(groups))


def sources_of(low: int, stop: int, position: int, capacity: int, in_order: bool) -> list[Source]:
    """Where the keys low ... stop - 1 lie: at most two stretches of the ring, and one of the call.

    Unless the keys must come `in_order`, a ring that is seen whole is one stretch.
    """
    sources, column = [], 0
    if low < 0:
        count = min(stop, 0) - low
        whole = count == capacity and not in_order
        for start, end in [(0, capacity)] if whole else ring_slices(position, capacity, low, count):
            sources.append(Source(True, start, end, column))
            column += end - start
    if stop > max(low, 0):
        sources.append(Source(False, max(low, 0), stop, column))
    return sources


class Part(NamedTuple):
    """Rows of a group and KV heads, all of them where there are several rows."""

    group: Group
    rows: slice
    heads: slice


def cut(start: int, stop: int, step: int, grain: int = 1) -> Iterator[tuple[int, int]]:
    """Stretches of `step` from `start` to `stop`; the last may be shorter, and then what goes beyond a multiple of
    `grain`, which divides `step`, is one of its own."""
    even = stop - (stop - start) % grain
    for at in range(start, even, step):
        yield at, min(at + step, even)
    if even < stop:
        yield even, stop


def parts_of(group: Group, kv_heads: int, shares: int, most: int) -> list[Part]:
    """A group cut into some `shares`, none of them of more than `most` KV heads, all rows counted."""
    heads, threads = (group.rows.stop - group.rows.start) * kv_heads, torch.get_num_threads()
    most = max(1, min(most, -(-heads // shares)))
    if shares > 1:  # so that all threads are done at once: 3 parts of 2 heads keep one of two threads for 4 heads

        def longest(size: int) -> int:
            return math.ceil(math.ceil(heads / size) / threads) * size

        most = min(range(most, 0, -1), key=longest)
    parts, together = [], max(1, most // kv_heads)
    for row in cut(group.rows.start, group.rows.stop, together):
        for some in cut(0, kv_heads, kv_heads if together > 1 else most):
            parts.append(Part(group, slice(*row), slice(*some)))
    return parts


def _pairs_of(groups: tuple[Group, ...]) -> int:
    pairs = 0
    for group in groups:
        rows = group.rows.stop - group.rows.start
        pairs += rows * sum((run.stop - run.start) * (run.stop - run.low(run.start)) for run in group.runs)
    return pairs
