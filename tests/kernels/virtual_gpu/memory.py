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
    is a fault: threads of two blocks at any time, warps of a block between two barriers.
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
        self._written, self._writers, self._read, self._readers = (
            [np.zeros(size, np.int64) for size in self._sizes] for _ in range(4)
        )

    def contents(self) -> list[Array]:
        """A copy of all bytes."""
        return [data.copy() for data in self._bytes]

    def restore(self, contents: list[Array]) -> None:
        """Put a copy back, and forget who read and wrote."""
        for data, old in zip(self._bytes, contents, strict=True):
            data[:] = old
        for notes in (self._written, self._writers, self._read, self._readers):
            for note in notes:
                note[:] = 0

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
            if _clash(self._written[storage][at], self._writers[storage][at], by, moment).any():
                raise Fault("a thread reads what another one writes")
            read, readers = self._read[storage], self._readers[storage]
            several = ((read[at] == moment) & (readers[at] != by)) | (read[at] >> 32 != moment >> 32) & (read[at] != 0)
            readers[at] = by
            several |= readers[at] != by  # of this very access
            readers[at[several]] = -1
            read[at] = np.where(read[at] >> 32 == moment >> 32, moment, np.where(read[at] == 0, moment, -1))
            out[inside] = self._bytes[storage][at]
        return out

    def write(self, addresses: Array, data: Array, warps: Array, moment: int) -> None:
        """data: [n, width] bytes."""
        for storage, inside, at in self._places(addresses, data.shape[1]):
            by, here = np.broadcast_to(warps[inside][:, None], at.shape), self._bytes[storage]
            if _clash(self._read[storage][at], self._readers[storage][at], by, moment).any():
                raise Fault("a thread writes what another one reads")
            written = self._written[storage]
            other_block = (written[at] != 0) & (written[at] >> 32 != moment >> 32)
            clash = _clash(written[at], self._writers[storage][at], by, moment) & (here[at] != data[inside])
            if (other_block | clash).any():
                raise Fault("a thread writes what another one writes")
            written[at], self._writers[storage][at], here[at] = moment, by, data[inside]
            if (here[at] != data[inside]).any():
                raise Fault("two threads write different values to the same memory at once")


def _clash(then: Array, warps: Array, by: Array, now: int) -> Array:
    """Whether what happened `then`, 0 = never and -1 = in several blocks, has no certain order to what warps `by` do
    `now`."""
    other_block = (then != 0) & (then >> 32 != now >> 32)
    return other_block | (then == now) & (warps != by)


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
