"""Fast attention over memory and segment in plain PyTorch: the default on CPU, and it runs on any device.

Two ways, one plan. The plan (`_plan`) cuts each row into runs that share segment and piece, so that under segment
visibility nothing needs a mask but the run's own causal edge.

*Fused* (float32, segment visibility, no ALiBi, forward): PyTorch's flash kernel over each source apart (memory, earlier
tokens of the call, the run itself), merged by log-sum-exp.

*Products* (everything else, and every backward): for a tile of queries, the scores against each source are written side
by side into one scratch buffer, so that one softmax covers them all; keys and values are read where they lie. Grouped
heads share their keys: the group's queries are stacked in the tile. In the backward, dQ runs over every visible key,
dK and dV only over the columns that take a gradient, and nothing is computed for memory. The weights are recomputed, so
the forward saves nothing but its inputs.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.memory import KVMemory, ring_slices
from dsmr_kernels.visibility import Run, runs_of_row

# Elements of a tile's score buffer: two such buffers in float32 stay within the last cache level of a laptop.
TILE_ELEMENTS = 1_310_720
# Queries of a tile: fewer starve the matrix product, more waste work on the causal edge.
TILE_QUERIES = 256

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def unsupported(q: Tensor) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"it computes in float16, bfloat16, float32 or float64, not {q.dtype}"
    return None


@dataclass(frozen=True)
class _Group:
    """Rows that share a plan: the same runs and the same write position in the ring."""

    rows: slice
    position: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class _Source:
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
    if piece_start is None:
        return [[(0, -1)]] * rows
    starts = piece_start.to("cpu", torch.int64).clamp(min=-1)
    result: list[list[tuple[int, int]]] = [[(0, int(first))] for first in starts[:, 0].tolist()]
    changes = (starts[:, 1:] != starts[:, :-1]).nonzero()
    for (row, token), value in zip(changes.tolist(), starts[:, 1:][tuple(changes.T)].tolist(), strict=True):
        result[row].append((token + 1, value))
    return result


def _plan(
    q: Tensor, k: Tensor, memory: KVMemory | None, piece_start: Tensor | None, spec: AttentionSpec
) -> list[_Group]:
    """Group the rows by what they see. Rows in the same situation, the usual case, make one group."""
    rows, queries = q.shape[0], range(k.shape[2] - q.shape[2], k.shape[2])
    capacity = 0 if memory is None else memory.capacity
    held = [0] * rows if memory is None else memory.length.tolist()
    ring = [0] * rows if memory is None or capacity == 0 else memory.position.remainder(capacity).tolist()
    pieces = _piece_starts(piece_start, rows)
    situations = [(held[row], ring[row], tuple(pieces[row])) for row in range(rows)]
    if rows and all(situation == situations[0] for situation in situations):
        spans = [slice(0, rows)]
    else:
        spans = [slice(row, row + 1) for row in range(rows)]
    return [
        _Group(
            span,
            ring[span.start],
            runs_of_row(
                queries,
                pieces[span.start],
                held[span.start],
                horizon=spec.horizon,
                segment_length=spec.segment_length,
                segment_offset=spec.segment_offset,
                visibility=spec.visibility,
            ),
        )
        for span in spans
    ]


def _sources(low: int, stop: int, position: int, capacity: int) -> list[_Source]:
    """Where the keys low ... stop - 1 lie: at most two stretches of the ring, and one of the call."""
    sources, column = [], 0
    if low < 0:
        for start, end in ring_slices(position, capacity, low, min(stop, 0) - low):
            sources.append(_Source(True, start, end, column))
            column += end - start
    if stop > 0:
        sources.append(_Source(False, max(low, 0), stop, column))
    return sources


# Fused forward


def _fused_serves(q: Tensor, alibi_slopes: Tensor | None, spec: AttentionSpec) -> bool:
    """The flash kernel returns the log-sum-exp that the merge needs, and in float32 nothing of ours is faster."""
    return (
        _FLASH is not None
        and q.device.type == "cpu"
        and q.dtype == torch.float32
        and alibi_slopes is None
        and spec.visibility == "segment"
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One source. q (b, Hq, n, D), k and v (b, Hkv, s, D) -> out (b, Hq, n, D), lse (b, Hq, n)."""
    assert _FLASH is not None
    queries, group = q.shape[2], q.shape[1] // k.shape[1]
    if group == 1:
        return _FLASH(q, k, v, 0.0, causal, scale=scale)
    grouped = q.unflatten(1, (-1, group))
    if not causal:  # no order among the queries: stack the group's along the query axis, against the same keys
        out, lse = _FLASH(grouped.flatten(2, 3), k, v, 0.0, False, scale=scale)
        return out.unflatten(2, (group, queries)).flatten(1, 2), lse.unflatten(2, (group, queries)).flatten(1, 2)
    parts = [_FLASH(grouped[:, :, g], k, v, 0.0, True, scale=scale) for g in range(group)]
    return torch.stack([out for out, _ in parts], 2).flatten(1, 2), torch.stack([lse for _, lse in parts], 2).flatten(
        1, 2
    )


def _fused_forward(
    q: Tensor, k: Tensor, v: Tensor, memory: KVMemory | None, plan: list[_Group], spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    shift = k.shape[2] - q.shape[2]
    whole = len(plan) == 1 and len(plan[0].runs) == 1
    out = q.new_empty(0 if whole else q.shape)
    lse = q.new_empty(0 if whole or not spec.return_lse else q.shape[:3])
    for group in plan:
        for run in group.runs:
            tile = (group.rows, slice(None), slice(run.start - shift, run.stop - shift))
            kr, vr = k[group.rows], v[group.rows]
            here = slice(run.start, run.stop)
            o, l = _flash(q[tile], kr[:, :, here], vr[:, :, here], True, spec.scale)
            for source in _sources(run.floor, run.start, group.position, memory.capacity if memory else 0):
                if source.stop == source.start:
                    continue
                ks, vs = (memory.k[group.rows], memory.v[group.rows]) if source.memory and memory else (kr, vr)
                there = slice(source.start, source.stop)
                past_o, past_l = _flash(q[tile], ks[:, :, there], vs[:, :, there], False, spec.scale)
                # o = o * sigmoid(l - past_l) + past_o * sigmoid(past_l - l)
                o = torch.lerp(o, past_o, torch.sigmoid(past_l - l).unsqueeze(-1))
                l = torch.logaddexp(l, past_l)
            if whole:
                return o, l if spec.return_lse else None
            out[tile] = o
            if spec.return_lse:
                lse[tile] = l
    return out, lse if spec.return_lse else None


# Products


class _Products:
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

    def side(self, source: _Source, row: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of a source, (heads, s, D) each, where they lie."""
        k, v = (self.memory_k, self.memory_v) if source.memory else (self.k, self.v)
        at = (row, heads, slice(source.start, source.stop))
        return k[at].to(self.work), v[at].to(self.work)

    def weights(
        self,
        q: Tensor,
        sides: list[tuple[Tensor, Tensor]],
        sources: list[_Source],
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

    def forward(self, plan: list[_Group]) -> tuple[Tensor, Tensor | None]:
        q, spec = self.q, self.spec
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32) if spec.return_lse else None
        for row, group, run, start, stop in self.walk(plan):
            low = run.low(start)
            sources = _sources(low, stop, group.position, self.capacity)
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

    def mix(self, weights: Tensor, values: list[Tensor], sources: list[_Source]) -> Tensor:
        """Sum over sources of weights @ values: (heads, group * n, D)."""
        total = torch.bmm(weights[:, :, sources[0].columns], values[0])
        for source, value in zip(sources[1:], values[1:], strict=True):
            total.baddbmm_(weights[:, :, source.columns], value)
        return total

    def walk(self, plan: list[_Group]) -> Iterator[tuple[int, _Group, Run, int, int]]:
        """Every tile of every row: (row, group, run, start, stop)."""
        for group in plan:
            for row in range(group.rows.start, group.rows.stop):
                for run in group.runs:
                    for start, stop in self.tiles(run):
                        yield row, group, run, start, stop

    def backward(self, plan: list[_Group], grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, spec = self.q, self.k, self.spec
        wide = torch.promote_types(self.work, torch.float32)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for row, group, run, start, stop in self.walk(plan):
            low = run.low(start)
            sources = _sources(low, stop, group.position, self.capacity)
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


# Autograd


def _no_grad_graph(*grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Let a second differentiation through these gradients fail with a sentence."""
    return _Once.apply(*grads) if torch.is_grad_enabled() else grads


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "memory_attention cannot be differentiated twice (create_graph=True) with the sdpa backend; "
            'use backend="reference", which can'
        )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | None,
    plan: list[_Group],
    alibi: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(q.device.type, enabled=False), torch.no_grad():
        if _fused_serves(q, alibi, spec):
            return _fused_forward(q, k, v, memory, plan, spec)
        storage = None if memory is None else (memory.k, memory.v)
        return _Products(q, k, v, storage, alibi, spec).forward(plan)


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: KVMemory | None,
        piece_start: Tensor | None,
        alibi: Tensor | None,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor | None]:
        plan = _plan(q, k, memory, piece_start, spec)
        out, lse = _forward(q, k, v, memory, plan, alibi, spec)
        ctx.save_for_backward(q, k, v)
        ctx.storage = None if memory is None else (memory.k, memory.v)
        ctx.lease = None if memory is None else memory.lease()
        ctx.version = None if memory is None else memory.k._version
        ctx.plan, ctx.alibi, ctx.spec = plan, alibi, spec
        if lse is not None:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v = ctx.saved_tensors
        if ctx.storage is not None and ctx.storage[0]._version != ctx.version:
            raise RuntimeError(
                "the memory of a memory_attention call was written to in place before the call's backward ran; "
                "append through KVMemory.append, which keeps what a backward still needs"
            )
        with torch.autocast(q.device.type, enabled=False), torch.no_grad():
            dq, dk, dv = _Products(q, k, v, ctx.storage, ctx.alibi, ctx.spec).backward(ctx.plan, grad)
        ctx.lease = None  # the memory may be overwritten from here on
        return *_no_grad_graph(dq, dk, dv), None, None, None, None


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | None,
    piece_start: Tensor | None,
    alibi_slopes: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor | None]:
    """See `dsmr_kernels.memory_attention`; arguments are taken as checked."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _MemoryAttention.apply(q, k, v, memory, piece_start, alibi_slopes, spec)
    return _forward(q, k, v, memory, _plan(q, k, memory, piece_start, spec), alibi_slopes, spec)


def decode_attention(q: Tensor, memory: KVMemory, visible: Tensor, alibi_slopes: Tensor | None, scale: float) -> Tensor:
    """See `dsmr_kernels.decode_attention`; arguments are taken as checked."""
    batch, heads, new, dim = q.shape
    kv_heads, capacity = memory.kv_heads, memory.capacity
    work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
    # The age of each slot, 1 for the newest token; the ring itself stays where it lies.
    age = (memory.position[:, None] - 1 - torch.arange(capacity, device=q.device)).remainder(capacity) + 1  # [B, C]
    younger = torch.arange(new, 0, -1, device=q.device)[:, None]  # [n, 1]: query i sees no slot younger than its own
    oldest = torch.minimum(visible, memory.length)
    seen = (age[:, None] >= younger) & (age <= oldest[:, None])[:, None]  # [B, n, C]
    grouped = q.to(work).reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * n, D]
    scores = torch.matmul(grouped, memory.k.to(work).mT).mul_(scale).view(batch, kv_heads, -1, new, capacity)
    if alibi_slopes is not None:
        distance = age[:, None] - younger  # [B, n, C]
        scores = scores - alibi_slopes.view(kv_heads, -1, 1, 1) * distance[:, None, None]
    scores = scores.masked_fill_(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).to(work).flatten(2, 3)
    return torch.matmul(weights, memory.v.to(work)).view(batch, heads, new, dim).to(q.dtype)
