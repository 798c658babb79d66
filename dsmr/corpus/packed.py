"""Reading a corpus that was packed into one file (`dsmr.corpus.pack`): its members, unpacked to memory."""

import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.schema import check
from dsmr.console.seal import NAME, check_seal
from dsmr.corpus.archive import XZ_MEMORY
from dsmr.corpus.layout import ARRAYS, FILES, MANIFEST, SHAPE

MOST, SMALL = 100, 1 << 26
"""Unpacked, a corpus has at most a hundred times the file's bytes (music: two to four times), and 64 MiB."""


def unpack(path: Path) -> dict[str, Any]:
    """The members of a packed corpus as `Corpus.from_members` wants them; `UserError` if it is none or damaged."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a packed corpus (or it was cut short)")
    members: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if MANIFEST not in names:
                raise UserError(f"{path} is a zip archive, but not a packed corpus: it holds no {MANIFEST}")
            claimed = sum(info.file_size for info in archive.infolist())
            _bound(path, size, claimed)
            check_seal(path)
            content = archive.read(MANIFEST)
            check_seal(io.BytesIO(content), f"{path} ({MANIFEST})")
            manifest = check(json.loads(content), SHAPE, f"{path} ({MANIFEST})")
            manifest.pop(NAME, None)
            members[MANIFEST] = manifest
            expanded = sum(manifest["files"][name]["bytes"] for name in ARRAYS if name in manifest["files"])
            _bound(path, size, claimed + expanded)
            for name in FILES:
                if name in ARRAYS and f"{name}.xz" in names and name in manifest["files"]:
                    limit = manifest["files"][name]["bytes"]
                    members[name] = np.frombuffer(_expand(archive.read(f"{name}.xz"), limit), dtype=ARRAYS[name])
                elif name in names and name != MANIFEST:
                    members[name] = archive.read(name)
    except UserError:
        raise
    except Exception as error:  # the archive modules raise many kinds, zlib.error and RuntimeError among them
        raise UserError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    return members


def _bound(path: Path, size: int, wanted: int) -> None:
    """`UserError` if a file of `size` bytes wants more memory than a corpus of that size can."""
    if wanted > SMALL + MOST * size:
        raise UserError(f"{path} is refused: its {size:,} bytes would take {wanted:,} in memory")


def _expand(content: bytes, limit: int) -> bytes:
    """One or more xz streams, unpacked: never more than the `limit` bytes that the manifest promises, and one."""
    parts: list[bytes] = []
    left = limit + 1
    while content and left:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not stream.eof and left:
            part = stream.decompress(content, max_length=left)
            content = b""
            if not part and stream.needs_input and not stream.eof:
                raise EOFError("it is cut short")
            parts.append(part)
            left -= len(part)
        content = stream.unused_data
    return b"".join(parts)
