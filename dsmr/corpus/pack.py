"""A corpus as one compressed file, to carry it to another machine: the whole of MAESTRO takes about 20 MB.

The file is an ordinary zip archive of the corpus's files; its two long arrays are xz streams inside. Opening it
(`Corpus.open`) unpacks the tokens to memory, where they take two bytes each.
"""

import lzma
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, check_apart, check_replaceable
from dsmr.console.seal import seal_zip
from dsmr.corpus.layout import ARRAYS, FILES, MANIFEST
from dsmr.corpus.pool import cores
from dsmr.corpus.store import Corpus

SUFFIX = ".dsmr"
# Two bytes to a token: the coder may know which of them it looks at. Hash chains are twice as fast as the default's
# binary trees here, for 1 % more bytes.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 2, "lp": 1, "pb": 1, "mf": lzma.MF_HC4, "nice_len": 32}]
CHUNK = 1 << 23  # bytes that one thread compresses, as an xz stream of its own


def pack(corpus_dir: str | os.PathLike[str], out_file: str | os.PathLike[str]) -> Path:
    """Pack the corpus at `corpus_dir` into `out_file` (by custom `*.dsmr`); returns its path.

    The corpus is verified first; the file appears only when it is complete. Raises `UserError` if the corpus is
    damaged, or if the file cannot be written or is there already and is not a packed corpus.
    """
    source, out = Path(corpus_dir), Path(out_file)
    if not source.is_dir():
        raise UserError(f"there is no corpus directory at {source}")
    if out.is_dir():
        raise UserError(f"cannot pack into {out}: it is a directory, name a file (such as {out}{SUFFIX})")
    check_apart([out], {f"the corpus's {name}": source / name for name in FILES})
    check_replaceable(out, "a packed corpus")
    members = [MANIFEST, *Corpus.open(source).manifest["files"]]
    with atomic_path(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in members:
            entry = zipfile.ZipInfo(f"{name}.xz" if name in ARRAYS else name)  # dated 1980: same in, same out
            with archive.open(entry, "w", force_zip64=True) as member:
                if name not in ARRAYS:
                    member.write((source / name).read_bytes())
                    continue
                starts = range(0, (source / name).stat().st_size, CHUNK)
                with ThreadPoolExecutor(cores()) as threads:
                    for stream in threads.map(partial(_compress, source / name), starts):
                        member.write(stream)
        archive.close()
        seal_zip(temporary)
    return out


def _compress(path: Path, start: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return lzma.compress(file.read(CHUNK), lzma.FORMAT_XZ, filters=FILTERS)
