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

    A byte that two blocks write, or one writes and another reads, has no certain value: that is a fault.
    """

    def __init__(self, storages: dict[int, int]) -> None:
        """storages: address -> bytes."""
        self._starts = np.array(sorted(storages), np.int64)
        self._sizes = np.array([storages[int(start)] for start in self._starts], np.int64)
        self._bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * int(size)).from_address(int(start)))
            for start, size in zip(self._starts, self._sizes, strict=True)
        ]
        self._writers = [np.zeros(size, np.int32) for size in self._sizes]
        self._readers = [np.zeros(size, np.int32) for size in self._sizes]

    def contents(self) -> list[Array]:
        """A copy of all bytes."""
        return [data.copy() for data in self._bytes]

    def restore(self, contents: list[Array]) -> None:
        """Put a copy back, and forget who read and wrote."""
        for data, old, writers, readers in zip(self._bytes, contents, self._writers, self._readers, strict=True):
            data[:], writers[:], readers[:] = old, 0, 0

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

    def read(self, addresses: Array, width: int, block: int) -> Array:
        """[n] int64 -> [n, width] bytes; `block` counts from 1."""
        out = np.empty((addresses.size, width), np.uint8)
        for storage, inside, at in self._places(addresses, width):
            writers = self._writers[storage][at]
            if ((writers != 0) & (writers != block)).any():
                raise Fault("a block reads what another one writes")
            readers = self._readers[storage]
            readers[at] = np.where((readers[at] == 0) | (readers[at] == block), block, -1)
            out[inside] = self._bytes[storage][at]
        return out

    def write(self, addresses: Array, data: Array, block: int) -> None:
        """data: [n, width] bytes."""
        for storage, inside, at in self._places(addresses, data.shape[1]):
            for others in (self._writers[storage][at], self._readers[storage][at]):
                if ((others != 0) & (others != block)).any():
                    raise Fault("a block writes what another one reads or writes")
            self._writers[storage][at] = block
            self._bytes[storage][at] = data[inside]


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

    def _at(self, addresses: Array, width: int) -> Array:
        _check_alignment(addresses, width)
        if (addresses < 0).any() or (addresses + width > self.bytes.size).any():
            raise Fault(f"an access of {width} bytes beyond the {self.bytes.size} of shared memory")
        return addresses[:, None] + np.arange(width)

    def read(self, addresses: Array, width: int, warps: Array) -> Array:
        """[n, width] bytes, of which warp `warps[n]` reads each row."""
        at = self._at(addresses, width)
        if ((self._written[at] == self._interval) & (self._writer[at] != warps[:, None])).any():
            raise Fault("a warp reads shared memory that another one has written since the last barrier")
        self._readers[at[self._read[at] != self._interval]] = 0
        self._read[at] = self._interval
        for warp in np.unique(warps):
            self._readers[at[warps == warp]] |= 1 << int(warp)
        return self.bytes[at]

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
