"""Global and shared memory that refuse what a GPU lets pass or punishes late."""

import ctypes
from typing import Any

import numpy as np

from virtual_gpu.program import Fault

Array = np.ndarray[Any, Any]


def _check_alignment(addresses: Array, width: int) -> None:
    if (addresses % width).any():
        raise Fault(f"an access of {width} bytes is not aligned: {int(addresses[addresses % width != 0][0]):#x}")


class GlobalMemory:
    """What one launch may touch: the storages of its tensors, at their own addresses.

    A byte to which one thread gives a new value while another one may read or write it has no certain value, and that
    is a fault: warps of a block between two barriers, and threads of two blocks at any time, unless an atomic operation
    puts them in order. What a block did before a barrier, and its atomic after it, comes before what another block does
    behind its own later atomic at the same address, and a barrier. Blocks run one after another, in their numbers.
    """

    def __init__(self, storages: dict[int, int]) -> None:
        """storages: address -> bytes."""
        self._starts = np.array(sorted(storages), np.int64)
        self._sizes = np.array([storages[int(start)] for start in self._starts], np.int64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(start)))
            for start, size in zip(self._starts, self._sizes, strict=True)
        ]
        # When each byte was last written and read, by which warp; -1 = by several. A moment is block << 32 | barriers.
        # Which block was the first to read it, and behind how many barriers any but the last one did so, at most.
        self._written, self._writers, self._read, self._readers, self._first, self._deepest = self._notes = [
            [np.zeros(size, np.int64) for size in self._sizes] for _ in range(6)
        ]
        self._order = _Order()

    def contents(self) -> list[Array]:
        """A copy of all bytes."""
        return [data.copy() for data in self._bytes]

    def restore(self, contents: list[Array]) -> None:
        """Put a copy back, and forget who read and wrote."""
        for data, old in zip(self._bytes, contents, strict=True):
            data[:] = old
        for notes in self._notes:
            for note in notes:
                note[:] = 0
        self._order = _Order()

    def _places(self, addresses: Array, width: int) -> list[tuple[int, Array, Array]]:
        """Storage, which of the accesses lie in it, and their bytes, for each storage that is touched."""
        _check_alignment(addresses, width)
        index = np.searchsorted(self._starts, addresses, "right") - 1
        offset = addresses - self._starts[np.maximum(index, 0)]
        outside = (index < 0) | (offset + width > self._sizes[np.maximum(index, 0)])
        if outside.any():
            at = int(np.nonzero(outside)[0][0])
            size = int(self._sizes[max(int(index[at]), 0)])
            raise Fault(f"{width} bytes at {int(offset[at])} of a storage of {size} are out of bounds")
        found = []
        for storage in np.unique(index):
            inside = index == storage
            found.append((int(storage), inside, offset[inside][:, None] + np.arange(width)))
        return found

    def read(self, addresses: Array, width: int, warps: Array, moment: int) -> Array:
        """[n] int64 -> [n, width] bytes, of which warp `warps[n]` reads each row; blocks count from 1."""
        out = np.empty((addresses.size, width), np.uint8)
        for storage, inside, at in self._places(addresses, width):
            by = np.broadcast_to(warps[inside][:, None], at.shape)
            if self._order.clash(self._written[storage][at], self._writers[storage][at], by, moment).any():
                raise Fault("a thread reads what another one writes")
            self._note_reading(storage, at, by, moment)
            out[inside] = self._bytes[storage][at]
        return out

    def _note_reading(self, storage: int, at: Array, by: Array, moment: int) -> None:
        read, readers, first, deepest = (
            notes[storage] for notes in (self._read, self._readers, self._first, self._deepest)
        )
        then = read[at]
        elsewhere = (then != 0) & (then >> 32 != moment >> 32)
        deepest[at] = np.where(elsewhere, np.maximum(deepest[at], then & _BARRIERS), deepest[at])
        first[at] = np.where(then == 0, moment >> 32, first[at])
        several = (then == moment) & (readers[at] != by)
        readers[at] = by
        several |= readers[at] != by  # of this very access
        readers[at[several]] = -1
        read[at] = moment

    def add(self, address: int, value: int, warp: int, moment: int) -> int:
        """Add to an int32 in one piece, releasing and acquiring, and return what it was."""
        [(storage, _, at)] = self._places(np.array([address]), 4)
        by = np.full(at.shape, warp)
        if self._order.clash(self._written[storage][at], self._writers[storage][at], by, moment).any():
            raise Fault("a thread adds to what another one writes")
        self._order.atomic(address, moment)
        self._note_reading(storage, at, by, moment - 1)  # it is itself among what it releases
        word = self._bytes[storage][at[0]].view(np.int32)
        old = int(word[0])
        self._bytes[storage][at[0]] = (word + np.int32(value)).view(np.uint8)
        return old

    def write(self, addresses: Array, data: Array, warps: Array, moment: int) -> None:
        """data: [n, width] bytes."""
        for storage, inside, at in self._places(addresses, data.shape[1]):
            by, here = np.broadcast_to(warps[inside][:, None], at.shape), self._bytes[storage]
            read = self._read[storage][at]
            same = (read == moment) & (self._readers[storage][at] != by)
            if same.any() or self._order.any_of(self._first[storage][at], read, self._deepest[storage][at], moment):
                raise Fault("a thread writes what another one reads")
            written = self._written[storage]
            clash = self._order.clash(written[at], self._writers[storage][at], by, moment)
            if (clash & ((written[at] >> 32 != moment >> 32) | (here[at] != data[inside]))).any():
                raise Fault("a thread writes what another one writes")
            written[at], self._writers[storage][at], here[at] = moment, by, data[inside]
            if (here[at] != data[inside]).any():
                raise Fault("two threads write different values to the same memory at once")


_BARRIERS = (1 << 32) - 1  # of a moment


class _Order:
    """Which blocks' doings come before those of the one that runs."""

    def __init__(self) -> None:
        self._block = 0
        self._released: dict[int, dict[int, int]] = {}  # address -> block -> its barriers by then
        self._before: dict[int, tuple[int, int]] = {}  # block -> its barriers by then, and this one's

    def atomic(self, address: int, moment: int) -> None:
        """The block releases what it did, and acquires what others have released at an address."""
        self._enter(moment)
        released = self._released.setdefault(address, {})
        for block, barriers in released.items():
            self._before.setdefault(block, (barriers, moment & _BARRIERS))
        released[moment >> 32] = moment & _BARRIERS
        released.update({block: barriers for block, (barriers, _) in self._before.items() if block not in released})

    def _enter(self, moment: int) -> None:
        if moment >> 32 != self._block:
            self._block, self._before = moment >> 32, {}

    def _precedes(self, block: int, barriers: int, now: int) -> bool:
        then, since = self._before.get(block, (0, 0))
        return barriers < then and since < now & _BARRIERS

    def clash(self, then: Array, warps: Array, by: Array, now: int) -> Array:
        """Whether what happened `then`, 0 = never, has no certain order to what warps `by` do `now`."""
        self._enter(now)
        other_block = (then != 0) & (then >> 32 != now >> 32)
        for moment in np.unique(then[other_block]).tolist():
            if self._precedes(moment >> 32, moment & _BARRIERS, now):
                other_block &= then != moment
        return other_block | (then == now) & (warps != by)

    def any_of(self, first: Array, last: Array, deepest: Array, now: int) -> bool:
        """Whether any block but this one, from number `first` to the moment `last`, 0 = none, behind up to `deepest`
        barriers, has no certain order to what happens `now`."""
        self._enter(now)
        other_block = (last != 0) & ((last >> 32 != now >> 32) | (first != now >> 32))
        seen = np.stack([x[other_block] for x in (first, last, deepest)], 1)
        for begin, moment, barriers in np.unique(seen, axis=0).tolist():
            end = moment >> 32
            barriers = max(barriers, moment & _BARRIERS) if end != now >> 32 else barriers
            if not all(self._precedes(block, barriers, now) for block in range(begin, end + 1) if block != now >> 32):
                return True
        return False


class SharedMemory:
    """A block's. Between two barriers no warp may touch a byte to which another one gives a new value, and none may
    write what another one has read; nothing in it means NaN."""

    def __init__(self, size: int) -> None:
        self.bytes = np.full(-(-max(size, 1) // 16) * 16, 0xFF, np.uint8)
        self._interval = 1  # counts the barriers
        self._written, self._writer = np.zeros((2, self.bytes.size), np.int64)
        self._read, self._readers = np.zeros((2, self.bytes.size), np.int64)

    def barrier(self) -> None:
        """From here on every warp may read what any has written."""
        self._interval += 1

    @property
    def interval(self) -> int:
        """How many barriers there have been, from 1."""
        return self._interval

    def _at(self, addresses: Array, width: int) -> Array:
        _check_alignment(addresses, width)
        if (addresses < 0).any() or (addresses + width > self.bytes.size).any():
            raise Fault(f"an access of {width} bytes beyond the {self.bytes.size} of shared memory")
        return addresses[:, None] + np.arange(width)

    def read(self, addresses: Array, width: int, warps: Array) -> Array:
        """[n, width] bytes, of which warp `warps[n]` reads each row."""
        at = self._at(addresses, width)
        self._check_read((self._written[at] == self._interval) & (self._writer[at] != warps[:, None]))
        self._readers[at[self._read[at] != self._interval]] = 0
        self._read[at] = self._interval
        for warp in np.unique(warps):
            self._readers[at[warps == warp]] |= 1 << int(warp)
        return self.bytes[at]

    def read_by_all(self, addresses: Array, width: int, warps: Array) -> Array:
        """[n, width] bytes, each row of which all of several warps read."""
        at = self._at(addresses, width)
        self._check_read(self._written[at] == self._interval)  # by one of them at most
        self._readers[at[self._read[at] != self._interval]] = 0
        self._read[at] = self._interval
        self._readers[at] |= sum(1 << int(warp) for warp in warps)
        return self.bytes[at]

    def _check_read(self, clashes: Array) -> None:
        if clashes.any():
            raise Fault("a warp reads shared memory that another one has written since the last barrier")

    def write(self, addresses: Array, data: Array, warps: Array) -> None:
        """data: [n, width] bytes, of which warp `warps[n]` writes each row."""
        at, by = self._at(addresses, data.shape[1]), warps[:, None]
        others = (self._written[at] == self._interval) & (self._writer[at] != by)
        if (others & (self.bytes[at] != data)).any():
            raise Fault("two warps write the same shared memory between two barriers")
        if ((self._read[at] == self._interval) & (self._readers[at] & ~(1 << by) != 0)).any():
            raise Fault("a warp writes shared memory that another one has read since the last barrier")
        self._written[at], self._writer[at], self.bytes[at] = self._interval, by, data
        if (self.bytes[at] != data).any():
            raise Fault("two threads write different values to the same shared memory at once")
