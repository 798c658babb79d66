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
from dsmr.console.locks import alone_in
from dsmr.corpus import maestro
from dsmr.corpus.copies import fingerprint, groups_of
from dsmr.corpus.folder import SUFFIXES, find_midi, name_below
from dsmr.corpus.layout import FILES, MANIFEST, SPLITS, TOKENIZER, TOKENS, WORK
from dsmr.corpus.pool import cores, progress_bar, run_all
from dsmr.corpus.report import PrepareReport, SplitCounts
from dsmr.corpus.splits import assign_splits
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus
from dsmr.music.midi_file import count_begun
from dsmr.music.tokenizer import build_tokenizer, encode_score, reason_of, vocabulary_of
from dsmr.music.vocabulary import Vocabulary

MAESTRO = "MAESTRO"
KEPT = 3  # the form in which results are kept: those of another version are made again
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
        content = json.dumps([KEPT, vocabulary.hash, self.source, self.seed, self.minutes, self.stamp])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Result:
    """What is kept of a task until the corpus is written; `reason` says why there is no piece."""

    n_begun: int
    n_notes: int
    seconds: float
    n_tokens: int
    dropped: dict[str, int]
    changed: dict[str, int]
    reason: str | None = None
    n_pedals: int = 0


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
    are two or more at least one for validation. Copies of a piece (`dsmr.corpus.copies`) go where it goes. Raises
    `UserError` if there is nothing to prepare, or if `out` holds anything else: another corpus may be replaced
    (`overwrite`), other files never.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}" if not root.exists() else f"{root} is not a folder")
    found, passed = find_midi(root)
    if not found:
        kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        first = f"; {passed[0][0]}: {passed[0][1]}" if passed else ""
        raise UserError(f"{root} holds no MIDI file ({kinds}){first}")
    tasks = [midi_task(path, name_below(path, root), None) for path in found]
    with _alone(Path(out), tokenizer, _name_of(root), overwrite):
        return run(tasks, Path(out), tokenizer, jobs, _name_of(root), fractions, progress, passed)


def _name_of(folder: Path) -> str:
    return os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace")


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
    with _alone(output, tokenizer, MAESTRO, overwrite):  # before the download rather than after it
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

        def judge(report: PrepareReport) -> list[str]:
            return maestro.compare(listing, report) + maestro.provenance(Path(source))

        return run(tasks, output, tokenizer, jobs, MAESTRO, FRACTIONS, progress, missing, judge)


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
    with _alone(Path(out), tokenizer, f"composed (seed {seed})", overwrite):
        return run(tasks, Path(out), tokenizer, jobs, f"composed (seed {seed})", splits, progress)


def midi_task(path: Path, source: str, split: str | None) -> Task:
    """The task of one MIDI file."""
    try:
        status = path.stat()
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    except OSError:
        stamp = ""  # the worker will say what is wrong with it
    if not str(path).isascii():  # two names that are not UTF-8 may be written alike
        stamp += f" {os.fsencode(path.name).hex()}"
    return Task(source, split, path=str(path.resolve()), stamp=stamp)


def check_output(out: Path, vocabulary: Vocabulary, name: str, overwrite: bool) -> None:
    """`UserError` if `out` holds anything but the corpus `name` of this vocabulary, or with `overwrite` any corpus.

    Files that are no corpus's, those of a run or an export above all, are refused either way: a corpus among them would
    have replaced their tokenizer.json. Nothing is deleted here: a former corpus stays until `write_corpus` has the new
    pieces.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"cannot write a corpus to {out}: it is a file")
    if not out.exists():
        return
    foreign = sorted(path.name for path in out.iterdir() if path.name not in FILES and not path.name.startswith("."))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{out} holds other files ({foreign[0]}{more}): choose an empty folder for the corpus")
    if overwrite:
        return
    if (out / TOKENIZER).exists() and not any((out / name).exists() for name in (MANIFEST, TOKENS, WORK)):
        raise UserError(f"{out} holds a {TOKENIZER}, but no corpus: choose an empty folder for the corpus")
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


@contextlib.contextmanager
def _alone(out: Path, tokenizer: str, name: str, overwrite: bool) -> Iterator[None]:
    """Work in `out` as the only prepare; `UserError` if it holds anything else or another one is at work there."""
    check_output(out, vocabulary_of(tokenizer), name, overwrite)  # before a folder is made
    with alone_in(out, "another prepare is at work"):
        check_output(out, vocabulary_of(tokenizer), name, overwrite)  # what another one has made meanwhile
        yield


def run(
    tasks: Sequence[Task],
    out: Path,
    tokenizer: str,
    jobs: int | None,
    name: str,
    fractions: Sequence[float],
    progress: bool = True,
    skipped: Sequence[tuple[str, str]] = (),
    judge: Any = None,
) -> PrepareReport:
    """Do all tasks, write the corpus, clear up, and report. `judge` turns a report into remarks on it.

    `out` is this process's alone (`_alone`)."""
    if jobs is not None and jobs < 1:
        raise UserError(f"the number of jobs must be at least 1, got {jobs}")
    vocabulary = vocabulary_of(tokenizer)
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
    if tasks[0].path is None:
        report.counted = "by the composer"
    report.skipped += skipped
    kept: list[tuple[Task, Path, Result]] = []
    for task, key in zip(tasks, keys, strict=True):
        result = _read(results / f"{key}.npz")
        if result is None:  # something else than this program deletes files here
            raise UserError(f"{results} was changed by something else: start again")
        if result.reason is None:
            kept.append((task, results / f"{key}.npz", result))
            report.n_begun += result.n_begun
            report.dropped.update(result.dropped)
            report.changed.update(result.changed)
            report.n_pedals += result.n_pedals
        else:
            report.n_skipped += result.n_begun
            report.skipped.append((task.source, result.reason))
    if not kept:
        clear_work(out)
        first = f"the first is {report.skipped[0][0]}: {report.skipped[0][1]}"
        raise UserError(f"none of the {len(report.skipped):,} files can be used; {first}")
    groups = _groups(kept)
    splits = assign_splits([(task.source, task.split) for task, _, _ in kept], fractions, groups)
    for (_, _, result), split in zip(kept, splits, strict=True):
        report.splits[split] += SplitCounts(1, result.n_notes, result.n_tokens + 2, result.seconds)
    report.count_copies(groups, splits)
    report.check()
    report.remarks += judge(report) if judge else []
    write_corpus(out, _records(kept, splits), vocabulary, name, report.to_json())
    shutil.rmtree(out / WORK, ignore_errors=True)
    return report


def _groups(kept: Sequence[tuple[Task, Path, Result]]) -> list[int]:
    """Which pieces are copies of one another (see `dsmr.corpus.copies`); composed ones never are."""
    if kept[0][0].path is None:
        return list(range(len(kept)))
    prints = []
    for _, path, _ in kept:
        with np.load(path, allow_pickle=False) as archive:
            prints.append(archive["fingerprint"])
    return groups_of(prints)


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


# Work on one task, in a worker process.


def encode_task(task: Task, *, tokenizer: str, folder: str) -> None:
    """Make one piece and keep its result; a file that cannot be used becomes a result with a reason."""
    vocabulary = vocabulary_of(tokenizer)
    content: dict[str, npt.NDArray[Any]] = {"tokens": np.zeros(0, np.uint16)}
    try:
        source = compose(task.seed, minutes=task.minutes) if task.seed is not None else None
        score = Path(str(task.path)) if source is None else source.to_score()
        tokens, found = encode_score(score, _tokenizer(tokenizer))
        result = Result(
            found.n_begun,
            found.n_notes,
            found.seconds,
            len(tokens),
            found.dropped,
            found.changed,
            n_pedals=found.n_pedals,
        )
        content = {"tokens": tokens}
        if source is not None:
            content["labels"] = np.asarray(source.labels_for(vocabulary.clock(tokens)), dtype=np.uint8)
        else:
            content["fingerprint"] = fingerprint(tokens, vocabulary)
    except Exception as error:  # whatever it is, memory included: one file must never end the others' work
        if task.path is None:
            raise
        # The file's name stands beside the reason already.
        reason = reason_of(error).replace(f"{task.path} is ", "").replace(task.path, "it")
        result = Result(count_begun(task.path), 0, 0.0, 0, {}, {}, reason)
    _write(Path(folder) / f"{task.key(vocabulary)}.npz", result, content)


_tokenizers: dict[str, Any] = {}


def _tokenizer(name: str) -> Any:
    if name not in _tokenizers:
        _tokenizers[name] = build_tokenizer(name)
    return _tokenizers[name]


def _note_crash(task: Task, *, vocabulary: Vocabulary, folder: Path) -> None:
    result = Result(0, 0, 0.0, 0, {}, {}, "the MIDI reader crashed on it")
    _write(folder / f"{task.key(vocabulary)}.npz", result, {"tokens": np.zeros(0, np.uint16)})


def _write(path: Path, result: Result, content: dict[str, npt.NDArray[Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, result=np.array(json.dumps(result.__dict__)), **content)  # type: ignore[arg-type]


def _read(path: Path) -> Result | None:
    """The result of an earlier run; None where there is none, or where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if archive.zip.testzip() is not None:
                raise ValueError
            return Result(**json.loads(str(archive["result"])))
    except Exception:
        path.unlink(missing_ok=True)
        return None
