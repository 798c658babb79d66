"""A corpus as one compressed file, to carry it to another machine: the whole of MAESTRO takes about 20 MB.

The file is an ordinary zip archive of the corpus's files; its two long arrays are xz streams inside. Opening it
(`Corpus.open`) unpacks the tokens to memory, where they take two bytes each.
"""

import io
import json
import lzma
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.data.corpus import FILES, LABELS, MANIFEST, TOKENS, Corpus
from dsmr.data.pool import cores
from dsmr.errors import UserError
from dsmr.files import atomic_path

SUFFIX = ".dsmr"
# Two bytes to a token: the coder may know which of them it looks at. Hash chains are twice as fast as the default's
# binary trees here, for 1 % more bytes.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2, "lp": 1, "pb": 1, "mf": lzma.MF_HC4, "nice_len": 32}]
COMPRESSED = {TOKENS: np.uint16, LABELS: np.uint8}
CHUNK = 1 << 23  # bytes that one thread compresses, as an xz stream of its own


def pack(corpus_dir: str | os.PathLike[str], out_file: str | os.PathLike[str]) -> Path:
    """Pack the corpus at `corpus_dir` into `out_file` (by custom `*.dsmr`); returns its path.

    The corpus is verified first; the file appears only when it is complete. Raises `UserError` if the corpus is
    damaged or the file cannot be written.
    """
    source, out = Path(corpus_dir), Path(out_file)
    if not source.is_dir():
        raise UserError(f"there is no corpus directory at {source}")
    if out.is_dir():
        raise UserError(f"cannot pack into {out}: it is a directory, name a file (such as {out}{SUFFIX})")
    members = [MANIFEST, *Corpus.open(source).manifest["files"]]
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in members:
            entry = zipfile.ZipInfo(f"{name}.xz" if name in COMPRESSED else name)  # dated 1980: same in, same out
            with archive.open(entry, "w", force_zip64=True) as member:
                if name not in COMPRESSED:
                    member.write((source / name).read_bytes())
                    continue
                starts = range(0, (source / name).stat().st_size, CHUNK)
                with ThreadPoolExecutor(cores()) as threads:
                    for stream in threads.map(partial(_compress, source / name), starts):
                        member.write(stream)
    return out


def unpack(path: Path) -> dict[str, Any]:
    """The members of a packed corpus as `Corpus.from_members` wants them; `UserError` if it is none or damaged."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a packed corpus (or it was cut short)")
    members: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
            if MANIFEST not in names:
                raise UserError(f"{path} is a zip archive, but not a packed corpus: it holds no {MANIFEST}")
            manifest = json.loads(archive.read(MANIFEST))
            members[MANIFEST] = manifest
            for name in FILES:
                if name in COMPRESSED and f"{name}.xz" in names:
                    limit = int(manifest["files"][name]["bytes"])
                    members[name] = np.frombuffer(_expand(archive, f"{name}.xz", limit), dtype=COMPRESSED[name])
                elif name in names and name != MANIFEST:
                    members[name] = archive.read(name)
    except UserError:
        raise
    except Exception as error:  # the archive modules raise many kinds, zlib.error and RuntimeError among them
        raise UserError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    return members


def _compress(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return lzma.compress(file.read(CHUNK), lzma.FORMAT_XZ, filters=FILTERS)


def _expand(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """One xz member, unpacked: never more than the `limit` bytes that the manifest promises, and one."""
    with lzma.open(io.BytesIO(archive.read(name))) as file:
        return file.read(limit + 1)
