"""Forward and backward by batched matrix products over tiles, where a query's past is seen whole.

A tile takes some heads, a block of queries and a stretch of keys: few enough for its scores to stay in the caches, and
so many heads that each operation runs over them on all cores. Scores are exponentiated against a pivot
that is known beforehand, the query's score with its own key: a query always sees itself, so the sum is at least one,
and the usual search for each row's maximum is left out. In the backward a stretch that takes no gradient, such as
memory, needs only its share of dQ: three products of five.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmr_kernels.backends.sdpa.plan import Group, Source, past_of
from dsmr_kernels.quantise import dequantise
from dsmr_kernels.spec import Gradients, Inputs, Needs

BLOCK_QUERIES, BLOCK_KEYS = 512, 512
TILE = {torch.float32: 1 << 20, torch.bfloat16: 1 << 21}  # scores of a tile
LOG2E = math.log2(math.e)  # base-2 exponentials are three times as fast as natural ones
LIMIT = 2.0**64  # of a row's sum, above which a score may be out of range against its pivot


def serves(inputs: Inputs, dtype: torch.dtype | None = None) -> bool:
    """Whether this way can serve the call, computed in `dtype` if that is another than q's; where it can, it is the
    faster one, and its backward wants out and lse."""
    return (
        inputs.q.device.type == "cpu"
        and (dtype or inputs.q.dtype) in TILE  # both have the range of exponents that a pivot needs
        and inputs.alibi is None
        and inputs.bias is None
        and inputs.spec.visibility == "segment"
    )


@dataclass(frozen=True)
class Tile:
    """Queries `rows` of the heads `heads` against keys `keys` of the memory's storage or of the call.

    `taking`: gradients flow into these keys. A `triangle` is seen causally by as many queries, all else whole.
    """

    heads: slice
    rows: slice
    memory: bool
    keys: slice
    taking: bool
    triangle: bool


def head_scores(plan: list[Group]) -> int:
    """Query-key pairs of a query head, the masked ones too, in the row that has most."""
    return max((sum((r.stop - r.start) * (r.stop - r.floor) for r in group.runs) for group in plan), default=0)


def _tiles(inputs: Inputs, group: Group, heads: slice) -> Iterator[Tile]:
    """Of rows and KV heads `heads`, which all belong to `group`."""
    shift, members = inputs.k.shape[2] - inputs.q.shape[2], inputs.q.shape[1] // inputs.k.shape[1]
    capacity = inputs.memory.capacity if inputs.memory else 0
    height = max(BLOCK_QUERIES // members, 16)
    for run in group.runs:
        past = past_of(run, group, capacity, inputs.spec.detach_segments)
        longest = max([run.stop - run.start, *(source.stop - source.start for source, _ in past)])
        scores = members * min(run.stop - run.start, height) * min(longest, BLOCK_KEYS)
        most = max(TILE[inputs.q.dtype] // scores, torch.get_num_threads())
        for head in range(heads.start, heads.stop, most):
            some = slice(head, min(head + most, heads.stop))
            for begin in range(run.start, run.stop, height):
                end = min(begin + height, run.stop)
                rows = slice(begin - shift, end - shift)
                yield Tile(some, rows, False, slice(begin, end), True, True)
                for source, taking in [*past, (Source(False, run.start, begin, 0), True)]:
                    for key in range(source.start, source.stop, BLOCK_KEYS):
                        keys = slice(key, min(key + BLOCK_KEYS, source.stop))
                        yield Tile(some, rows, source.memory, keys, taking, False)


def _each_tile(inputs: Inputs, plan: list[Group], work: Callable[[Tile], None]) -> None:
    """work(tile) for all tiles."""
    kv_heads = inputs.k.shape[1]
    for group in plan:
        for tile in _tiles(inputs, group, slice(group.rows.start * kv_heads, group.rows.stop * kv_heads)):
            work(tile)


class _Call:
    """A call's tensors with batch and KV heads as one dimension."""

    def __init__(self, inputs: Inputs) -> None:
        self.q, k, v, memory = inputs.q, inputs.k, inputs.v, inputs.memory
        self.kv_heads = k.shape[1]
        sides = [(k, v)] + ([] if memory is None else [(memory.k, memory.v)])
        self.sides = [(k.flatten(0, 1), v.flatten(0, 1)) for k, v in sides]
        self.scales: tuple[Tensor, Tensor] | None = None
        if memory is not None and memory.k_scale is not None and memory.v_scale is not None:
            self.scales = memory.k_scale.flatten(0, 1), memory.v_scale.flatten(0, 1)
        self.alpha = inputs.spec.scale * LOG2E
        self._storage: dict[str, Tensor] = {}

    def by_head(self, x: Tensor) -> Tensor:
        """(B, Hq, T, ...) -> (B * Hkv, members of the group, T, ...)"""
        return x.reshape(x.shape[0] * self.kv_heads, x.shape[1] // self.kv_heads, *x.shape[2:])

    def side(self, tile: "Tile", which: int) -> Tensor:
        """The tile's keys (0) or values (1), in q's dtype: eight-bit ones are made so here, a tile at a time."""
        x = self.sides[tile.memory][which][tile.heads, tile.keys]
        if not tile.memory or self.scales is None:
            return x.to(self.q.dtype)
        return dequantise(x, self.scales[which][tile.heads, tile.keys], self.q.dtype)

    def scratch(self, which: str, block: Tensor, keys: Tensor) -> Tensor:
        """Room for a tile's scores, the same storage every time."""
        shape = (block.shape[0], block.shape[1], keys.shape[1])
        count = math.prod(shape)
        storage = self._storage.get(which)
        if storage is None or storage.numel() < count:
            storage = self._storage[which] = self.q.new_empty(count)
        return storage[:count].view(shape)


def _block(x: Tensor, tile: Tile) -> Tensor:
    """The tile's queries of a `by_head` tensor, the group's members below one another. (heads, members * rows, ...)"""
    return x[tile.heads, :, tile.rows].flatten(1, 2)


def _keep_triangle(scores: Tensor, tile: Tile) -> None:
    scores.unflatten(1, (-1, tile.rows.stop - tile.rows.start)).tril_()


def _add(total: Tensor, tile: Tile, part: Tensor) -> None:
    """Add the tile's part to a `by_head` total."""
    x = total[tile.heads, :, tile.rows]
    x += part.view(x.shape)


def _own_scores(inputs: Inputs, call: _Call) -> Tensor:
    """Of each query with its own key, rounded: any pivot does, if it is one. (B * Hkv, members, T, 1)"""
    own = call.sides[0][0].narrow(1, inputs.k.shape[2] - inputs.q.shape[2], inputs.q.shape[2]).unsqueeze(1)
    return (call.by_head(inputs.q) * own).sum(-1, keepdim=True).mul_(call.alpha)


def _greatest_scores(inputs: Inputs, plan: list[Group], call: _Call) -> Tensor:
    """Of each query with any key that it sees, rounded. (B * Hkv, members, T, 1)"""
    q, greatest = call.by_head(inputs.q), _own_scores(inputs, call).float()

    def work(tile: Tile) -> None:
        keys = call.side(tile, 0)
        scores = torch.bmm(_block(q, tile), keys.mT).float()
        if tile.triangle:
            unseen = torch.ones(keys.shape[1], keys.shape[1], dtype=torch.bool).triu_(1)
            scores.unflatten(1, (-1, keys.shape[1])).masked_fill_(unseen, -torch.inf)
        best = greatest[tile.heads, :, tile.rows]
        best.copy_(torch.maximum(best, scores.amax(2).mul_(call.alpha).view(best.shape)))

    _each_tile(inputs, plan, work)
    return greatest.to(inputs.q.dtype)


def _weighted_sums(inputs: Inputs, plan: list[Group], call: _Call, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Values weighed by 2 ** (score + offset), (B * Hkv, members, T, D), and the weights' sum (..., 1), in float32."""
    q = call.by_head(inputs.q)
    totals, sums = torch.zeros((*q.shape[:3], inputs.v.shape[3])), torch.zeros(offset.shape)
    # A float32 sum of bfloat16 goes through a copy. Rounded tile by tile it is no worse than the totals, which the
    # products round; a caller who asks for the log-sum-exp shall have it exact.
    exact = torch.float32 if inputs.spec.return_lse else None

    def work(tile: Tile) -> None:
        keys, values = call.side(tile, 0), call.side(tile, 1)
        block = _block(q, tile)
        weights = call.scratch("weights", block, keys)
        torch.baddbmm(_block(offset, tile), block, keys.mT, alpha=call.alpha, out=weights).exp2_()
        if tile.triangle:
            _keep_triangle(weights, tile)
        _add(sums, tile, weights.sum(2, dtype=exact))
        _add(totals, tile, torch.bmm(weights, values))

    _each_tile(inputs, plan, work)
    return totals, sums


def forward(inputs: Inputs, plan: list[Group]) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of the whole call; lse only if it is wanted."""
    call = _Call(inputs)
    pivot = _own_scores(inputs, call)
    totals, sums = _weighted_sums(inputs, plan, call, -pivot)
    if sums.numel() and not sums.amax() < LIMIT:
        pivot = _greatest_scores(inputs, plan, call)
        totals, sums = _weighted_sums(inputs, plan, call, -pivot)
    out = totals.div_(sums).to(inputs.q.dtype).view(*inputs.q.shape[:3], inputs.v.shape[3])
    if not inputs.wants_lse:
        return out, None
    return out, sums.log2_().add_(pivot).div_(LOG2E).view(inputs.q.shape[:3])


def _with_offset(x: Tensor, offset: Tensor) -> Tensor:
    """x with two columns more that hold `offset` (..., 1) to twice its dtype's precision."""
    high = offset.to(x.dtype)
    return torch.cat([x, high, (offset - high).to(x.dtype)], -1)


def backward(
    inputs: Inputs,
    plan: list[Group],
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """The gradients of the whole call, given its output and log-sum-exp."""
    call, scale = _Call(inputs), inputs.spec.scale
    q, above = call.by_head(inputs.q), call.by_head(grad)
    norm = call.by_head(lse.unsqueeze(-1)) * -LOG2E
    delta = (above.float() * call.by_head(out)).sum(-1, keepdim=True).neg_()
    if grad_lse is not None:  # a score's weight is its share in the log-sum-exp's gradient
        delta += call.by_head(grad_lse.unsqueeze(-1))
    # Scores and dP come out of their products with each row's log-sum-exp and delta subtracted: in float32 as the
    # product's addend, in bfloat16, which would round that, as columns that meet ones.
    exact = q.dtype == torch.float32
    wide_q, wide_above = q, above
    if not exact:
        wide_q, wide_above = _with_offset(q, norm / call.alpha), _with_offset(above, delta)
        norm, delta = norm.to(q.dtype), delta.to(q.dtype)
        if call.scales is None:
            sides = [(F.pad(k, (0, 2), value=1.0), F.pad(v, (0, 2), value=1.0)) for k, v in call.sides]

    def side(tile: Tile, which: int) -> tuple[Tensor, Tensor]:
        """The tile's keys or values, and the same as they are multiplied for scores or dP."""
        x = call.side(tile, which)
        if exact:
            return x, x
        if call.scales is None:
            return x, sides[tile.memory][which][tile.heads, tile.keys]
        return x, F.pad(x, (0, 2), value=1.0)

    dq = torch.zeros(q.shape)
    dk, dv = (torch.zeros(x.shape) for x in call.sides[0])

    def work(tile: Tile) -> None:
        takes_k, takes_v = tile.taking and needs.k, tile.taking and needs.v
        if not (needs.q or takes_k or takes_v):
            return
        keys, wide_keys = side(tile, 0)
        block = _block(wide_q, tile)
        weights = call.scratch("weights", block, keys)
        torch.baddbmm(_block(norm, tile), block, wide_keys.mT, beta=exact, alpha=call.alpha, out=weights).exp2_()
        if tile.triangle:
            _keep_triangle(weights, tile)
        if takes_v:
            dv[tile.heads, tile.keys] += torch.bmm(weights.mT, _block(above, tile))
        if not (needs.q or takes_k):
            return
        dweights = call.scratch("dweights", block, keys)
        wide_values = side(tile, 1)[1]
        above_block = _block(wide_above, tile)
        torch.baddbmm(_block(delta, tile), above_block, wide_values.mT, beta=exact, out=dweights).mul_(weights)
        if needs.q:
            _add(dq, tile, torch.bmm(dweights, keys))
        if takes_k:
            dk[tile.heads, tile.keys] += torch.bmm(dweights.mT, _block(q, tile))

    _each_tile(inputs, plan, work)
    return Gradients(
        dq.mul_(scale).view(inputs.q.shape).to(q.dtype) if needs.q else None,
        dk.mul_(scale).view(inputs.k.shape).to(q.dtype) if needs.k else None,
        dv.view(inputs.v.shape).to(q.dtype) if needs.v else None,
    )
