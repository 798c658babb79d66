"""The tokens of a stream, which may play for days: the newest in memory, all before them in a file without a name."""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

KIND = "i"
CHUNK = 1 << 12
"""Tokens that are kept in memory, and written at once."""


class Heard:
    """A sequence of token ids that grows at its end. However long it becomes, it takes some 16 KiB of memory; where no
    file can be written, it stays in memory."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._file: IO[bytes] | None = None
        self._stored = 0  # tokens in the file, whole chunks
        self._newest = array(KIND)
        self._in_memory = False  # there is no room elsewhere
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self._newest.append(token)
        if len(self._newest) >= CHUNK and not self._in_memory:
            self._store()

    def _store(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="dsmr-tokens-")  # noqa: SIM115 (it goes with the stream)
            self._file.seek(self._stored * self._newest.itemsize)
            self._file.write(self._newest.tobytes())
            self._file.flush()
        except OSError:
            self._in_memory = True
            return
        self._stored += len(self._newest)
        self._newest = array(KIND)

    def __len__(self) -> int:
        return self._stored + len(self._newest)

    def __iter__(self) -> Iterator[int]:
        at = 0
        while at < len(self):  # which may grow meanwhile
            part = self._read(at, CHUNK).tolist() if at < self._stored else self._newest[at - self._stored :].tolist()
            yield from part
            at += len(part)

    def _read(self, start: int, count: int) -> npt.NDArray[np.int32]:
        """Tokens from the file."""
        if self._file is None:
            return np.empty(0, dtype=np.int32)
        size = self._newest.itemsize
        self._file.seek(start * size)
        return np.frombuffer(self._file.read(count * size), dtype=np.int32)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("the tokens of a stream are an array only by copying them")
        whole = np.concatenate([self._read(0, self._stored), np.array(self._newest, dtype=np.int32)])
        return whole if dtype is None else whole.astype(dtype)
