"""Forward and backward by blocked matrix products: any visibility, any bias, any dtype.

For a tile of queries the scores against each source are written side by side into one scratch buffer, so that one
softmax covers them all; keys and values are read where they lie. Grouped heads share their keys: the group's queries
are stacked in the tile. In the backward, dQ runs over every visible key, dK and dV only over the columns that take a
gradient, and nothing is computed for memory. The weights are recomputed, so the forward saves nothing but its inputs.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, Source, sources_of
from dsmr_kernels.backends.sdpa.workers import in_parallel
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Gradients, Inputs, Needs
from dsmr_kernels.visibility import Run

# Elements of a tile's scores, over all its heads: the tiles of all cores should stay in the cache.
TILE_ELEMENTS = 1_310_720
# Queries of a tile: fewer starve the matrix product, more waste work on the causal edge.
TILE_QUERIES = 256
# A head whose scores have fewer elements is taken together with others: the calls would cost more than the arithmetic.
SMALL_ELEMENTS = 65_536
# A call with fewer scores than this is over before other threads have begun.
PARALLEL_ELEMENTS = 262_144


@dataclass(frozen=True)
class Tile:
    """Queries start ... stop - 1 of some rows and KV heads, and the keys low ... stop - 1 that they see."""

    rows: slice
    heads: slice
    start: int
    stop: int
    low: int
    run: Run
    sources: list[Source]

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.stop - self.low


class Products:
    """One call: its tensors, and the jobs that it is cut into."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, v, memory, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec
        self.q, self.k, self.v, self.alibi, self.spec = q, k, v, inputs.alibi, spec
        self.bias, self.buckets = inputs.bias, inputs.buckets
        self.memory_k, self.memory_v = (k, v) if memory is None else (memory.k, memory.v)
        self.scales = (None, None) if memory is None else (memory.k_scale, memory.v_scale)
        self.capacity = 0 if memory is None else memory.capacity
        self.group = q.shape[1] // k.shape[1]
        self.shift = k.shape[2] - q.shape[2]
        self.work = torch.float32 if q.dtype == torch.float16 else q.dtype  # CPUs multiply float16 slowly
        # Multiplying by a power of two is exact, so then the queries, the smaller tensor, are scaled instead.
        self.fold = math.frexp(spec.scale)[0] == 0.5
        # The order of keys matters to these alone; without them a full ring is read from end to end.
        self.in_order = inputs.alibi is not None or inputs.bias is not None or spec.visibility == "sliding"

    def cuts(self, run: Run) -> list[tuple[int, int]]:
        """A run's queries, cut so that a head's scores fit a tile."""
        most = max(16, min(TILE_QUERIES, TILE_ELEMENTS // (run.stop - run.low(run.start))) // self.group)
        count = -(-(run.stop - run.start) // most)
        return list(itertools.pairwise(run.start + (run.stop - run.start) * i // count for i in range(count + 1)))

    def for_each_job(self, plan: list[Group], job: Callable[["Job"], None]) -> None:
        """Run `job` on every part of the call that writes to rows and heads of its own, on all cores."""
        jobs, elements, heads = [], 0, self.k.shape[1]
        for group in plan:
            if not group.runs:
                continue
            cuts = [(run, self.cuts(run)) for run in group.runs]
            rows = group.rows.stop - group.rows.start
            # The most scores that one head of one row has in a tile, and in the whole call.
            largest = max((b - a) * (b - run.low(a)) for run, edges in cuts for a, b in edges) * self.group
            elements += rows * heads * sum((b - a) * (b - run.low(a)) for run, edges in cuts for a, b in edges)
            together = 1 if largest >= SMALL_ELEMENTS else TILE_ELEMENTS // largest
            together = max(1, min(together, -(-rows * heads // torch.get_num_threads())))
            row_step, head_step = max(1, together // heads), min(heads, together)
            for row in range(group.rows.start, group.rows.stop, row_step):
                for head in range(0, heads, head_step):
                    some_rows = slice(row, min(row + row_step, group.rows.stop))
                    jobs.append(Job(self, some_rows, slice(head, min(head + head_step, heads)), group, cuts))
        in_parallel(job, jobs, worthwhile=elements * self.group >= PARALLEL_ELEMENTS)

    def forward(self, plan: list[Group], with_lse: bool) -> tuple[Tensor, Tensor | None]:
        """(out, lse) of the whole call; lse only if it is asked for."""
        q = self.q
        out = q.new_empty((*q.shape[:3], self.v.shape[3]))
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if with_lse else None
        self.for_each_job(plan, lambda job: job.forward(out, lse))
        return out, lse

    def backward(self, plan: list[Group], grad: Tensor, grad_lse: Tensor | None, needs: Needs) -> Gradients:
        """The gradients of the whole call."""
        wide = torch.promote_types(self.work, torch.float32)
        dq = torch.empty_like(self.q, memory_format=torch.contiguous_format) if needs.q else None
        dk, dv = (
            torch.zeros(x.shape, dtype=wide, device=x.device) if need else None
            for x, need in ((self.k, needs.k), (self.v, needs.v))
        )
        shares: list[Share] = []
        above = Above(grad, grad_lse, dq, dk, dv, shares if needs.bias else None)
        self.for_each_job(plan, lambda job: job.backward(above))
        dbias = None
        if self.bias is not None and needs.bias:
            dbias = torch.zeros_like(self.bias)
            for share in sorted(shares, key=lambda share: share.place):  # sums in one order, whoever was first
                dbias[share.heads] += share.found
        dk, dv = (None if x is None else x.to(self.k.dtype) for x in (dk, dv))
        return Gradients(dq, dk, dv, dbias)


class Share(NamedTuple):
    """A tile's share of the bias's gradient, (heads, buckets): of which query heads, and the tile's place in the
    call."""

    heads: slice
    place: tuple[int, int, int]
    found: Tensor


class Above(NamedTuple):
    """What a backward begins with, and where its results go; None where nobody asks for one."""

    grad: Tensor
    grad_lse: Tensor | None
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    shares: list[Share] | None


class Job:
    """Some rows and KV heads of a call, with scratch of their own.

    In the shapes below, m counts the rows and KV heads of a tile, g the query heads of a KV head, n the queries.
    """

    def __init__(
        self, call: Products, rows: slice, heads: slice, group: Group, cuts: list[tuple[Run, list[tuple[int, int]]]]
    ) -> None:
        self.call, self.rows, self.heads, self.ring, self.cuts = call, rows, heads, group.position, cuts
        self.scratch: list[Tensor] = []

    def tiles(self) -> Iterator[Tile]:
        """The tiles of this job, in order."""
        call = self.call
        for run, edges in self.cuts:
            for start, stop in edges:
                low = run.low(start)
                sources = sources_of(low, stop, self.ring, call.capacity, call.in_order)
                yield Tile(self.rows, self.heads, start, stop, low, run, sources)

    def buffer(self, index: int, shape: tuple[int, int, int]) -> Tensor:
        """The scratch buffer `index` as a tensor of this shape: fresh pages cost more than the arithmetic on them."""
        size = math.prod(shape)
        while len(self.scratch) <= index:
            self.scratch.append(self.call.q.new_empty(0, dtype=self.call.work))
        if self.scratch[index].numel() < size:
            self.scratch[index] = self.call.q.new_empty(size, dtype=self.call.work)
        return self.scratch[index][:size].view(shape)

    def of_queries(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's part of a tensor (B, Hq, T, ...), a view (rows, g * heads, n, ...)."""
        heads = slice(tile.heads.start * self.call.group, tile.heads.stop * self.call.group)
        return x[tile.rows, heads, tile.start - self.call.shift : tile.stop - self.call.shift]

    def stacked(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's part of a tensor (B, Hq, T, D), the queries of a group stacked: (m, g * n, D)."""
        return self.of_queries(x, tile).to(self.call.work).reshape(-1, self.call.group * tile.queries, x.shape[-1])

    def sides(self, tile: Tile) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each source, (m, s, D)."""

        def part(x: Tensor, scale: Tensor | None, source: Source) -> Tensor:
            here = (tile.rows, tile.heads, slice(source.start, source.stop))
            if scale is not None:
                return dequantise(x[here], scale[here], self.call.work).flatten(0, 1)
            return x[here].to(self.call.work).flatten(0, 1)

        call, (k_scale, v_scale) = self.call, self.call.scales
        keys = [part(*((call.memory_k, k_scale) if s.memory else (call.k, None)), s) for s in tile.sources]
        values = [part(*((call.memory_v, v_scale) if s.memory else (call.v, None)), s) for s in tile.sources]
        return keys, values

    def columns(self, tile: Tile) -> Tensor:
        """For each query and key of a tile the column of the bias, [n, keys]."""
        assert self.call.buckets is not None
        buckets, device = self.call.buckets, self.call.q.device
        distance = torch.arange(tile.start, tile.stop, device=device)[:, None] - torch.arange(
            tile.low, tile.stop, device=device
        )
        return buckets[distance.clamp_(0, buckets.shape[0] - 1)]

    def of_heads(self, x: Tensor, tile: Tile) -> Tensor:
        """The tile's part of something that has an entry a query head."""
        return x[tile.heads.start * self.call.group : tile.heads.stop * self.call.group]

    def against(self, rows: Tensor, sides: list[Tensor], tile: Tile, out: Tensor) -> None:
        """Products of every row with every key (or value) of the sources, side by side: (m, g * n, keys)."""
        if rows.shape[0] == 1:
            for source, side in zip(tile.sources, sides, strict=True):
                torch.bmm(rows, side.mT, out=out[:, :, source.columns])
        elif len(sides) == 1:
            torch.bmm(rows, sides[0].mT, out=out)
        else:  # the batched product writes only contiguous results fast
            torch.cat([torch.bmm(rows, side.mT) for side in sides], -1, out=out)

    def mix(self, weights: Tensor, sides: list[Tensor], tile: Tile) -> Tensor:
        """Sum over sources of weights @ values: (m, g * n, D)."""
        total = torch.bmm(weights[:, :, tile.sources[0].columns], sides[0])
        for source, side in zip(tile.sources[1:], sides[1:], strict=True):
            total.baddbmm_(weights[:, :, source.columns], side)
        return total

    def weights(self, q: Tensor, keys: list[Tensor], tile: Tile) -> tuple[Tensor, Tensor]:
        """Softmax weights of a tile over all its sources, and their scores, (m, g * n, keys) both."""
        shape = (q.shape[0], q.shape[1], tile.keys)
        scores = self.buffer(0, shape)
        self.against(q, keys, tile, scores)
        if not self.call.fold:
            scores.mul_(self.call.spec.scale)
        start, stop, low, window = tile.start, tile.stop, tile.low, tile.run.window
        grid = scores.view(-1, self.call.group, tile.queries, tile.keys)
        p = torch.arange(start, stop, device=q.device)
        if self.call.alibi is not None:
            distance = p[:, None] - torch.arange(low, stop, device=q.device)  # [n, keys]
            slopes = self.of_heads(self.call.alibi, tile)
            slopes = slopes.to(torch.promote_types(self.call.work, torch.float32)).view(-1, self.call.group, 1, 1)
            grid.unflatten(0, (-1, slopes.shape[0])).sub_(slopes * distance)
        if self.call.bias is not None:
            added = self.of_heads(self.call.bias, tile).to(scores.dtype)[:, self.columns(tile)]  # [heads, n, keys]
            grid.unflatten(0, (-1, tile.heads.stop - tile.heads.start)).add_(added.unflatten(0, (-1, self.call.group)))
        if window is not None and (fringe := tile.run.low(stop - 1) - low):
            j = torch.arange(low, low + fringe, device=q.device)
            grid[..., :fringe].masked_fill_(j < (p - window)[:, None], -torch.inf)
        if tile.queries > 1:
            grid[..., start - low :].masked_fill_(p > p[:, None], -torch.inf)
        weights = self.buffer(1, shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)
        return weights, scores

    def forward(self, out: Tensor, lse: Tensor | None) -> None:
        """Fill this job's part of the outputs."""
        call = self.call
        for tile in self.tiles():
            block = self.stacked(call.q, tile)
            block = block * call.spec.scale if call.fold else block
            keys, values = self.sides(tile)
            weights, scores = self.weights(block, keys, tile)
            here = self.of_queries(out, tile)
            here.copy_(self.mix(weights, values, tile).view(here.shape))
            if lse is not None:
                # weight = exp(score - lse), read off where the weight is largest and hence most exact
                top = scores.amax(-1).to(torch.float32) - weights.amax(-1).to(torch.float32).log()
                here = self.of_queries(lse, tile)
                here.copy_(top.view(here.shape))

    def backward(self, above: Above) -> None:
        """Fill this job's part of dq; add to its part of dk and dv; leave its share of the bias's gradient."""
        call = self.call
        scale = call.spec.scale
        for tile in self.tiles():
            first = max(tile.run.own if call.spec.detach_segments else 0, tile.low, 0)  # the first to take a gradient
            taking = slice(first - tile.low, tile.keys)
            block, grad = self.stacked(call.q, tile), self.stacked(above.grad, tile)
            block = block * scale if call.fold else block
            keys, values = self.sides(tile)
            weights, dweights = self.weights(block, keys, tile)
            if above.dv is not None:
                own_dv = above.dv[tile.rows, tile.heads, first : tile.stop]
                own_dv += torch.bmm(weights[:, :, taking].mT, grad).view(own_dv.shape)
            if above.dq is None and above.dk is None and above.shares is None:
                continue
            self.against(grad, values, tile, dweights)
            dscores = self.buffer(2, (weights.shape[0], weights.shape[1], weights.shape[2]))
            torch.ops.aten._softmax_backward_data.out(dweights, weights, -1, weights.dtype, grad_input=dscores)
            if above.grad_lse is not None:
                pull = self.of_queries(above.grad_lse, tile).to(call.work).reshape(*dscores.shape[:2], 1)
                dscores.addcmul_(weights, pull)
            if above.shares is not None:
                above.shares.append(self.share(dscores, tile))
            if above.dq is not None:
                here = self.of_queries(above.dq, tile)
                here.copy_(self.mix(dscores, keys, tile).mul_(scale).view(here.shape))
            if above.dk is not None:
                own_dk = above.dk[tile.rows, tile.heads, first : tile.stop]
                gain = torch.bmm(dscores[:, :, taking].mT, block).view(own_dk.shape)
                own_dk += gain if call.fold else gain.mul_(scale)

    def share(self, dscores: Tensor, tile: Tile) -> Share:
        """The tile's share of the bias's gradient."""
        assert self.call.bias is not None
        group, heads = self.call.group, tile.heads.stop - tile.heads.start
        by_head = dscores.view(-1, heads, group, tile.queries * tile.keys).sum(0, dtype=self.call.bias.dtype)
        found = self.call.bias.new_zeros(heads * group, self.call.bias.shape[1])
        found.index_add_(1, self.columns(tile).flatten(), by_head.flatten(0, 1))
        place = (tile.heads.start, tile.rows.start, tile.start)
        return Share(slice(tile.heads.start * group, tile.heads.stop * group), place, found)
