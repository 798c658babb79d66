"""From MIDI files (or from the built-in composer) to a corpus: `dsmr prepare`.

Every file is encoded by itself, on all cores, and its tokens are kept beneath a hidden folder in the output directory
until all are there; so a prepare that was killed goes on where it stopped when it is started again. Only then the
corpus is written, its manifest last. What a file loses on the way is counted and reported, never silent.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.composer.compose import compose
from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, describe
from dsmr.corpus import maestro
from dsmr.corpus.layout import FILES, MANIFEST, SPLITS
from dsmr.corpus.pool import cores, progress_bar, run_all
from dsmr.corpus.report import PrepareReport, SplitCounts
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.music.tokenizer import EmptyScoreError, build_tokenizer, encode_score, vocabulary_of
from dsmr.music.vocabulary import Vocabulary

WORK = ".prepare"
MIDI_SUFFIXES = (".mid", ".midi")
MAESTRO = "MAESTRO"
FRACTIONS = (0.9, 0.05, 0.05)
COMPOSED_FRACTIONS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Task:
    """One piece to be made: of a MIDI file, or by the composer of a seed."""

    source: str  # the name under which the piece is known
    split: str | None  # None: decided by the name, once it is known which pieces there are
    path: str | None = None
    seed: int | None = None
    minutes: float | None = None
    stamp: str = ""  # changes when the file does

    def key(self, vocabulary: Vocabulary) -> str:
        """The name of this task's result: the same only if the result would be the same."""
        content = json.dumps([vocabulary.hash, self.source, self.seed, self.minutes, self.stamp])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What is kept of a task until the corpus is written; `reason` says why there is no piece."""

    n_notes: int
    seconds: float
    n_tokens: int
    dropped: dict[str, int]
    changed: dict[str, int]
    reason: str | None = None


def prepare_midi(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: str = "tsd",
    jobs: int | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Prepare all MIDI files at any depth below `folder`.

    A piece's split follows from a hash of its path below `folder`, so that it stays where it is when other files come
    or go; `fractions` are those of train, validation and test. At least one piece is for training, and where there
    are two or more at least one for validation. Raises `UserError` if there is nothing to prepare, or if `out` holds
    anything else (unless `overwrite`).
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}" if not root.exists() else f"{root} is not a folder")
    output = Path(out).resolve()
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in MIDI_SUFFIXES and path.is_file() and not path.resolve().is_relative_to(output / WORK)
    )
    if not found:
        raise UserError(f"{root} holds no MIDI file (*.mid, *.midi)")
    tasks = [midi_task(path, path.relative_to(root).as_posix(), None) for path in found]
    return run(tasks, Path(out), tokenizer, jobs, root.resolve().name, fractions, overwrite, progress)


def prepare_maestro(
    source: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    tokenizer: str = "tsd",
    jobs: int | None = None,
    *,
    download: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Prepare MAESTRO, from its folder or an archive of it, with its official split.

    With `download` the official archive is fetched first, to `source` if given (a file name), else beside `out`.
    The report says whether the counts are those of the published data set, and how they differ if they do.
    """
    output = Path(out)
    if source is None and not download:
        raise UserError("name the folder or archive that holds MAESTRO")
    if source is not None and Path(source).resolve() == output.resolve():
        raise UserError(f"{source} is asked to be both the data set and the corpus made of it: choose another --out")
    check_output(output, vocabulary_of(tokenizer), MAESTRO, overwrite)  # before the download rather than after it
    if download:
        source = maestro.download(source or output.parent / maestro.ARCHIVE_NAME, progress=progress)
    assert source is not None
    try:
        root = maestro.locate(Path(source), output / WORK / "unpacked")
        listing = maestro.read_listing(root)
    except UserError:
        clear_work(output)
        raise
    tasks, missing = [], []
    for entry in listing.entries:
        path = root / entry.filename
        if path.is_file():
            tasks.append(midi_task(path, entry.filename, entry.split))
        else:
            missing.append((entry.filename, f"named in {listing.name} but not there"))
    if not tasks:
        raise UserError(f"{source} holds none of the {len(listing.entries):,} files that its {listing.name} names")
    judge = partial(maestro.compare, listing)
    return run(tasks, output, tokenizer, jobs, MAESTRO, FRACTIONS, overwrite, progress, missing, judge)


def prepare_composed(
    out: str | os.PathLike[str],
    pieces: int = 60,
    seed: int = 0,
    splits: Sequence[float] = COMPOSED_FRACTIONS,
    tokenizer: str = "tsd",
    jobs: int | None = None,
    *,
    minutes: float | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> PrepareReport:
    """Prepare `pieces` pieces of the built-in composer, with a label for every token.

    Labels are 1 in the first statement of the refrain, 2 in its returns, 0 elsewhere. `minutes` fixes the length of
    every piece. The first pieces are for training, the last for testing; with three or more no split is empty.
    """
    if pieces < 1:
        raise UserError(f"the number of pieces must be at least 1, got {pieces}")
    if seed < 0:
        raise UserError(f"the seed must not be negative, got {seed}")
    validation, test = (max(1, round(pieces * splits[i])) if pieces > i else 0 for i in (1, 2))
    train = max(1, pieces - validation - test)
    names = ["train"] * train + ["validation"] * validation + ["test"] * test
    tasks = [
        Task(f"composed-{seed}-{i:05d}", names[i], seed=seed * 1_000_000 + i, minutes=minutes) for i in range(pieces)
    ]
    return run(tasks, Path(out), tokenizer, jobs, f"composed (seed {seed})", splits, overwrite, progress)


def midi_task(path: Path, source: str, split: str | None) -> Task:
    """The task of one MIDI file."""
    try:
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        stamp = ""  # the worker will say what is wrong with it
    return Task(source, split, path=str(path.resolve()), stamp=stamp)


def check_output(out: Path, vocabulary: Vocabulary, name: str, overwrite: bool) -> None:
    """`UserError` if `out` holds anything but the corpus `name` of this vocabulary (with `overwrite` it may).

    Nothing is deleted here: a former corpus stays until `write_corpus` has the new pieces.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write a corpus to {out}: it is a file")
    if overwrite or not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name not in FILES and not path.name.startswith("."))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{out} holds other files ({foreign[0]}{more}): choose an empty folder for the corpus")
    if (out / MANIFEST).exists():
        corpus = Corpus.open(out, verify=False)
        earlier = corpus.vocabulary
        if corpus.name != name:
            raise UserError(
                f"{out} holds the corpus {corpus.name!r}, not {name!r}: choose another folder or overwrite it"
            )
        if earlier != vocabulary:
            raise UserError(
                f"{out} holds a corpus of another tokeniser ({earlier.scheme}, {earlier.hash[:16]}, not "
                f"{vocabulary.scheme}, {vocabulary.hash[:16]}): choose another folder or delete it"
            )


def run(
    tasks: Sequence[Task],
    out: Path,
    tokenizer: str,
    jobs: int | None,
    name: str,
    fractions: Sequence[float],
    overwrite: bool = False,
    progress: bool = True,
    skipped: Sequence[tuple[str, str]] = (),
    judge: Any = None,
) -> PrepareReport:
    """Do all tasks, write the corpus, clear up, and report. `judge` turns a report into remarks on it."""
    if jobs is not None and jobs < 1:
        raise UserError(f"the number of jobs must be at least 1, got {jobs}")
    vocabulary = vocabulary_of(tokenizer)
    check_output(out, vocabulary, name, overwrite)
    results = out / WORK / "results"
    try:
        results.mkdir(parents=True, exist_ok=True)
        for name_of in map(Path, FILES):  # what a killed run left of files that it was writing
            for stale in out.glob(f".{name_of.stem}-*{name_of.suffix}"):
                stale.unlink()
    except OSError as error:
        raise UserError(f"cannot write {out}: {describe(error)}") from error
    keys = [task.key(vocabulary) for task in tasks]
    todo = [task for task, key in zip(tasks, keys, strict=True) if _read(results / f"{key}.npz") is None]
    work = partial(encode_task, tokenizer=tokenizer, folder=str(results))
    crashed = partial(_note_crash, vocabulary=vocabulary, folder=results)
    workers = min(jobs or cores(), max(1, len(todo) // 2))  # a process is worth its start only for some files
    with progress_bar(f"preparing {name}", len(tasks), len(tasks) - len(todo), progress) as advance:
        run_all(work, todo, workers, advance, crashed)

    report = PrepareReport(
        name, str(out), f"{vocabulary.scheme} {vocabulary.hash[:16]}", {split: SplitCounts() for split in SPLITS}
    )
    report.skipped += skipped
    kept: list[tuple[Task, Path, Result]] = []
    for task, key in zip(tasks, keys, strict=True):
        result = _read(results / f"{key}.npz")
        assert result is not None
        report.dropped.update(result.dropped)
        if result.reason is None:
            kept.append((task, results / f"{key}.npz", result))
            report.changed.update(result.changed)
        else:
            report.skipped.append((task.source, result.reason))
    if not kept:
        clear_work(out)
        first = f"the first is {report.skipped[0][0]}: {report.skipped[0][1]}"
        raise UserError(f"none of the {len(report.skipped):,} files can be used; {first}")
    splits = assign_splits([(task.source, task.split) for task, _, _ in kept], fractions)
    for (_, _, result), split in zip(kept, splits, strict=True):
        report.splits[split] += SplitCounts(1, result.n_notes, result.n_tokens + 2, result.seconds)
    report.remarks += judge(report) if judge else []
    write_corpus(out, _records(kept, splits), vocabulary, name, report.to_json())
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def clear_work(out: Path) -> None:
    """Remove the hidden work folder, and `out` itself if nothing else is in it."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    with contextlib.suppress(OSError):
        out.rmdir()


def _records(kept: Sequence[tuple[Task, Path, Result]], splits: Sequence[str]) -> Iterator[PieceRecord]:
    for (task, path, result), split in zip(kept, splits, strict=True):
        with np.load(path, allow_pickle=False) as archive:
            labels = archive.get("labels")
            yield PieceRecord(archive["tokens"], split, task.source, result.n_notes, result.seconds, labels)


def assign_splits(pieces: Sequence[tuple[str, str | None]], fractions: Sequence[float]) -> list[str]:
    """The split of each (source, split or None): given ones stay, the others follow from a hash of the source.

    If none would be for training, or of two or more none for validation, the piece next to the border is moved.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not 0.999 < sum(fractions) < 1.001:
        raise UserError(f"the fractions of train, validation and test must add up to 1, got {tuple(fractions)}")
    draws = [int.from_bytes(hashlib.sha256(source.encode()).digest()[:7], "big") / 2**56 for source, _ in pieces]
    borders = np.cumsum(fractions)[:2]
    splits = [
        given or SPLITS[int(np.searchsorted(borders, draw, side="right"))]
        for (_, given), draw in zip(pieces, draws, strict=True)
    ]
    free = sorted((i for i, (_, given) in enumerate(pieces) if given is None), key=draws.__getitem__)
    if free and "train" not in splits:
        splits[free[0]] = "train"
    if len(free) > 1 and "validation" not in splits:
        donor = "train" if splits.count("train") > 1 else "test"
        givers = [i for i in free if splits[i] == donor]
        if givers:
            splits[givers[-1]] = "validation"
    return splits


# Work on one task, in a worker process.


def encode_task(task: Task, *, tokenizer: str, folder: str) -> None:
    """Make one piece and keep its result; a file that cannot be used becomes a result with a reason."""
    vocabulary = vocabulary_of(tokenizer)
    labels: npt.NDArray[np.uint8] | None = None
    tokens = np.zeros(0, np.uint16)
    try:
        if task.seed is not None:
            piece = compose(task.seed, minutes=task.minutes)
            tokens, found = encode_score(piece.to_score(), _tokenizer(tokenizer))
            labels = np.asarray(piece.labels_for(vocabulary.clock(tokens)), dtype=np.uint8)
        else:
            tokens, found = encode_score(Path(str(task.path)), _tokenizer(tokenizer))
        result = Result(found.n_notes, found.seconds, len(tokens), found.dropped, found.changed)
    except (UserError, EmptyScoreError, ValueError) as error:
        if task.path is None:
            raise
        # The file's name stands beside the reason already.
        result = Result(0, 0.0, 0, {}, {}, reason=str(error).replace(f"{task.path} is ", "").replace(task.path, "it"))
    _write(Path(folder) / f"{task.key(vocabulary)}.npz", result, tokens, labels)


_tokenizers: dict[str, Any] = {}


def _tokenizer(name: str) -> Any:
    if name not in _tokenizers:
        _tokenizers[name] = build_tokenizer(name)
    return _tokenizers[name]


def _note_crash(task: Task, *, vocabulary: Vocabulary, folder: Path) -> None:
    result = Result(0, 0.0, 0, {}, {}, reason="the MIDI reader crashed on it")
    _write(folder / f"{task.key(vocabulary)}.npz", result, np.zeros(0, np.uint16), None)


def _write(path: Path, result: Result, tokens: npt.NDArray[np.uint16], labels: npt.NDArray[np.uint8] | None) -> None:
    content: dict[str, Any] = {"tokens": tokens, "result": np.array(json.dumps(result.__dict__))}
    if labels is not None:
        content["labels"] = labels
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **content)


def _read(path: Path) -> Result | None:
    """The result of an earlier run; None where there is none, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Result(**json.loads(str(archive["result"])))
    except Exception:
        path.unlink(missing_ok=True)
        return None
