"""Forward and backward with the mask written out, from counters that stay on the device: nothing waits for the host.

For accelerators where the fused kernels cannot serve. Queries are taken in tiles, so that no more than a tile's scores
are held at a time; memory and call are multiplied apart and never concatenated.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.finite import marked
from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Gradients, Inputs, Needs
from dsmr_kernels.visibility import lowest_visible, segment_of

TILE_SCORES = 1 << 26  # elements of a tile's scores, over all rows and heads


def ages(memory: Ring) -> Tensor:
    """How many tokens back each slot of the ring lies, (B, C): 1 for the newest; more than `length` if not held."""
    slots = torch.arange(memory.capacity, device=memory.k.device)
    return (memory.position[:, None] - 1 - slots).remainder(memory.capacity) + 1


def held_values(memory: Ring, age: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the ring, with zeros where nothing is held: a weight of 0 does not silence a NaN."""
    unheld = (age > memory.length[:, None])[:, None, :, None]
    k, v = (x.masked_fill(unheld, 0.0) for x in memory.values(dtype))
    return k, v


class Masked:
    """One call. Shapes: g counts the query heads of a KV head, n the queries of a tile, m = C + S all keys."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, memory, q, k = inputs, inputs.memory, inputs.q, inputs.k
        self.work = torch.float32 if q.dtype == torch.float16 and q.device.type == "cpu" else q.dtype
        self.wide = torch.promote_types(self.work, torch.float32)
        self.shift, self.group = k.shape[2] - q.shape[2], q.shape[1] // k.shape[1]
        self.sides = [marked(k.to(self.work), inputs.v.to(self.work))]
        self.j = torch.arange(k.shape[2], device=q.device).expand(q.shape[0], -1)  # [B, m], keys as they are counted
        self.held = None
        if memory is not None and memory.capacity:
            age = ages(memory)
            self.sides.insert(0, marked(*held_values(memory, age, self.work)))
            self.held = torch.cat([age <= memory.length[:, None], torch.ones_like(self.j, dtype=torch.bool)], 1)
            self.j = torch.cat([-age, self.j], 1)

    def tiles(self) -> list[slice]:
        """Stretches of queries."""
        batch, heads, queries = self.inputs.q.shape[:3]
        size = max(16, TILE_SCORES // max(1, batch * heads * self.j.shape[1]))
        return [slice(start, min(start + size, queries)) for start in range(0, queries, size)]

    def of_queries(self, x: Tensor, tile: slice) -> Tensor:
        """A tile of (B, Hq, T, D), the queries of a group below one another: (B, Hkv, g * n, D)."""
        return x[:, :, tile].to(self.work).unflatten(1, (-1, self.group)).flatten(2, 3)

    def against(self, rows: Tensor, which: int) -> Tensor:
        """Products of rows with the keys (0) or values (1) of both sides: (B, Hkv, g * n, m)."""
        return torch.cat([rows @ side[which].mT for side in self.sides], -1)

    def mix(self, weights: Tensor, which: int) -> Tensor:
        """weights (B, Hkv, g * n, m) times the keys or values of both sides."""
        parts = weights.split([side[which].shape[2] for side in self.sides], -1)
        return sum(part @ side[which] for part, side in zip(parts, self.sides, strict=True))

    def seen(self, tile: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n, m) each: which keys are seen, which of them lie in the query's own segment; and the distances."""
        spec, piece_start, offsets = self.inputs.spec, self.inputs.piece_start, self.inputs.offsets
        p = torch.arange(tile.start + self.shift, tile.stop + self.shift, device=self.j.device)
        offset = spec.segment_offset if offsets is None else offsets[:, None]
        low = lowest_visible(
            p,
            horizon=spec.horizon,
            segment_length=spec.segment_length,
            segment_offset=offset,
            visibility=spec.visibility,
            piece_start=None
            if piece_start is None
            else piece_start[:, tile.start + self.shift : tile.stop + self.shift],
        )
        j = self.j[:, None]
        seen = (j >= low[:, :, None]) & (j <= p[:, None])
        if self.held is not None:
            seen &= self.held[:, None]
        segments = segment_of(p, spec.segment_length, offset).unsqueeze(-1)
        own = segments == segment_of(self.j, spec.segment_length, offset).unsqueeze(-2)
        return seen, own, p[:, None] - j

    def scores(self, rows: Tensor, seen: Tensor, distance: Tensor) -> Tensor:
        """(B, Hkv, g, n, m), in float32 or wider."""
        scores = self.against(rows, 0).to(self.wide).unflatten(2, (self.group, -1)).mul_(self.inputs.spec.scale)
        if self.inputs.alibi is not None:
            slopes = self.inputs.alibi.to(self.wide).view(-1, self.group, 1, 1)
            scores -= slopes * distance[:, None, None]
        if self.inputs.bias is not None:
            scores += (
                self.inputs.bias.to(self.wide)[:, self.columns(distance)].transpose(0, 1).unflatten(1, (-1, self.group))
            )
        return scores.masked_fill_(~seen[:, None, None], -torch.inf)

    def columns(self, distance: Tensor) -> Tensor:
        """The bias's column of each pair."""
        assert self.inputs.buckets is not None
        return self.inputs.buckets[distance.clamp(0, self.inputs.buckets.shape[0] - 1)]

    def forward(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of the whole call."""
        q, v = self.inputs.q, self.inputs.v
        out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=torch.float32)
        for tile in self.tiles():
            seen, _, distance = self.seen(tile)
            scores = self.scores(self.of_queries(q, tile), seen, distance)
            lse[:, :, tile] = scores.logsumexp(-1).flatten(1, 2)
            weights = scores.softmax(-1).flatten(2, 3).to(self.work)
            out[:, :, tile] = self.mix(weights, 1).unflatten(2, (self.group, -1)).flatten(1, 2)
        return out, lse

    def backward(self, grad: Tensor, grad_lse: Tensor | None, needs: Needs) -> Gradients:
        """The gradients of the whole call."""
        inputs, spec = self.inputs, self.inputs.spec
        dq = torch.empty_like(inputs.q) if needs.q else None
        dk, dv = (
            torch.zeros(x.shape, dtype=self.wide, device=x.device) if need else None
            for x, need in ((inputs.k, needs.k), (inputs.v, needs.v))
        )
        dbias = torch.zeros_like(inputs.bias) if inputs.bias is not None and needs.bias else None
        memory = self.j.shape[1] - inputs.k.shape[2]
        for tile in self.tiles():
            seen, own, distance = self.seen(tile)
            rows, above = self.of_queries(inputs.q, tile), self.of_queries(grad, tile)
            weights = self.scores(rows, seen, distance).softmax(-1)
            taking = (own[..., memory:] if spec.detach_segments else torch.ones_like(own[..., memory:]))[:, None, None]
            if dv is not None:
                dv += (weights[..., memory:] * taking).flatten(2, 3).to(self.work).mT @ above
            dweights = self.against(above, 1).to(self.wide).unflatten(2, (self.group, -1))
            pull = (dweights * weights).sum(-1, keepdim=True)
            if grad_lse is not None:
                pull -= grad_lse[:, :, tile].to(self.wide).unflatten(1, (-1, self.group)).unsqueeze(-1)
            dscores = weights * (dweights - pull)
            if dbias is not None:
                flat = dscores.flatten(1, 2).transpose(0, 1).flatten(1)
                dbias.index_add_(1, self.columns(distance).flatten(), flat.to(dbias.dtype))
            if dk is not None:
                dk += ((dscores[..., memory:] * taking).flatten(2, 3).to(self.work).mT @ rows).mul_(spec.scale)
            if dq is not None:
                mixed = self.mix(dscores.flatten(2, 3).to(self.work), 0).mul_(spec.scale)
                dq[:, :, tile] = mixed.unflatten(2, (self.group, -1)).flatten(1, 2)
        dk, dv = (None if x is None else x.to(inputs.k.dtype) for x in (dk, dv))
        return Gradients(dq, dk, dv, dbias)
