"""Files that carry the sum of their own bytes, so that not one bit of them can change unnoticed.

The seal is a text inside the file, `"seal":"sha256:…"`: a member of a JSON object (of the first, in a list of them), of
the header of a safetensors file, or the comment of a zip archive (which a file of `torch.save` is). Its digits are
those of the SHA-256 of the file with zeros in their place. Files without a seal, which earlier versions and other
programs write, are read as before.
"""

import hashlib
import os
import re
from typing import IO

from dsmr.console.errors import UserError

NAME = "seal"
BLANK = "sha256:" + "0" * 64
"""What stands in a file until `seal` has filled it in."""

_SEAL = re.compile(rb'"seal": ?"sha256:([0-9a-f]{64})"')
_TRACES = (b'"seal"', b'"sha256:')  # one of them outlives any single damage to the seal's own name
_HEAD, _TAIL = 1 << 16, 1 << 8  # where a seal is looked for, in bytes from either end
_BEGIN = b"PK\3\4"  # how a zip archive begins
_END = b"PK\5\6"  # how the last record of a zip archive begins, which is 22 bytes long where there is no comment


def seal(path: str | os.PathLike[str]) -> None:
    """Fill in the seal of a file that holds `BLANK` for it."""
    with open(path, "rb+") as file:
        place = _find(file)
        if place is None or place < 0:
            raise ValueError(f"{os.fspath(path)} has no place for a seal")
        digest = _digest(file, place)
        file.seek(place)
        file.write(digest)


def seal_zip(path: str | os.PathLike[str]) -> None:
    """Seal a zip archive without a comment, by giving it one."""
    comment = f'"{NAME}":"{BLANK}"'.encode()
    with open(path, "rb+") as file:
        file.seek(-22, os.SEEK_END)
        end = file.read(22)
        if not end.startswith(_END) or end[-2:] != b"\0\0":
            raise ValueError(f"{os.fspath(path)} is no zip archive without a comment")
        file.seek(-2, os.SEEK_END)
        file.write(len(comment).to_bytes(2, "little") + comment)
    seal(path)


def check_seal(file: str | os.PathLike[str] | IO[bytes], name: str | None = None) -> bool:
    """Whether the file has a seal; `UserError` if it has one and its bytes are not those that were sealed.

    `file` may be open (for reading bytes, anywhere in them); `name` is then what a sentence calls it.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return check_seal(opened, name or os.fspath(file))
    place = _find(file)
    if place is None:
        return False
    file.seek(max(place, 0))
    if place >= 0 and file.read(64) == _digest(file, place):
        return True
    hint = "; if you edited it by hand, take its seal out" if str(name).endswith(".json") else ""
    raise UserError(f"{name} is damaged: its bytes are not those that were written (SHA-256){hint}")


def _find(file: IO[bytes]) -> int | None:
    """The place of the seal's digits; None if the file has none, -1 if what is there has been damaged."""
    size = file.seek(0, os.SEEK_END)
    traces = False
    file.seek(0)
    ends = [(0, _HEAD), (max(0, size - _TAIL), _TAIL)]
    for start, length in ends[file.read(4) == _BEGIN :]:  # what a zip archive begins with may be a file with a seal
        file.seek(start)
        text = file.read(length)
        if found := _SEAL.search(text):
            return start + found.start(1)
        traces |= any(trace in text for trace in _TRACES)
    return -1 if traces else None


def _digest(file: IO[bytes], place: int) -> bytes:
    """The hexadecimal SHA-256 of the file with zeros for the 64 digits at `place`."""
    digest = hashlib.sha256()
    file.seek(0)
    left = place
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"0" * 64)
    file.seek(place + 64)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest().encode()
