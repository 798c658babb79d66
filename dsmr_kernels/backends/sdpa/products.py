"""Own matrix products over tiles: any visibility, any bias, any memory, forward and backward.

A tile takes some heads, a block of queries and a stretch of keys, few enough for its scores to stay in the last cache,
and at the causal edge only the queries that see some of its keys. Scores are exponentiated against a pivot that is
known beforehand, in the forward the query's score with its own key: a query always sees itself, so the sum is at least
one, and the usual search for each row's maximum is left out; in the backward it is the log-sum-exp. A stretch that
takes no gradient, such as memory, needs only its share of dQ: three products of five. Grouped heads share their keys:
the group's queries are stacked in the tile. Keys and values are read where they lie, and the jobs that a call is cut
into, some heads each, share nothing that they write.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, Part, Plan, cut, parts_of, sources_of
from dsmr_kernels.backends.sdpa.workers import in_parallel, shares
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Gradients, Inputs, Needs
from dsmr_kernels.visibility import Run

BLOCK_QUERIES, BLOCK_KEYS = 512, 512
DIAGONAL_KEYS = 256  # of a tile at a block's causal edge: half as many save products, and cost as much in operators
TILE_BYTES = 1 << 22  # of a tile's scores, on each core: a quarter as many cost an eighth more time, in operators
# Products in less than float32 are compiled for every shape that they meet, half a mebibyte and some milliseconds each
# (oneDNN, which keeps a thousand of them): pieces that begin anywhere would show it ever new ones. A last tile of keys
# is cut to a multiple of this, with the rest a tile of its own, and a row that is cut within a segment, by a new piece
# or by where the call begins or ends, computes in float32. Whole segments have one length, whatever it is.
GRAIN = 32
LOG2E = math.log2(math.e)  # base-2 exponentials are three times as fast as natural ones
LIMIT = 2.0**64  # of a row's sum, above which a score may be out of range against its pivot


class Block(NamedTuple):
    """Queries begin ... end - 1, counted in the call, of a run."""

    run: Run
    begin: int
    end: int


class Tile(NamedTuple):
    """A stretch of keys, start ... stop - 1 of the memory's storage or of the call, the first of which is token `first`
    as the call counts them; `taking`: gradients flow into them. Queries before the call's token `seen_from` do not see
    any of it."""

    memory: bool
    start: int
    stop: int
    first: int
    taking: bool
    seen_from: int

    def of(self, block: Block) -> Block:
        """The block's queries that may see some of it."""
        return block if self.seen_from == block.begin else block._replace(begin=self.seen_from)


class Call:
    """A call's tensors, and the jobs that it is cut into."""

    def __init__(self, inputs: Inputs, work: torch.dtype) -> None:
        self.inputs, self.spec = inputs, inputs.spec
        q, k, memory = inputs.q, inputs.k, inputs.memory
        self.work, self.wide = work, torch.promote_types(work, torch.float32)
        self.kv_heads, self.members = k.shape[1], q.shape[1] // k.shape[1]
        self.shift, self.alpha = k.shape[2] - q.shape[2], inputs.spec.scale * LOG2E
        self.exact = self.work == self.wide
        self.capacity = 0 if memory is None else memory.capacity
        # The order of keys matters to these alone; without them a full ring is read from end to end.
        self.in_order = inputs.alibi is not None or inputs.bias is not None or inputs.spec.visibility == "sliding"
        self.height = max(BLOCK_QUERIES // self.members, 16)  # queries of a block

    def parts(self, plan: Plan) -> list[Part]:
        """As many heads each as fill a tile, but several parts for every thread where there are heads enough."""
        count, parts = shares(plan.pairs * self.inputs.q.shape[1], self.inputs.q.shape[3]), list[Part]()
        for group in plan.groups:
            if not (size := math.prod(self.largest(group)) * self.work.itemsize):
                continue
            most = TILE_BYTES * (torch.get_num_threads() if count == 1 else 1) // size
            parts += parts_of(group, self.kv_heads, count, most)
        return parts

    def largest(self, group: Group) -> tuple[int, int]:
        """Rows and keys of a group's largest tile, of one KV head."""
        tallest = max((min(run.stop - run.start, self.height) for run in group.runs), default=0)
        longest = max((run.stop - run.low(run.start) for run in group.runs), default=0)
        return tallest * self.members, min(longest, BLOCK_KEYS)


class Job:
    """One part of a call, with scratch of its own.

    In the shapes below m counts the rows and KV heads of the part, g the query heads of a KV head, n the queries of a
    block, s the keys of a tile.
    """

    def __init__(self, call: Call, part: Part) -> None:
        self.call, self.part, self.inputs = call, part, call.inputs
        self.rows, self.heads = part.rows, part.heads
        self.query_heads = slice(part.heads.start * call.members, part.heads.stop * call.members)
        self.views: dict[tuple[bool, str], Tensor] = {}
        self.scratch: dict[str, Tensor] = {}
        self.rooms: dict[tuple[str, int, int], Tensor] = {}
        rows, heads = part.rows.stop - part.rows.start, part.heads.stop - part.heads.start
        self.grid = (rows, heads, call.members)

    def blocks(self) -> Iterator[Block]:
        for run in self.part.group.runs:
            for begin, end in cut(run.start, run.stop, self.call.height):
                yield Block(run, begin, end)

    def tiles(self, block: Block) -> Iterator[Tile]:
        """All keys that the block's queries see, the first tile by all of them; those of the block itself are tiles of
        their own."""
        run, low, spec = block.run, block.run.low(block.begin), self.call.spec
        taking = max(run.own if spec.detach_segments else 0, 0)
        for source in sources_of(low, block.end, self.part.group.position, self.call.capacity, self.call.in_order):
            edges = [source.start, source.stop]
            if not source.memory:
                edges = sorted({*edges, block.begin, min(max(taking, source.start), block.begin)})
            for start, stop in itertools.pairwise(edges):
                # Stacked queries of a group have no common first row; their blocks are low, and lose less.
                diagonal = not source.memory and start >= block.begin and self.call.members == 1
                step = min(DIAGONAL_KEYS, BLOCK_KEYS) if diagonal else BLOCK_KEYS
                for a, b in cut(start, stop, step, 1 if self.call.exact else math.gcd(step, GRAIN)):
                    first = low + source.column + a - source.start
                    taken = not source.memory and a >= taking
                    yield Tile(source.memory, a, b, first, taken, first if diagonal else block.begin)

    def of_block(self, x: Tensor, block: Block) -> Tensor:
        """The block's part of a tensor (B, Hq, T, ...), a view (rows, g * heads, n, ...)."""
        shift = self.call.shift
        return x[self.rows, self.query_heads, block.begin - shift : block.end - shift]

    def stacked(self, x: Tensor, block: Block) -> Tensor:
        """The same with the queries of a group below one another, (m, g * n, D)."""
        x = self.of_block(x, block)
        x = x if x.dtype == self.call.work else x.to(self.call.work)
        return x.reshape(-1, self.call.members * x.shape[2], x.shape[3])

    def column(self, x: Tensor, block: Block) -> Tensor:
        """The block's part of a tensor (B, Hq, T), wide: (m, g * n, 1)."""
        x = self.of_block(x, block).to(self.call.wide)
        return x.reshape(-1, self.call.members * x.shape[2], 1)

    def of_keys(self, x: Tensor) -> Tensor:
        """The job's part of a tensor (B, Hkv, S, ...), (m, S, ...)."""
        return x[self.rows, self.heads].flatten(0, 1)

    def stored(self, memory: bool, name: str) -> Tensor:
        """Keys ("k"), values ("v") or their scales as they lie, (m, S, ...), for all tiles."""
        held = self.views.get((memory, name))
        if held is None:
            held = self.of_keys(getattr(self.inputs.memory if memory else self.inputs, name))
            self.views[memory, name] = held
        return held

    def side(self, tile: Tile, name: str) -> Tensor:
        """The tile's keys ("k") or values ("v"), (m, s, D), cast or dequantised a tile at a time."""
        x = self.stored(tile.memory, name)[:, tile.start : tile.stop]
        if x.dtype == torch.int8:
            return dequantise(x, self.stored(True, f"{name}_scale")[:, tile.start : tile.stop], self.call.work)
        return x if x.dtype == self.call.work else x.to(self.call.work)

    def room(self, name: str, rows: int, keys: int) -> Tensor:
        """Room for a tile's scores, (m, rows, keys), the same storage every time: fresh pages cost more than the
        arithmetic on them."""
        held = self.rooms.get((name, rows, keys))
        if held is None:
            heads = self.grid[0] * self.grid[1]
            if name not in self.scratch:
                most = heads * math.prod(self.call.largest(self.part.group))
                self.scratch[name] = self.inputs.q.new_empty(most, dtype=self.call.work)
            held = self.scratch[name][: heads * rows * keys].view(heads, rows, keys)
            self.rooms[name, rows, keys] = held
        return held

    def scores(self, name: str, rows: tuple[Tensor, ...], y: Tensor, alpha: float) -> Tensor:
        """alpha * (x @ y.mT), with the addend, rounded once, in the room `name`; rows are x and its addend as
        `with_addend` gave them: in float32 the addend is added as it is, else multiplied by alpha first."""
        x, addend = rows
        room = self.room(name, x.shape[1], y.shape[1])
        if self.call.exact:
            return torch.baddbmm(addend, x, y.mT, alpha=alpha, out=room)
        return room.baddbmm_(x, F.pad(y, (0, 2), value=1.0).mT, beta=0, alpha=alpha)

    def with_addend(self, x: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
        """x (m, rows, D) and what is to be added to each row's products, (m, rows, 1), as `scores` takes them.

        In bfloat16 a product's addend would be rounded: there it is two columns of x, to twice its precision, which
        meet ones and are multiplied as the rest is.
        """
        if self.call.exact:
            return x, addend
        if addend.dtype == x.dtype:
            return F.pad(torch.cat([x, addend], -1), (0, 1)), addend
        high = addend.to(x.dtype)
        return torch.cat([x, high, (addend - high).to(x.dtype)], -1), addend

    def distances(self, block: Block, tile: Tile) -> Tensor:
        """How far back each key lies from each query, (n, s)."""
        device = self.inputs.q.device
        tokens = torch.arange(block.begin, block.end, device=device)[:, None]
        return tokens - torch.arange(tile.first, tile.first + tile.stop - tile.start, device=device)

    def columns(self, block: Block, tile: Tile) -> Tensor:
        """The bias's column of each query and key, (n, s)."""
        assert self.inputs.buckets is not None
        return self.inputs.buckets[self.distances(block, tile).clamp_(0, self.inputs.buckets.shape[0] - 1)]

    def add_bias(self, scores: Tensor, block: Block, tile: Tile) -> None:
        """Add ALiBi and the learned bias to scores (m, g * n, s), in powers of two."""
        alibi, bias = self.inputs.alibi, self.inputs.bias
        if alibi is None and bias is None:
            return
        seen = scores.view(self.grid[0], self.grid[1] * self.grid[2], block.end - block.begin, scores.shape[2])
        if alibi is not None:
            slopes = alibi[self.query_heads].to(self.call.wide)[:, None, None] * LOG2E
            seen.sub_(slopes * self.distances(block, tile))
        if bias is not None:
            seen.add_((bias[self.query_heads].to(self.call.wide) * LOG2E)[:, self.columns(block, tile)])

    def keep_visible(self, weights: Tensor, block: Block, tile: Tile) -> None:
        """Zero the weights (m, g * n, s) of pairs that are not visible, whatever they are."""
        causal = not tile.memory and tile.stop > block.begin + 1
        left = block.run.window is not None and tile.first < block.run.low(block.end - 1)
        if not (causal or left):
            return
        pairs = weights if self.call.members == 1 else weights.unflatten(1, (self.call.members, -1))
        if causal:
            pairs.tril_(block.begin - tile.first)
        if left and block.run.window is not None:
            pairs.triu_(block.begin - block.run.window - tile.first)

    def own_scores(self, q: Tensor, block: Block) -> Tensor:
        """Of each query with its own key, not scaled, rounded: any pivot does, if it is one. (m, g * n, 1)"""
        own = self.stored(False, "k")[:, block.begin : block.end]
        own = own if own.dtype == q.dtype else own.to(q.dtype)
        if self.call.members == 1:
            pivot = (q * own).sum(-1, keepdim=True)
        else:
            grouped = q.unflatten(1, (self.call.members, -1))
            pivot = (grouped * own.unsqueeze(1)).sum(-1, keepdim=True).flatten(1, 2)
        if self.inputs.bias is not None and self.inputs.buckets is not None:
            nearest = self.inputs.bias[self.query_heads, self.inputs.buckets[0]] / self.call.spec.scale
            pivot.view(*self.grid, -1).add_(nearest.to(pivot.dtype).view(*self.grid[1:], 1))
        return pivot

    def greatest_scores(self, q: Tensor, block: Block) -> Tensor:
        """Each query's greatest score, rounded, as `own_scores`. (m, g * n, 1)"""
        best = q.new_full((*q.shape[:2], 1), -torch.inf, dtype=self.call.wide)
        for tile in self.tiles(block):
            here, above = tile.of(block), tile.seen_from - block.begin
            scores = torch.bmm(q[:, above:], self.side(tile, "k").mT).to(self.call.wide).mul_(self.call.alpha)
            self.add_bias(scores, here, tile)
            seen = torch.ones_like(scores)
            self.keep_visible(seen, here, tile)
            greatest = scores.masked_fill_(seen == 0, -torch.inf).amax(2, keepdim=True)
            best[:, above:] = torch.maximum(best[:, above:], greatest)
        return best.div_(self.call.alpha).to(q.dtype)

    def weighted_sums(self, q: Tensor, block: Block, pivot: Tensor) -> tuple[Tensor, Tensor]:
        """Values weighed by 2 ** (alpha * (score - pivot)), (m, g * n, Dv), and the weights' sum (m, g * n, 1), both
        wide."""
        call = self.call
        rows = self.with_addend(q, pivot * -call.alpha if call.exact else -pivot)
        # A float32 sum of bfloat16 goes through a copy. Rounded tile by tile it is no worse than the totals, which the
        # products round; a caller who asks for the log-sum-exp shall have it exact.
        exact = call.wide if call.spec.return_lse else None
        total: Tensor | None = None
        sums: Tensor | None = None
        for tile in self.tiles(block):
            here, above = tile.of(block), tile.seen_from - block.begin
            weights = self.scores("weights", _below(above, *rows), self.side(tile, "k"), call.alpha)
            self.add_bias(weights, here, tile)
            weights.exp2_()
            self.keep_visible(weights, here, tile)
            total = _added(total, torch.bmm(weights, self.side(tile, "v")), above, call.wide)
            sums = _added(sums, weights.sum(2, keepdim=True, dtype=exact), above, call.wide)
        assert total is not None
        assert sums is not None
        return total, sums

    def forward(self, out: Tensor, lse: Tensor | None, carefully: bool) -> None:
        """Fill this job's part of the outputs."""
        call = self.call
        for block in self.blocks():
            q = self.stacked(self.inputs.q, block)
            pivot = self.greatest_scores(q, block) if carefully else self.own_scores(q, block)
            total, sums = self.weighted_sums(q, block, pivot)
            if not (carefully or sums.amax() < LIMIT):
                pivot = self.greatest_scores(q, block)
                total, sums = self.weighted_sums(q, block, pivot)
            here = self.of_block(out, block)
            here.copy_(total.div_(sums).view(here.shape))
            if lse is not None:
                here = self.of_block(lse, block)
                here.copy_(sums.log2_().add_(pivot, alpha=call.alpha).div_(LOG2E).view(here.shape))

    def backward(self, above: "Above") -> None:
        """Fill this job's part of dQ and of the bias's gradient, add to its part of dK and dV."""
        dk, dv = (self.of_keys(x) if need else x for x, need in ((above.dk, above.needs.k), (above.dv, above.needs.v)))
        for block in self.blocks():
            self.backward_of(block, above, dk, dv)

    def backward_of(self, block: Block, above: "Above", dk: Tensor, dv: Tensor) -> None:
        """The same for a block of queries; dk and dv are the job's parts (m, S, D), wide."""
        call, needs = self.call, above.needs
        q, grad = self.stacked(self.inputs.q, block), self.stacked(above.grad, block)
        delta = (grad.to(call.wide) * self.stacked(above.out, block)).sum(-1, keepdim=True).neg_()
        if above.grad_lse is not None:  # a score's weight is its share in the log-sum-exp's gradient
            delta += self.column(above.grad_lse, block)
        # Scores and dP come out of their products with each row's log-sum-exp and delta subtracted.
        normed = self.with_addend(q, self.column(above.lse, block) * (-LOG2E / (1 if call.exact else call.alpha)))
        pulled = self.with_addend(grad, delta)
        dq: Tensor | None = None
        for tile in self.tiles(block):
            takes_k, takes_v = tile.taking and needs.k, tile.taking and needs.v
            needs_scores = needs.q or needs.bias or takes_k
            if not (needs_scores or takes_v):
                continue
            here, rows = tile.of(block), tile.seen_from - block.begin
            keys, part = self.side(tile, "k"), slice(tile.start, tile.stop)
            weights = self.scores("weights", _below(rows, *normed), keys, call.alpha)
            self.add_bias(weights, here, tile)
            weights.exp2_()
            self.keep_visible(weights, here, tile)
            if takes_v:
                dv[:, part].add_(torch.bmm(weights.mT, _below(rows, grad)[0]))
            if not needs_scores:
                continue
            dscores = self.scores("dscores", _below(rows, *pulled), self.side(tile, "v"), 1.0).mul_(weights)
            if needs.bias:
                self.share(dscores, here, tile, above.dbias)
            if needs.q:
                dq = _added(dq, torch.bmm(dscores, keys), rows, call.wide)
            if takes_k:
                dk[:, part].add_(torch.bmm(dscores.mT, _below(rows, q)[0]), alpha=call.spec.scale)
        if dq is not None:
            written = self.of_block(above.dq, block)
            written.copy_(dq.mul_(call.spec.scale).view(written.shape))

    def share(self, dscores: Tensor, block: Block, tile: Tile, dbias: Tensor) -> None:
        """Add the tile's share of the bias's gradient to `dbias` (B, Hq, buckets), which has an entry for each row:
        who is done first changes no sum."""
        found = dbias[self.rows, self.query_heads].flatten(0, 1)
        flat = dscores.view(found.shape[0], -1).to(dbias.dtype)
        found.index_add_(1, self.columns(block, tile).flatten(), flat)


class Above(NamedTuple):
    """What a backward begins with, what is asked for, and where its results go: wide zeros, and empty where nobody
    asks."""

    out: Tensor
    lse: Tensor
    grad: Tensor
    grad_lse: Tensor | None
    needs: Needs
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor


def forward(inputs: Inputs, plan: Plan, work: torch.dtype, *, carefully: bool = False) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call, computed in `work`; lse only if it is wanted, in float32 or wider.

    `carefully`: no weight is above 1, so that large values stay in range; each row's maximum is looked for first.
    """
    q = inputs.q
    out = q.new_empty((*q.shape[:3], inputs.v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(work, torch.float32)) if inputs.wants_lse else None
    in_parallel(lambda one: Job(*one).forward(out, lse, carefully), _work(inputs, plan, work))
    return out, lse


def _work(inputs: Inputs, plan: Plan, work: torch.dtype) -> list[tuple[Call, Part]]:
    """What the jobs of a call are, those of rows that are cut within a segment in float32."""
    call, whole = Call(inputs, work), inputs.spec.segment_length
    cut_rows = [] if call.exact else [group for group in plan.groups if _is_cut(group, whole)]
    if not cut_rows:
        return [(call, part) for part in call.parts(plan)]
    wide, others = Call(inputs, call.wide), [group for group in plan.groups if not _is_cut(group, whole)]
    return [
        (one, part)
        for one, groups in ((wide, cut_rows), (call, others))
        for part in one.parts(plan._replace(groups=tuple(groups)))
    ]


def _is_cut(group: Group, whole: int | None) -> bool:
    """Whether one of several runs has a length that is neither a multiple of `GRAIN` nor that of a `whole` segment."""
    sizes = [run.stop - run.start for run in group.runs]
    return len(sizes) > 1 and any(size % GRAIN and size != whole for size in sizes)


def _below(above: int, *rows: Tensor) -> tuple[Tensor, ...]:
    """Tensors (m, rows, ...) without their first `above` rows."""
    return tuple(x[:, above:] for x in rows) if above else rows


def _added(total: Tensor | None, part: Tensor, above: int, dtype: torch.dtype) -> Tensor:
    """The sum so far (m, rows, ...) with `part` added below its first `above` rows; the first part has all rows."""
    if total is None:
        return part.to(dtype)
    _below(above, total)[0].add_(part)
    return total


def backward(
    inputs: Inputs,
    plan: Plan,
    work: torch.dtype,
    result: tuple[Tensor, Tensor],
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """The gradients of the whole call, computed in `work`, given its output and log-sum-exp."""
    q, k, v, bias, wide = inputs.q, inputs.k, inputs.v, inputs.bias, torch.promote_types(work, torch.float32)
    needs = needs._replace(bias=needs.bias and bias is not None)
    shapes = (k.shape, v.shape, (*q.shape[:2], 0 if bias is None else bias.shape[1]))
    dk, dv, dbias = (
        torch.zeros(shape if need else 0, dtype=wide, device=q.device)
        for shape, need in zip(shapes, needs[1:], strict=True)
    )
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    above = Above(*result, grad, grad_lse, needs, dq, dk, dv, dbias)
    in_parallel(lambda one: Job(*one).backward(above), _work(inputs, plan, work))
    return Gradients(
        dq if needs.q else None,
        dk.to(k.dtype) if needs.k else None,
        dv.to(v.dtype) if needs.v else None,
        dbias.sum(0).to(bias.dtype) if bias is not None and needs.bias else None,
    )
