"""Unpacking a data set's archive (zip, tar, compressed tar): bounded before anything is taken, checked to its end.

Nothing is written before the whole archive has been looked at: names that lead out of the folder, links, devices, and
sizes beyond the bounds are refused. A compressed tar is read to its end, because only there stands the sum of what it
holds; without it a changed bit would go unnoticed.
"""

import bz2
import errno
import gzip
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dsmr.console.errors import UserError

LARGEST = 2**30  # bytes that are unpacked at most; MAESTRO's MIDI takes 84 MB
LONGEST_STREAM = 4 * 2**30  # bytes that a tar may hold or expand to, what is passed over included
LONGEST_READ = 2**24  # bytes that are read at once; a header of a tar archive that claims more is no header
XZ_MEMORY = 2**28  # bytes that an xz stream may ask for; its strongest preset asks for 65 MiB
CHUNK = 2**20

Member = tuple[str, int, Callable[[], IO[bytes] | None]]


def unpack(archive: Path, folder: Path, wanted: tuple[str, ...], needed: str, what: str) -> None:
    """Unpack the files of an archive whose suffix is in `wanted` below `folder`.

    `UserError` if no file's name matches the pattern `needed` (it is then not `what` is looked for), or if the archive
    is damaged, unsafe or too large.
    """
    try:
        left = LARGEST
        chosen = []
        with _members(archive) as members:
            for name, size, _ in members:
                if PurePosixPath(name).suffix.lower() in wanted:
                    chosen.append(PurePosixPath(name).name)
                    left -= size
                    if left < 0:
                        raise UserError(f"{archive} is refused: it unpacks to more than {LARGEST / 2**30:g} GiB")
        if not any(re.fullmatch(needed, name) for name in chosen):
            raise UserError(f"{archive} is not {what}")
        with _members(archive) as members:
            for name, size, opener in members:
                if PurePosixPath(name).suffix.lower() in wanted:
                    target = folder / check_name(name, archive)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    packed = opener()
                    if packed is None:
                        raise EOFError(f"{name} cannot be read")
                    with packed, open(target, "wb") as file:
                        _copy(packed, file, size)
    except UserError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # a place in the archive that cannot be is damage as well
            raise
        raise UserError(f"{archive} is damaged: {error}") from error
    except Exception as error:  # the archive modules raise many kinds: zlib.error, LZMAError, EOFError, BadZipFile, …
        raise UserError(f"{archive} is damaged: {str(error) or type(error).__name__}") from error


def check_name(name: str, archive: Path) -> PurePosixPath:
    """The path of a member below the archive's root; `UserError` if it would lead out of it."""
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or re.match("^[A-Za-z]:", name)
    if not name or unsafe:
        raise UserError(f"{archive} is refused: it names the unsafe path {name!r}")
    return path


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    """The regular files of a zip or tar archive: name, size, and a function that opens it. Links are refused."""

    def of_zip(opened: zipfile.ZipFile) -> Iterator[Member]:
        for info in opened.infolist():
            mode = info.external_attr >> 16
            if mode and (mode & 0o170000) not in (0, 0o100000, 0o040000):
                raise UserError(f"{archive} is refused: {info.filename!r} is a link or a device")
            check_name(info.filename, archive)
            opened.open(info).close()  # the name stands twice, and nothing else tells that it was changed
            if not info.is_dir():
                yield info.filename, info.file_size, partial(opened.open, info)

    def of_tar(opened: tarfile.TarFile, stream: Any) -> Iterator[Member]:
        for info in opened:
            if not info.isreg() and not info.isdir():
                raise UserError(f"{archive} is refused: {info.name!r} is a link or a device")
            check_name(info.name, archive)
            if info.isreg():
                yield info.name, info.size, partial(opened.extractfile, info)
        while stream.read(CHUNK):  # behind the last member stands the sum of all that was read
            pass

    with ExitStack() as stack:
        if zipfile.is_zipfile(archive):
            yield of_zip(stack.enter_context(zipfile.ZipFile(archive)))
            return
        stream = _Bounded(stack.enter_context(_expanded(archive)), archive)
        try:
            # Never in tarfile's own compressed modes, which stop reading where the last member ends.
            opened = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))  # type: ignore[call-overload]
        except tarfile.ReadError as error:
            if _magic(archive) is None:
                raise UserError(f"{archive} is neither a folder nor a zip or tar archive") from error
            raise
        yield of_tar(opened, stream)


_KINDS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lambda path: _Xz(path),
}


def _magic(archive: Path) -> bytes | None:
    """How the file begins, if it is compressed."""
    with open(archive, "rb") as file:
        begins = file.read(6)
    return next((magic for magic in _KINDS if begins.startswith(magic)), None)


def _expanded(archive: Path) -> Any:
    magic = _magic(archive)
    return open(archive, "rb") if magic is None else _KINDS[magic](archive)


class _Xz(lzma.LZMAFile):
    """An xz file that may not ask for any amount of memory."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # The memory is asked for by the header of the first block: a few bytes tell.
            lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY).decompress(file.read(1 << 12), max_length=1)
        super().__init__(path)


class _Bounded:
    """A stream that gives no more at once, and no more altogether, than a data set needs."""

    def __init__(self, stream: Any, archive: Path) -> None:
        self._stream, self._archive = stream, archive

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LONGEST_READ:
            raise UserError(f"{self._archive} is refused: a header in it claims {size:,} bytes")
        self._check(self._stream.tell() + size)
        return bytes(self._stream.read(size))

    def seek(self, place: int, whence: int = 0) -> int:
        self._check(place)
        return int(self._stream.seek(place, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def _check(self, place: int) -> None:
        if place > LONGEST_STREAM:
            raise UserError(f"{self._archive} is refused: it unpacks to more than {LONGEST_STREAM / 2**30:g} GiB")


def _copy(packed: IO[bytes], file: IO[bytes], size: int) -> None:
    """Copy exactly `size` bytes, which must be all that there are."""
    while size > 0:
        chunk = packed.read(min(size, CHUNK))
        if not chunk:
            raise EOFError("a file in it is cut short")
        file.write(chunk)
        size -= len(chunk)
    if packed.read(1):
        raise EOFError("a file in it is longer than it claims")
