"""Forward and backward by blocked matrix products: any visibility, any bias, any dtype.

For a tile of queries the scores against each source are written side by side into one scratch buffer, so that one
softmax covers them all; keys and values are read where they lie. Grouped heads share their keys: the group's queries
are stacked in the tile. In the backward, dQ runs over every visible key, dK and dV only over the columns that take a
gradient, and nothing is computed for memory. The weights are recomputed, so the forward saves nothing but its inputs.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, Source, sources_of
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.visibility import Run

# Elements of a tile's score buffer: two such buffers in float32 stay within the last cache level of a laptop.
TILE_ELEMENTS = 1_310_720
# Queries of a tile: fewer starve the matrix product, more waste work on the causal edge.
TILE_QUERIES = 256


class Products:
    """One call's tensors and scratch, and the steps that forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: tuple[Tensor, Tensor] | None,
        alibi: Tensor | None,
        spec: AttentionSpec,
    ) -> None:
        self.q, self.k, self.v, self.alibi, self.spec = q, k, v, alibi, spec
        self.memory_k, self.memory_v = memory if memory is not None else (k, v)
        self.capacity = self.memory_k.shape[2] if memory is not None else 0
        self.group = q.shape[1] // k.shape[1]
        self.shift = k.shape[2] - q.shape[2]
        # CPUs multiply float16 slowly, and bfloat16 on accelerators needs no help: only float16 on CPU is widened.
        self.work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
        # Multiplying by a power of two is exact, so then the queries, the smaller tensor, are scaled instead.
        self.fold = math.frexp(spec.scale)[0] == 0.5
        self.scratch: list[Tensor] = []

    def tiles(self, run: Run) -> list[tuple[int, int]]:
        """Cut a run's queries into tiles whose scores against one head fit the scratch."""
        keys = run.stop - run.low(run.start)
        most = max(16, min(TILE_QUERIES, TILE_ELEMENTS // max(keys, 1)) // self.group)
        tiles = -(-(run.stop - run.start) // most)
        edges = [run.start + (run.stop - run.start) * i // tiles for i in range(tiles + 1)]
        return list(itertools.pairwise(edges))

    def head_chunks(self, start: int, stop: int, low: int) -> list[slice]:
        """KV heads to take at once: all of them if they are small, one if one fills the scratch."""
        heads = self.k.shape[1]
        per_head = (stop - start) * self.group * (stop - low)
        most = max(1, TILE_ELEMENTS // max(per_head, 1))
        return [slice(h, min(h + most, heads)) for h in range(0, heads, most)]

    def buffer(self, index: int, shape: tuple[int, int, int]) -> Tensor:
        """The scratch buffer `index` as a tensor of this shape: fresh pages cost more than the arithmetic on them."""
        size = shape[0] * shape[1] * shape[2]
        while len(self.scratch) <= index:
            self.scratch.append(self.q.new_empty(0, dtype=self.work))
        if self.scratch[index].numel() < size:
            self.scratch[index] = self.q.new_empty(size, dtype=self.work)
        return self.scratch[index][:size].view(shape)

    def at(self, row: int, heads: slice, start: int, stop: int) -> tuple[int, slice, slice]:
        """Where the queries start ... stop - 1 of these KV heads' groups lie in a (B, Hq, T, D) tensor."""
        return (
            row,
            slice(heads.start * self.group, heads.stop * self.group),
            slice(start - self.shift, stop - self.shift),
        )

    def stacked(self, x: Tensor, at: tuple[int, slice, slice]) -> Tensor:
        """The group's queries of each KV head, stacked: (B, Hq, T, D) -> (heads, group * n, D)."""
        block = x[at].to(self.work)
        return block if self.group == 1 else block.reshape(-1, self.group * block.shape[1], x.shape[-1])

    def side(self, source: Source, row: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of a source, (heads, s, D) each, where they lie."""
        k, v = (self.memory_k, self.memory_v) if source.memory else (self.k, self.v)
        at = (row, heads, slice(source.start, source.stop))
        return k[at].to(self.work), v[at].to(self.work)

    def weights(
        self,
        q: Tensor,
        sides: list[tuple[Tensor, Tensor]],
        sources: list[Source],
        run: Run,
        start: int,
        stop: int,
        heads: slice,
    ) -> tuple[Tensor, Tensor]:
        """Softmax weights of a tile over all its sources, and their scores, (heads, group * n, keys) both."""
        low = run.low(start)
        shape = (q.shape[0], q.shape[1], stop - low)
        scores = self.buffer(0, shape)
        for source, (k, _) in zip(sources, sides, strict=True):
            torch.bmm(q, k.mT, out=scores[:, :, source.columns])
        if not self.fold:
            scores.mul_(self.spec.scale)
        grid = scores.view(q.shape[0], self.group, stop - start, stop - low)
        p = torch.arange(start, stop, device=q.device)
        if self.alibi is not None:
            distance = p[:, None] - torch.arange(low, stop, device=q.device)  # [n, keys]
            slopes = self.alibi[heads.start * self.group : heads.stop * self.group].view(-1, self.group, 1, 1)
            grid.sub_(slopes.to(torch.promote_types(self.work, torch.float32)) * distance)
        if run.window is not None and (fringe := run.low(stop - 1) - low):
            j = torch.arange(low, low + fringe, device=q.device)
            grid[..., :fringe].masked_fill_(j < (p - run.window)[:, None], -torch.inf)
        if stop - start > 1:
            grid[..., start - low :].masked_fill_(p > p[:, None], -torch.inf)
        weights = self.buffer(1, shape)
        torch.ops.aten._softmax.out(scores, -1, False, out=weights)
        return weights, scores

    def forward(self, plan: list[Group]) -> tuple[Tensor, Tensor | None]:
        q, spec = self.q, self.spec
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if spec.return_lse else None
        for row, group, run, start, stop in self.walk(plan):
            low = run.low(start)
            sources = sources_of(low, stop, group.position, self.capacity)
            for heads in self.head_chunks(start, stop, low):
                at = self.at(row, heads, start, stop)
                block = self.stacked(q, at)
                block = block * spec.scale if self.fold else block
                sides = [self.side(source, row, heads) for source in sources]
                weights, scores = self.weights(block, sides, sources, run, start, stop, heads)
                result = self.mix(weights, [v for _, v in sides], sources)
                out[at] = result.view(-1, stop - start, q.shape[-1])
                if lse is not None:
                    # weight = exp(score - lse), read off where the weight is largest and hence most exact
                    top = scores.amax(-1).to(torch.float32) - weights.amax(-1).to(torch.float32).log()
                    lse[at] = top.view(-1, stop - start)
        return out, lse

    def mix(self, weights: Tensor, values: list[Tensor], sources: list[Source]) -> Tensor:
        """Sum over sources of weights @ values: (heads, group * n, D)."""
        total = torch.bmm(weights[:, :, sources[0].columns], values[0])
        for source, value in zip(sources[1:], values[1:], strict=True):
            total.baddbmm_(weights[:, :, source.columns], value)
        return total

    def walk(self, plan: list[Group]) -> Iterator[tuple[int, Group, Run, int, int]]:
        """Every tile of every row: (row, group, run, start, stop)."""
        for group in plan:
            for row in range(group.rows.start, group.rows.stop):
                for run in group.runs:
                    for start, stop in self.tiles(run):
                        yield row, group, run, start, stop

    def backward(self, plan: list[Group], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, spec = self.q, self.k, self.spec
        wide = torch.promote_types(self.work, torch.float32)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for row, group, run, start, stop in self.walk(plan):
            low = run.low(start)
            sources = sources_of(low, stop, group.position, self.capacity)
            first = max(run.own if spec.detach_segments else 0, low, 0)  # the first key that takes a gradient
            taking = slice(first - low, stop - low)
            for heads in self.head_chunks(start, stop, low):
                at = self.at(row, heads, start, stop)
                block, above = self.stacked(q, at), self.stacked(grad, at)
                block = block * spec.scale if self.fold else block
                sides = [self.side(source, row, heads) for source in sources]
                weights, scores = self.weights(block, sides, sources, run, start, stop, heads)
                dv[row, heads, first:stop] += torch.bmm(weights[:, :, taking].mT, above)
                for source, (_, v) in zip(sources, sides, strict=True):
                    torch.bmm(above, v.mT, out=scores[:, :, source.columns])
                dscores = self.buffer(2, (weights.shape[0], weights.shape[1], weights.shape[2]))
                torch.ops.aten._softmax_backward_data.out(scores, weights, -1, weights.dtype, grad_input=dscores)
                result = self.mix(dscores, [k for k, _ in sides], sources).mul_(spec.scale)
                dq[at] = result.view(-1, stop - start, q.shape[-1])
                gain = torch.bmm(dscores[:, :, taking].mT, block)
                dk[row, heads, first:stop] += gain if self.fold else gain.mul_(spec.scale)
        return dq, dk.to(k.dtype), dv.to(k.dtype)
