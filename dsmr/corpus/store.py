"""Prepared pieces on disk: one long array of tokens, mapped into memory, with an index of the pieces.

A corpus is a directory of the files that `dsmr.corpus.layout` names, or one packed file (`dsmr.corpus.pack`).
"""

import hashlib
import importlib.metadata
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, describe, read_json, write_json
from dsmr.console.schema import check
from dsmr.corpus.layout import (
    FILES,
    FORMAT,
    INDEX,
    INDEXES,
    LABELS,
    MANIFEST,
    SHAPE,
    SOURCES,
    SPLITS,
    TOKENIZER,
    TOKENS,
)
from dsmr.corpus.packed import unpack
from dsmr.music.vocabulary import Vocabulary


@dataclass(frozen=True)
class PieceRecord:
    """One piece on its way into a corpus."""

    tokens: npt.NDArray[np.uint16]  # without BOS and EOS
    split: str
    source: str
    n_notes: int
    seconds: float
    labels: npt.NDArray[np.uint8] | None = None  # one per token of `tokens`


class Corpus:
    """A data set of whole, tokenised pieces; opening one reads little, whatever its size (`verify` reads it once)."""

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        vocabulary: Vocabulary,
        tokens: npt.NDArray[np.uint16],
        labels: npt.NDArray[np.uint8] | None,
        index: Mapping[str, npt.NDArray[Any]],
        sources: list[str],
    ) -> None:
        """Use `Corpus.open`."""
        self.path = path
        self.manifest = dict(manifest)
        self.vocabulary = vocabulary
        self.tokens = tokens
        self.marks = labels
        self.offsets: npt.NDArray[np.int64] = index["offsets"]
        self.n_notes: npt.NDArray[np.int64] = index["n_notes"]
        self.seconds: npt.NDArray[np.float64] = index["seconds"]
        self.split: npt.NDArray[np.str_] = np.array(SPLITS)[index["split"]]
        self.source = sources

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def digest(self) -> str:
        """Sha256 over tokens and offsets: two corpora that share it hold the same pieces in the same order."""
        return str(self.manifest["digest"])

    @property
    def n_pieces(self) -> int:
        return len(self.n_notes)

    @property
    def labels(self) -> npt.NDArray[np.uint8] | None:
        """For each token 0 (elsewhere), 1 (first refrain) or 2 (a return of it); None where there are no labels."""
        return self.marks

    def __len__(self) -> int:
        return self.n_pieces

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {self.n_pieces} pieces, {len(self.tokens):,} tokens, digest {self.digest[:16]})"

    def piece(self, index: int) -> npt.NDArray[np.int64]:
        """The tokens of one piece, BOS and EOS included, as a new int64 array."""
        return self.tokens[self._span(index)].astype(np.int64)

    def piece_labels(self, index: int) -> npt.NDArray[np.uint8]:
        """The labels of one piece, one per token of `piece`; zeros where the corpus has none."""
        span = self._span(index)
        return np.zeros(span.stop - span.start, np.uint8) if self.marks is None else np.array(self.marks[span])

    def _span(self, index: int) -> slice:
        if not 0 <= index < self.n_pieces:
            raise IndexError(f"piece must be in [0, {self.n_pieces}), got {index}")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def pieces_of(self, split: str) -> npt.NDArray[np.int64]:
        """The indices of the pieces of a split: "train", "validation" or "test"."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        return np.flatnonzero(self.split == split)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> "Corpus":
        """Open a directory that `prepare` wrote, or a packed file.

        With `verify` (the default) every byte is checked against the manifest, which takes about 0.1 s for 50 MB.
        Raises `UserError` if `path` is neither, if it is unfinished, or if a file in it is damaged.
        """
        where = Path(path)
        if where.is_dir():
            return cls._open_directory(where, verify)
        if not where.exists():
            raise UserError(f"there is no corpus at {where}")
        return cls.from_members(where, unpack(where), verify=True)

    @classmethod
    def _open_directory(cls, where: Path, verify: bool) -> "Corpus":
        if not (where / MANIFEST).is_file():
            unfinished = (where / TOKENS).exists() or any(where.glob(".prepare*"))
            what = "is unfinished: run the same `dsmr prepare` again" if unfinished else f"has no {MANIFEST}"
            raise UserError(f"{where} is not a prepared corpus: it {what}")
        manifest = read_json(where / MANIFEST)
        members: dict[str, Any] = {}
        for name in _members_of(manifest, where):
            try:
                if name in (TOKENS, LABELS):
                    kind: Any = np.uint16 if name == TOKENS else np.uint8
                    members[name] = np.memmap(where / name, dtype=kind, mode="r")
                else:
                    members[name] = (where / name).read_bytes()
            except OSError as error:
                raise UserError(f"{where} is damaged: cannot read {name}: {describe(error)}") from error
            except ValueError as error:  # an empty file, or one of half a token, cannot be mapped
                raise UserError(f"{where} is damaged: {name} is cut short ({error})") from error
        return cls.from_members(where, {**members, MANIFEST: manifest}, verify)

    @classmethod
    def from_members(cls, where: Path, members: Mapping[str, Any], verify: bool) -> "Corpus":
        """A corpus of its files' contents: arrays for tokens and labels, the parsed manifest, bytes for the rest."""
        manifest = members[MANIFEST]
        for name, expected in _members_of(manifest, where).items():
            if name not in members:
                raise UserError(f"{where} is damaged: {name} is missing")
            content = members[name]
            size = content.nbytes if isinstance(content, np.ndarray) else len(content)
            if size != expected["bytes"]:
                raise UserError(f"{where} is damaged: {name} has {size:,} bytes instead of {expected['bytes']:,}")
            if verify and hashlib.sha256(_view(content)).hexdigest() != expected["sha256"]:
                raise UserError(f"{where} is damaged: the contents of {name} were changed")
        try:
            vocabulary = Vocabulary.from_json(json.loads(members[TOKENIZER]))
            sources = check(json.loads(members[SOURCES]), [str], f"{where} ({SOURCES})")
            index = _read_index(members[INDEX])
        except UserError as error:
            raise error if str(where) in str(error) else UserError(f"{where} is damaged: {error}") from error
        except Exception as error:  # whatever the readers of JSON and of arrays raise of bytes that are neither
            raise UserError(f"{where} is damaged: {type(error).__name__} {error}") from error
        tokens, labels = members[TOKENS], members.get(LABELS)
        problem = _contradiction(index, sources, len(tokens), None if labels is None else len(labels))
        if problem is None and vocabulary.hash != manifest["vocabulary"]:
            problem = "its tokeniser is another"
        if problem is None and verify and len(tokens) and int(tokens.max()) >= vocabulary.size:
            problem = f"it holds the token {int(tokens.max())}, and its tokeniser has {vocabulary.size}"
        if problem is not None:
            raise UserError(f"{where} is damaged: its files do not belong together ({problem})")
        return cls(where, manifest, vocabulary, tokens, labels, index, sources)


def _read_index(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an index, as numpy stored them; no more memory is taken than the file has bytes."""
    index = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for name, kind in INDEXES.items():
            info = archive.getinfo(f"{name}.npy")
            if info.file_size > len(content):
                raise ValueError(f"{INDEX} claims {info.file_size:,} bytes for {name}")
            with archive.open(info) as file:
                raw = io.BytesIO(file.read(len(content)))
            if np.lib.format.read_magic(raw) != (1, 0):
                raise ValueError(f"{INDEX} holds {name} in another form")
            shape, _, dtype = np.lib.format.read_array_header_1_0(raw)
            if len(shape) != 1 or dtype != kind:
                raise ValueError(f"{INDEX} holds {name} as {dtype} {shape}")
            index[name] = np.frombuffer(raw.read(), dtype=dtype)
            if index[name].shape != shape:
                raise ValueError(f"{INDEX} holds {len(index[name])} values of {name}, not {shape[0]}")
    return index


def _contradiction(
    index: Mapping[str, npt.NDArray[Any]], sources: list[str], tokens: int, labels: int | None
) -> str | None:
    """What in a corpus does not fit together, if anything."""
    offsets, n = index["offsets"], len(sources)
    if any(len(index[name]) != n for name in ("n_notes", "seconds", "split")) or len(offsets) != n + 1:
        return f"{n} names of pieces, and an index of {len(index['n_notes'])}"
    if offsets[0] != 0 or (np.diff(offsets) < 1).any() or offsets[-1] != tokens:
        return f"the pieces do not fill the {tokens:,} tokens"
    if n and (int(index["split"].max()) >= len(SPLITS) or int(index["n_notes"].min()) < 0):
        return "a piece of no split, or of fewer notes than none"
    if labels not in (None, tokens):
        return f"{labels:,} labels for {tokens:,} tokens"
    return None


def _view(content: Any) -> Any:
    return content.view(np.uint8) if isinstance(content, np.ndarray) else content


def _members_of(manifest: Any, where: Path) -> dict[str, Any]:
    """The files that a manifest lists; `UserError` if it is not a manifest that this version reads."""
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:  # its fields may be others too
        raise UserError(f"{where} has corpus format {manifest['format']}, this version of dsmr reads {FORMAT}")
    if not isinstance(manifest, dict) or not {"name", "digest", "files", "format"} <= manifest.keys():
        raise UserError(f"{where} is not a prepared corpus: its {MANIFEST} is of another kind")
    check(manifest, SHAPE, where / MANIFEST if where.is_dir() else f"{where} ({MANIFEST})")
    files: dict[str, Any] = manifest["files"]
    if not {TOKENS, INDEX, SOURCES, TOKENIZER} <= files.keys() <= set(FILES):
        raise UserError(f"{where} is damaged: its {MANIFEST} does not list the files of a corpus")
    return files


def write_corpus(
    out_dir: str | os.PathLike[str],
    pieces: Iterable[PieceRecord],
    vocabulary: Vocabulary,
    name: str,
    report: Mapping[str, Any] | None = None,
) -> Corpus:
    """Write pieces as a corpus, in the order given, and open it.

    Pieces may come from a generator: no more than one is held at a time. Either all of them carry labels or none.
    `report` (anything JSON) is kept in the manifest. An earlier corpus at `out_dir` stays until all of the new one is
    on the disk; then its manifest goes first and the new one comes last, so that no mixture of them can be opened.
    """
    out = Path(out_dir)
    with ExitStack() as stack:  # left in the order from the last to the first
        made = {name: stack.enter_context(atomic_path(out / name)) for name in FILES}
        try:
            labelled = _write_files(made, pieces, vocabulary, name, report)
            if labelled is None:
                raise UserError(f"there is no piece to write to {out}")
            (out / MANIFEST).unlink(missing_ok=True)
        except (OSError, UserError) as error:
            reason = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(reason, OSError):
                raise
            raise UserError(f"cannot write {out}: {describe(reason)}") from reason
    if not labelled:
        (out / LABELS).unlink()  # the empty one, made before anybody knew
    return Corpus.open(out, verify=False)


def _write_files(
    made: Mapping[str, Path],
    pieces: Iterable[PieceRecord],
    vocabulary: Vocabulary,
    name: str,
    report: Mapping[str, Any] | None,
) -> bool | None:
    """Write every file of a corpus where `made` says; whether the pieces carry labels, None if there is no piece."""
    offsets, n_notes, seconds, split, sources = [0], [], [], [], []
    labelled: bool | None = None
    content = hashlib.sha256()
    labels_content = hashlib.sha256()
    with open(made[TOKENS], "wb") as tokens_file, open(made[LABELS], "wb") as labels_file:
        for piece in pieces:
            tokens = _checked(piece, vocabulary)
            if labelled is not None and labelled != (piece.labels is not None):
                raise ValueError(f"either all pieces carry labels or none; {piece.source} differs")
            labelled = piece.labels is not None
            raw = tokens.astype("<u2").tobytes()
            tokens_file.write(raw)
            content.update(raw)
            if piece.labels is not None:
                marks = np.concatenate([[0], piece.labels, [0]]).astype(np.uint8).tobytes()
                labels_file.write(marks)
                labels_content.update(marks)
            offsets.append(offsets[-1] + len(tokens))
            n_notes.append(piece.n_notes)
            seconds.append(piece.seconds)
            split.append(SPLITS.index(piece.split))
            sources.append(piece.source)
    if labelled is None:
        return None
    index: dict[str, npt.NDArray[Any]] = {
        "offsets": np.array(offsets, dtype=np.int64),
        "n_notes": np.array(n_notes, dtype=np.int64),
        "seconds": np.array(seconds, dtype=np.float64),
        "split": np.array(split, dtype=np.uint8),
    }
    with open(made[INDEX], "wb") as file:
        np.savez(file, **index)  # type: ignore[arg-type]
    write_json(made[SOURCES], sources)
    vocabulary.save(made[TOKENIZER])
    files = {TOKENS: {"bytes": 2 * offsets[-1], "sha256": content.hexdigest()}}
    if labelled:
        files[LABELS] = {"bytes": offsets[-1], "sha256": labels_content.hexdigest()}
    for small in (INDEX, SOURCES, TOKENIZER):
        data = made[small].read_bytes()
        files[small] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.update(index["offsets"].astype("<i8").tobytes())
    manifest = {
        "format": FORMAT,
        "name": name,
        "digest": content.hexdigest(),
        "vocabulary": vocabulary.hash,
        "pieces": len(sources),
        "tokens": offsets[-1],
        "notes": int(sum(n_notes)),
        "seconds": float(sum(seconds)),
        "created_by": f"dsmr {_version()}",
        "report": dict(report or {}),
        "files": files,
    }
    write_json(made[MANIFEST], manifest, sealed=True)
    return labelled


def _version() -> str:
    try:
        return importlib.metadata.version("dsmr")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "(not installed)"


def _checked(piece: PieceRecord, vocabulary: Vocabulary) -> npt.NDArray[np.uint16]:
    """The tokens of a record with BOS and EOS; `ValueError` if the record contradicts itself."""
    tokens = np.asarray(piece.tokens)
    if tokens.ndim != 1 or (tokens.size and int(tokens.max()) >= vocabulary.size):
        raise ValueError(f"{piece.source}: tokens must be one row of ids below {vocabulary.size}")
    if piece.split not in SPLITS:
        raise ValueError(f"{piece.source}: split must be one of {', '.join(SPLITS)}, got {piece.split!r}")
    if piece.labels is not None and len(piece.labels) != len(tokens):
        raise ValueError(f"{piece.source}: {len(piece.labels)} labels for {len(tokens)} tokens")
    if vocabulary.count_notes(tokens) != piece.n_notes:
        found = vocabulary.count_notes(tokens)
        raise ValueError(f"{piece.source}: {found} notes in the tokens, {piece.n_notes} in the record")
    return np.concatenate([[vocabulary.bos_id], tokens, [vocabulary.eos_id]]).astype(np.uint16)
