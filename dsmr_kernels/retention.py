"""Memories that keep another choice of past tokens than the newest: every n-th of the piece, or a random sample of it.

Such a memory is a set of `kept` slots. Every token of a piece, number s from 0, is offered to it once, when its segment
is over, and either takes a slot or is passed by; while s < kept, all are taken.

    uniform   with m the least number for which s >> m < kept, s is taken if it is a multiple of 2**m. It takes the slot
              of one that the coarser grid drops, so that the memory stays full and no data moves: after t tokens it
              holds the multiples of one power of two, and of the next finer one those that have not made way yet.
    random    a reservoir (Vitter, 1985): token s >= kept takes slot floor(u * (s + 1)) if there is one, and each of the
              tokens so far is held with the same probability. u is a hash of the row's seed and s, so that nothing but
              the seed has to be remembered and any way of cutting a stream keeps the same sample, on every device.

In front of the attention kernels, which know rings alone, the set is the last part of a ring that is read from `mark`
backwards: its slots are filled from number kept - 1 downwards, and behind them lies room for the segment in progress,
whose tokens see one another and are offered when the segment is over.

Everything happens in place and without waiting for the device, eagerly or as operators that say what they mutate.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.quantise import quantise
from dsmr_kernels.ring import along_slots

RETENTIONS = ("newest", "uniform", "random")
MOST_KEPT = 2**31 - 1  # so that the products below fit in 64 bits

WITHIN, UNKNOWN = -2, -1
"""In the place of the tokens of the segment in progress: that the new ones stay within it; that nobody may look."""


def empty_set(
    batch: int,
    capacity: int,
    retention: str,
    room: int,
    seed: int | Tensor,
    device: torch.device | str | None,
) -> dict[str, Any]:
    """What a memory that keeps others than the newest tokens has besides; arguments as of `KVMemory.empty`."""
    if retention not in RETENTIONS:
        raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}, got {retention!r}")
    if retention == "newest":
        if room:
            raise ValueError(f"room must be 0 for the newest tokens, which need none, got {room}")
        return {}
    if room < 0 or not 1 <= capacity - room <= MOST_KEPT:
        raise ValueError(
            f"a memory with retention {retention!r} needs 1 to {MOST_KEPT:,} slots besides its room, got a capacity of "
            f"{capacity} and room for {room}"
        )
    counters = {"settled": 0, "mark": capacity - room}
    found: dict[str, Any] = {
        name: torch.full((batch,), value, dtype=torch.int64, device=device) for name, value in counters.items()
    }
    if retention == "random":
        if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or tuple(seed.shape) != (batch,)):
            raise ValueError(
                f"seed must be an integer or int64 of shape (batch,) = ({batch},), got {seed.dtype} of shape "
                f"{tuple(seed.shape)}"
            )
        seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        found["seeds"] = seeds + (seed.to(seeds.device) if isinstance(seed, Tensor) else seed)
    return {**found, "room": room}


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of 64 bits without a sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


# Of SplitMix64, as 64 bits with a sign.
_STEP, _FIRST, _SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed(seeds: Tensor, numbers: Tensor) -> Tensor:
    """32 bits that look random, int64, for each seed and number (int64, of shapes that broadcast): the finaliser of
    SplitMix64 (Steele et al., 2014), twice."""
    x = seeds
    for more in (1, numbers):
        x = x + more * _STEP
        x = (x ^ _shifted(x, 30)) * _FIRST
        x = (x ^ _shifted(x, 27)) * _SECOND
        x = x ^ _shifted(x, 31)
    return _shifted(x, 32)


def uniform_slots(numbers: Tensor, kept: int) -> Tensor:
    """The slot of each token, int64 like `numbers`; -1 = it is passed by."""
    levels = torch.arange(62 - kept.bit_length(), device=numbers.device)
    level = torch.bucketize(numbers, kept << levels, right=True)
    # Of the grid's tokens q, the first half, multiples of 2, stay; the others take the slots of the odd ones. That is
    # a perfect shuffle at each level, and m shuffles are a product with 2**m; of an even number the last stays last.
    cycle = kept if kept % 2 else kept - 1
    place = numbers >> level
    slot = place * (torch.ones_like(level) << level).remainder(cycle) % cycle
    slot = torch.where(place == cycle, place, slot)
    return torch.where(place << level == numbers, slot, -1)


def random_slots(numbers: Tensor, kept: int, seeds: Tensor) -> Tensor:
    """The slot of each token (batch, S), int64; -1 = it is passed by. `seeds` (batch,)."""
    drawn = hashed(seeds[:, None], numbers) * (numbers + 1).clamp(max=MOST_KEPT) >> 32
    return torch.where(numbers < kept, numbers, torch.where(drawn < kept, drawn, -1))


def _storage(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _offer(
    storage: list[Tensor], new: list[Tensor], numbers: Tensor, valid: Tensor, kept: int, seeds: Tensor | None
) -> None:
    """Offer the tokens of `new` (batch, heads, S, ...) to the set, where `valid` (batch, S); `numbers` (batch, S) in
    the piece. Of several that would take one slot the last has it, as if they had come one by one."""
    slots = uniform_slots(numbers, kept) if seeds is None else random_slots(numbers, kept, seeds)
    slots = torch.where(valid & (slots >= 0), kept - 1 - slots, kept)
    order = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    winners = torch.full((slots.shape[0], kept + 1), -1, dtype=torch.int64, device=slots.device)
    winners = winners.scatter_reduce_(1, slots, order, "amax")
    # All that aim at one slot write what the winner brings, and who aims at none writes slot 0 as it will be: then it
    # does not matter who writes last.
    target = torch.where(slots < kept, slots, 0)
    source = winners.gather(1, target)
    for x, fresh in zip(storage, new, strict=True):
        index = along_slots(target, x)
        brought = fresh.gather(2, along_slots(source.clamp(min=0), fresh))
        x.scatter_(2, index, torch.where(along_slots(source >= 0, x), brought, x.gather(2, index)))


def _settle(
    storage: list[Tensor], length: Tensor, settled: Tensor, mark: Tensor, seeds: Tensor | None, room: int, full: Tensor
) -> None:
    """In the rows of `full` (batch,), whose segment in progress is over: offer its tokens to the set."""
    capacity = storage[0].shape[2]
    kept = capacity - room
    waiting = torch.where(
        full, length - settled.clamp(max=kept), 0
    )  # the newest of the room: the others' piece is over
    back = torch.arange(room, device=mark.device) - (room - waiting[:, None])
    in_room = [x[:, :, kept:] for x in storage]
    _offer(storage, in_room, (settled[:, None] + back).clamp(min=0), back >= 0, kept, seeds)
    settled.add_(waiting)
    length.copy_(torch.where(full, settled.clamp(max=kept), length))
    mark.copy_(torch.where(full, kept, mark))


def settle(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    length: Tensor,
    settled: Tensor,
    mark: Tensor,
    seeds: Tensor | None,
    room: int,
) -> None:
    """Offer the segments that are over to the set, in the rows where one is."""
    storage = _storage(k, v, k_scale, v_scale)
    _settle(storage, length, settled, mark, seeds, room, mark == k.shape[2])


def _passes(tokens: int, room: int, filled: int) -> list[tuple[bool, int]]:
    """The stretches that `tokens` new tokens are cut into so that each lies in one segment, at most: whether a segment
    may be over before it, and tokens."""
    if filled == WITHIN:
        return [(False, tokens)]
    if filled == UNKNOWN:
        # The fullest row has room for one token, or has to choose first and then has room for all.
        return [(True, min(tokens, room))] * (1 + -(-(tokens - 1) // room))
    found = []
    while tokens:
        found.append((filled == 0, min(tokens, room - filled)))
        tokens, filled = tokens - found[-1][1], 0
    return found


def _place(
    storage: list[Tensor], new: list[Tensor], mark: Tensor, done: Tensor, take: Tensor, width: int, room: int
) -> None:
    """Write each row's `take` tokens from number `done` on into the room, from `mark` on."""
    kept = storage[0].shape[2] - room
    step = torch.arange(width, device=mark.device)
    slots = (mark[:, None] - kept + step).remainder(room) + kept
    source = (done[:, None] + step).clamp(max=new[0].shape[2] - 1)
    valid = step < take[:, None]
    for x, fresh in zip(storage, new, strict=True):
        index = along_slots(slots, x)
        brought = fresh.gather(2, along_slots(source, fresh))
        x.scatter_(2, index, torch.where(along_slots(valid, x), brought, x.gather(2, index)))


def retain(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    length: Tensor,
    position: Tensor,
    settled: Tensor,
    mark: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    piece_start: Tensor | None,
    counts: Tensor | None,
    seeds: Tensor | None,
    room: int,
    filled: int,
) -> None:
    """Append to the tensors of a set, in place: `KVMemory.append`.

    Without room every call is a segment that is over. `filled`: tokens of the segment in progress, where the host knows
    and all rows are alike; or `WITHIN`, or `UNKNOWN`.
    """
    batch, tokens = new_k.shape[0], new_k.shape[2]
    count = torch.full((batch,), tokens, device=k.device) if counts is None else counts
    first = torch.zeros_like(count)
    if piece_start is not None:
        start = piece_start.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0].to(torch.int64)
        fresh = (start >= 0) & (count > 0)
        first = torch.where(fresh, start, 0)  # tokens before it are of an earlier piece
        for counter in (length, position, settled):
            counter.masked_fill_(fresh, 0)
    position.add_(count - first)
    storage, new = _storage(k, v, k_scale, v_scale), [new_k, new_v]
    if k_scale is not None:
        (key, key_scale), (value, value_scale) = quantise(new_k), quantise(new_v)
        new = [key, value, key_scale, value_scale]
    kept = k.shape[2] - room
    if room == 0:
        order = torch.arange(tokens, device=k.device)
        valid = (order >= first[:, None]) & (order < count[:, None])
        _offer(storage, new, (settled[:, None] + order - first[:, None]).clamp(min=0), valid, kept, seeds)
        settled.add_(count - first)
        length.copy_(settled.clamp(max=kept))
        return
    done = torch.zeros_like(count)
    for over, width in _passes(tokens, room, filled):
        if over:
            _settle(storage, length, settled, mark, seeds, room, (mark == kept + room) & (done < count))
        take = torch.minimum(count - done, kept + room - mark)
        _place(storage, new, mark, done, take, width, room)
        length.add_((done + take - torch.maximum(done, first)).clamp(min=0))
        mark.add_(take)
        done = done + take


retain_operator = torch.library.custom_op(
    "dsmr_kernels::retain",
    retain,
    mutates_args=("k", "v", "k_scale", "v_scale", "length", "position", "settled", "mark"),
)
settle_operator = torch.library.custom_op(
    "dsmr_kernels::settle", settle, mutates_args=("k", "v", "k_scale", "v_scale", "length", "settled", "mark")
)


@retain_operator.register_fake
@settle_operator.register_fake
def _(*arguments: Tensor) -> None:
    return None
