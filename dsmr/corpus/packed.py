"""Reading a corpus that was packed into one file (`dsmr.corpus.pack`): its members, unpacked to memory."""

import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.corpus.layout import ARRAYS, FILES, MANIFEST


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
                if name in ARRAYS and f"{name}.xz" in names:
                    limit = int(manifest["files"][name]["bytes"])
                    members[name] = np.frombuffer(_expand(archive, f"{name}.xz", limit), dtype=ARRAYS[name])
                elif name in names and name != MANIFEST:
                    members[name] = archive.read(name)
    except UserError:
        raise
    except Exception as error:  # the archive modules raise many kinds, zlib.error and RuntimeError among them
        raise UserError(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    return members


def _expand(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """One xz member, unpacked: never more than the `limit` bytes that the manifest promises, and one."""
    with lzma.open(io.BytesIO(archive.read(name))) as file:
        return file.read(limit + 1)
