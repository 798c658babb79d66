"""MAESTRO v3: finding it in a folder or an archive, its official split, and fetching it from its publisher.

The data set (Hawthorne et al., "Enabling Factorized Piano Music Modeling and Generation with the MAESTRO Dataset",
ICLR 2019) is licensed CC BY-NC-SA 4.0: it is read where it lies and never shipped with this package.
"""

import csv
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import describe, read_json
from dsmr.corpus.archive import check_name, unpack
from dsmr.corpus.download import fetch
from dsmr.corpus.layout import SPLITS
from dsmr.corpus.report import PrepareReport
from dsmr.music.midi_file import NO_END

ARCHIVE_NAME = "maestro-v3.0.0-midi.zip"
OFFICIAL_URL = f"https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/{ARCHIVE_NAME}"
OFFICIAL_SHA256 = "70470ee253295c8d2c71e6d9d4a815189e35c89624b76d22fce5a019d5dde12c"
PUBLISHED = {"train": (962, 5_659_328), "validation": (137, 639_425), "test": (177, 741_410)}  # pieces, notes
LISTINGS = ("maestro-v3.0.0.csv", "maestro-v3.0.0.json")
LISTING = r"maestro-v.*\.(csv|json)"
WANTED = (".mid", ".midi", ".csv", ".json")


@dataclass(frozen=True)
class Entry:
    """One performance: its file below the data set's root, and its split."""

    filename: str
    split: str


@dataclass(frozen=True)
class Listing:
    """The data set's own list of performances."""

    name: str
    entries: tuple[Entry, ...]


def download(
    out: str | os.PathLike[str], url: str = OFFICIAL_URL, sha256: str = OFFICIAL_SHA256, progress: bool = True
) -> Path:
    """Fetch the official MIDI archive (57 MB) to `out`, a file or a folder; see `dsmr.corpus.download.fetch`."""
    target = Path(out)
    return fetch(url, target / ARCHIVE_NAME if target.is_dir() else target, sha256, progress)


def locate(source: Path, unpacked: Path) -> Path:
    """The folder that holds MAESTRO's listing: `source`, a folder in it, or where the archive `source` was unpacked.

    An archive is unpacked (MIDI and listings only) to `unpacked`, once. Raises `UserError` if `source` is not there,
    is not MAESTRO, or is an archive that is damaged or names unsafe paths.
    """
    if not source.exists():
        raise UserError(f"there is no folder or archive {source}")
    if source.is_dir():
        return _root_in(source, source)
    status = source.stat()
    stamp = hashlib.sha256(f"{source.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    unpacked = unpacked.with_name(f"{unpacked.name}-{stamp}")  # another archive is unpacked elsewhere
    if not unpacked.exists():
        partial = unpacked.with_name(f"{unpacked.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            unpack(source, partial, WANTED, LISTING, f"MAESTRO: it holds no {LISTINGS[0]}")
            partial.rename(unpacked)
        except OSError as error:
            raise UserError(f"cannot unpack {source} to {unpacked.parent}: {describe(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return _root_in(unpacked, source)


def _root_in(folder: Path, source: Path) -> Path:
    for candidate in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if _listing_path(candidate) is not None:
            return candidate
    raise UserError(f"{source} is not MAESTRO: it holds no {LISTINGS[0]}")


def _listing_path(root: Path) -> Path | None:
    for name in LISTINGS:
        if (root / name).is_file():
            return root / name
    return max(root.glob("maestro-v*.csv"), default=None)


def read_listing(root: Path) -> Listing:
    """The performances that the listing in `root` names; `UserError` if it is damaged or names unsafe paths."""
    path = _listing_path(root)
    if path is None:
        raise UserError(f"{root} is not MAESTRO: it holds no {LISTINGS[0]}")
    try:
        if path.suffix == ".json":
            columns = read_json(path)
            keys = columns["midi_filename"].keys()
            rows: Any = [{name: columns[name][key] for name in ("midi_filename", "split")} for key in keys]
        else:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        entries = tuple(Entry(row["midi_filename"], row["split"]) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"{path} is not a listing of MAESTRO: {type(error).__name__} {error}") from error
    for entry in entries:
        if entry.split not in SPLITS:
            raise UserError(f"{path}: {entry.filename} has split {entry.split!r}, which is none of {', '.join(SPLITS)}")
        check_name(entry.filename, path)
    if not entries:
        raise UserError(f"{path} names no performance")
    return Listing(path.name, entries)


def provenance(source: Path) -> list[str]:
    """In words: is this archive the published one, byte for byte? Nothing of a folder, which has no sum."""
    if not source.is_file():
        return []
    with open(source, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() == OFFICIAL_SHA256:
            return ["The archive is byte for byte the published one (SHA-256)."]
        file.seek(0)
        plain = file.read(512)[257:262] == b"ustar"
    unseen = ", and a plain tar has no sums of what it holds: damage in it would not be seen" if plain else ""
    return [f"The archive is not byte for byte the published one{unseen}."]


def compare(listing: Listing, report: PrepareReport) -> list[str]:
    """In words: are these the pieces and notes of the published data set, and if not, what differs?"""
    found = {split: (counts.pieces, counts.notes) for split, counts in report.splits.items()}
    same = "Pieces and notes of every split are exactly those of the published data set."
    if found == PUBLISHED:
        return [same]
    more = [notes - PUBLISHED[split][1] for split, (_, notes) in found.items()]
    whole = all(pieces == PUBLISHED[split][0] for split, (pieces, _) in found.items())
    if whole and min(more) >= 0 and sum(more) == report.changed.get(NO_END, 0):
        return [f"{same[:-1]}, but for {sum(more):,} that never end, which the published counts leave out."]
    if len(listing.entries) != sum(pieces for pieces, _ in PUBLISHED.values()):
        return [f"{listing.name} names {len(listing.entries):,} performances, so this is not the whole of MAESTRO v3."]
    return [
        f"{split}: {found[split][0]:,} pieces and {found[split][1]:,} notes, published are {pieces:,} and {notes:,}; "
        "the reasons stand above."
        for split, (pieces, notes) in PUBLISHED.items()
        if found[split] != (pieces, notes)
    ]
