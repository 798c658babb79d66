"""What a retained set claims to keep, row by row, in Python's integers and lists; and keys that tell their token."""

from dataclasses import dataclass, field

import pytest
import torch
from small_memories import BACKENDS

from dsmr_kernels import KVMemory

HEADS, DIM = 2, 16


def tokens(batch: int, count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell their token: number t in row b is 1000 * b + t + 1, values are negative."""
    number = torch.arange(first + 1, first + count + 1) + 1000 * torch.arange(batch)[:, None]
    k = number[:, None, :, None].expand(batch, HEADS, count, DIM).float().clone()
    return k, -k


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64, in Python's integers."""
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def drawn(seed: int, number: int) -> int:
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    return splitmix(splitmix(seed + golden & mask) + number * golden & mask) >> 32


@dataclass
class Row:
    """What one row of the set claims to be: the segment in progress, and the tokens chosen of those before."""

    retention: str
    kept: int
    room: int
    seed: int = 0
    slots: dict[int, float] = field(default_factory=dict)
    waiting: list[float] = field(default_factory=list)
    offered: int = 0
    in_segment: int = 0
    position: int = 0

    def new_piece(self) -> None:
        self.slots, self.waiting, self.offered, self.position = {}, [], 0, 0

    def add(self, value: float) -> None:
        if self.room and self.in_segment == self.room:
            self.settle()
        self.waiting.append(value)
        self.position += 1
        self.in_segment += self.room > 0
        if not self.room:
            self.settle()

    def settle(self) -> None:
        for value in self.waiting:
            self.offer(value)
        self.waiting, self.in_segment = [], 0

    def offer(self, value: float) -> None:
        number, self.offered = self.offered, self.offered + 1
        if self.retention == "random":
            slot = number if number < self.kept else drawn(self.seed, number) * (number + 1) >> 32
            if slot < self.kept:
                self.slots[slot] = value
            return
        # By what is held alone: the multiples of the coarsest step that leaves room, the oldest odd ones making way.
        step = 1
        while number // step >= self.kept:
            step *= 2
        if number % step:
            return
        self.slots[number] = value
        if len(self.slots) > self.kept:
            del self.slots[min(n for n in self.slots if n % step)]

    @property
    def held(self) -> list[float]:
        return sorted([*self.slots.values(), *self.waiting])


def holds(memory: KVMemory) -> list[list[float]]:
    """The tokens of each row, by their keys, and that values and all heads agree."""
    k, v, mask = memory.ordered()
    assert mask.sum(1).tolist() == memory.length.tolist()
    assert torch.equal(k, -v)
    assert bool((k == k[:, :1, :, :1]).all())
    return [sorted(k[row, 0, mask[row], 0].tolist()) for row in range(memory.batch)]


def a_set(retention: str, kept: int, room: int = 0, batch: int = 2, seed: int = 5, **more) -> KVMemory:
    seeds = seed + torch.arange(batch)
    return KVMemory.empty(
        batch, HEADS, kept + room, DIM, retention=retention, room=room, seed=seeds, dtype=torch.float32, **more
    )


def rows_of(memory: KVMemory, seed: int = 5) -> list[Row]:
    return [Row(memory.retention, memory.kept, memory.room, seed + row) for row in range(memory.batch)]


SLOW = {"triton": [pytest.mark.slow]}  # in Triton's interpreter
every = pytest.mark.parametrize("backend", [pytest.param(name, marks=SLOW.get(name, [])) for name in BACKENDS])
policies = pytest.mark.parametrize("retention", ["uniform", "random"])
