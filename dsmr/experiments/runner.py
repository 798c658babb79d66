"""Runs a table's cells, so that it can be stopped, killed and started again at any moment.

Each cell is a process of its own, niced and on one core, or on the GPU that fewest cells are on; as many run at once as
are asked for, on each of the ranks that torchrun started. What is finished stays finished, what was begun goes on from
its checkpoint, and two runners cannot work in one folder. A cell that fails does not stop the others.
"""

import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr.console.devices import gpu_names
from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.console.locks import alone_in
from dsmr.console.progress import ProgressLine, duration
from dsmr.console.ranks import GIVEN, Ranks
from dsmr.console.stopping import graceful_stop
from dsmr.corpus.etudes import compose_with_etudes
from dsmr.corpus.layout import MANIFEST
from dsmr.corpus.store import Corpus
from dsmr.experiments.cell import CellFolder, check_measurable, settings_of, work
from dsmr.experiments.rows import read_row
from dsmr.experiments.table import Cell, Table
from dsmr.training.side_by_side import last_record

if TYPE_CHECKING:
    from rich.console import Console

TABLE = "table.json"
TURN = 0.5  # seconds between two looks at the cells in progress
TRAINING_SHARE = 0.8  # of a cell's time, before one has shown what it is


@dataclass(frozen=True)
class RunResult:
    """How a run of a table ended: cells by key, and the signal that stopped it, if any."""

    finished: list[str]
    failed: dict[str, str]
    left: list[str]
    signal: int | None

    @property
    def exit_code(self) -> int:
        """0, 1 where a cell failed, or 128 + the number of the signal that ended it early."""
        return 128 + self.signal if self.signal is not None else int(bool(self.failed))


def run_table(
    table: Table,
    out: str | Path,
    *,
    jobs: int = 1,
    data: str | Path | None = None,
    graph: bool = False,
    console: "Console | None" = None,
    ranks: Ranks | None = None,
) -> RunResult:
    """Run all cells of `table` that are not finished into the folder `out`; `data` names the corpus elsewhere, `graph`
    trains by CUDA graphs.

    Some cells alone: `table.only(names)`, or `table.without(rows)` that were finished elsewhere.

    Of several `ranks`, which see the same folder, whichever is free takes the next cell; the first holds the folder's
    lock, composes the corpus, and speaks. Raises `UserError`, before any work, for a folder that another runner works
    in or that holds another table, and for measurements that the corpus cannot serve.
    """
    if jobs < 1:
        raise UserError(f"the number of jobs must be at least 1, got {jobs}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write the results to {folder}: it is a file")
    ranks = ranks or Ranks()
    alone = alone_in(folder, "another runner works") if ranks.first else contextlib.nullcontext()
    with alone, ProgressLine(ranks.console(console)) as line:
        if not ranks.first:
            ranks.meet()  # they begin when the folder is the first's, and all is there
        corpus = _begun(table, folder, data, line, ranks.first)
        if ranks.first:
            ranks.meet()
        ranks.check_agreement({"the cells": [cell.key for cell in table.cells], "the corpus": corpus.digest})
        return _Runner(table, folder, str(corpus.path), jobs, line, ranks, graph=graph).run()


def _begun(table: Table, folder: Path, data: str | Path | None, line: ProgressLine, first: bool) -> Corpus:
    """The corpus of a folder that the first rank has made that of this table; `UserError` where it is another's."""
    former = folder / TABLE
    if former.exists():
        _check_same(folder, table.settings(), read_json(former))
    corpus = _corpus(table, folder, data, line)
    check_measurable(table, corpus)
    settings = settings_of(table, corpus)
    if former.exists():
        _check_same(folder, settings, read_json(former))
    if first:
        write_json(former, settings, sealed=True)
    return corpus


def _corpus(table: Table, folder: Path, data: str | Path | None, line: ProgressLine) -> Corpus:
    """The table's corpus; composed first where it says so and that was not done."""
    if data is not None or table.composed is None:
        return Corpus.open(data or str(table.data))
    composed = table.composed
    where = folder / "corpus"
    finished = where / "with-etudes" if composed.etudes else where
    if not (finished / MANIFEST).exists():
        line.say(f"composing {composed.pieces} pieces of about {composed.minutes:g} minutes")
        compose_with_etudes(
            where,
            pieces=composed.pieces,
            piece_minutes=composed.minutes,
            etude_share=composed.etudes,
            etude_tokens=composed.etude_tokens,
            seed=composed.seed,
        )
    return Corpus.open(finished)


def _check_same(folder: Path, now: Any, then: Any, path: str = "") -> None:
    """`UserError` that names the first setting in which two tables differ; what only `then` has does not count."""
    if isinstance(now, dict) and isinstance(then, dict):
        for key, value in now.items():
            _check_same(folder, value, then.get(key), f"{path} {key}".strip())
    elif now != then:
        raise UserError(
            f"{folder} holds results of another table: its {path} is {then}, but {now} was asked for; "
            "choose another --out (cells may be added, all else must stay)"
        )


class _Runner:
    """The cells in progress: `running` here, `at_work` on any rank. What is still to do is the same on all ranks."""

    def __init__(
        self,
        table: Table,
        folder: Path,
        data: str,
        jobs: int,
        line: ProgressLine,
        ranks: Ranks,
        *,
        graph: bool = False,
    ) -> None:
        self.table, self.folder, self.data, self.jobs, self.line, self.ranks = table, folder, data, jobs, line, ranks
        self.graph = graph
        self.context = multiprocessing.get_context("spawn")
        self.gpus = _gpus(ranks)
        self.failed: dict[str, str] = {}
        self.todo: list[Cell] = []
        self.running: dict[str, tuple[BaseProcess, str | None]] = {}
        self.at_work: dict[str, Cell] = {}
        self.news: list[tuple[str, str, bool]] = []  # a cell that ended here, what is said of it, whether it failed
        self.finished: list[str] = ranks.everybody([c.key for c in table.cells if self.of(c).row.exists()])[0]
        for cell in table.cells:
            if cell.key not in self.finished:
                self.todo.append(cell)
        self.began = time.monotonic()
        self.work_at_start = sum(self._done(cell) for cell in self.todo)

    def of(self, cell: Cell) -> CellFolder:
        return CellFolder(self.folder, cell.key)

    def run(self) -> RunResult:
        if self.finished:
            self.line.say(f"{len(self.finished)} cells were finished before: {', '.join(self.finished)}")
        unfinished = list(self.todo)
        with graceful_stop() as stop:
            self.ranks.stop = stop
            try:
                while self.ranks.meet(len(self.running)) or self.todo:
                    if self.ranks.signal is not None:
                        break
                    self._deal()
                    time.sleep(TURN)
                    self._collect()
                    self._tell()
                    self.line.update(self._status(unfinished))
            finally:
                for process, _ in self.running.values():
                    process.terminate()  # training saves and ends
                for process, _ in self.running.values():
                    process.join()
            left = [cell.key for cell in unfinished if cell.key not in self.finished and cell.key not in self.failed]
            self._conclude(left, stop.name if stop.signal is not None else None)
            return RunResult(self.finished, self.failed, left, stop.signal if left else None)

    def _deal(self) -> None:
        """Whoever is free takes the next cells."""
        for rank, free in enumerate(self.ranks.everybody(self.jobs - len(self.running))):
            for _ in range(min(free, len(self.todo))):
                cell = self.todo.pop(0)
                self.at_work[cell.key] = cell
                if rank == self.ranks.rank:
                    self._start(cell)

    def _start(self, cell: Cell) -> None:
        gpu = None
        if self.gpus and self.table.config(cell, "", "").device in ("auto", "cuda"):
            taken = [used for _, used in self.running.values()]
            gpu = min(self.gpus, key=taken.count)
        process = self.context.Process(
            target=work, args=(self.table.written, cell.key, self.data, self.folder, self.graph)
        )
        with _environment(gpu):
            process.start()
        self.running[cell.key] = (process, gpu)

    def _collect(self) -> None:
        """Note which cells ended here."""
        for key, (process, _) in list(self.running.items()):
            if process.is_alive():
                continue
            process.join()
            del self.running[key]
            folder = self.of(self.at_work[key])
            if folder.row.exists():
                row = read_row(folder.row)
                self.news.append((key, f"{row['nats_per_note']:.4f} nats a note{_remembers(row)}", False))
            else:
                self.news.append((key, _why(folder, process.exitcode), True))

    def _tell(self) -> None:
        """Let all ranks know which cells ended."""
        for key, said, failed in itertools.chain(*self.ranks.everybody(self.news)):
            del self.at_work[key]
            if failed:
                self.failed[key] = said
            else:
                self.finished.append(key)
            self.line.say(f"{key} failed: {said}" if failed else f"{key}: {said}")
        self.news = []

    def _conclude(self, left: Sequence[str], stopped_by: str | None) -> None:
        said = [f"{len(self.finished)} of {len(self.table.cells)} cells are finished"]
        if stopped_by is not None:
            said.append(f"stopped by {stopped_by}; the same command goes on")
        if self.failed:
            said.append(f"{len(self.failed)} failed")
        self.line.say("; ".join(said))

    # Progress -----------------------------------------------------------------------------------------------------

    def _done(self, cell: Cell) -> float:
        """The part of a cell's work that is done, 0 to 1, about."""
        folder = self.of(cell)
        if folder.row.exists():
            return 1.0
        record = last_record(folder.run / "metrics.jsonl", "train")
        steps = self.table.config(cell, "", "").steps
        if record is None or steps is None:
            return 0.0
        measured = sum(folder.measured(what).exists() for what in ("evaluation", "memory", "returns"))
        trained = min(1.0, float(record["step"]) / steps)
        return TRAINING_SHARE * trained + (1 - TRAINING_SHARE) * measured / 3

    def _status(self, unfinished: Sequence[Cell]) -> str:
        done = sum(self._done(cell) for cell in unfinished)
        spent, gained = time.monotonic() - self.began, done - self.work_at_start
        left = duration(spent * (len(unfinished) - done) / gained) if gained > 0.01 else "?"
        phrases = [self._phrase(cell) for cell in self.at_work.values()]
        count = f"{len(self.finished)} of {len(self.finished) + len(self.todo) + len(self.at_work)} cells"
        return " · ".join([f"{count}, {left} to go", *phrases])

    def _phrase(self, cell: Cell) -> str:
        record = last_record(self.of(cell).run / "metrics.jsonl", "train")
        steps = self.table.config(cell, "", "").steps
        if record is None:
            return f"{cell.key}: starting"
        if steps is not None and record["step"] >= steps:
            return f"{cell.key}: measuring"
        of_all = f"/{steps:,}" if steps is not None else ""
        return f"{cell.key}: step {record['step']:,}{of_all}, loss {record['loss']:.2f}"


def _gpus(ranks: Ranks) -> list[str]:
    """The GPUs for cells of this rank: all that there are, or under torchrun the one of its place on the machine."""
    found = gpu_names()
    return found if ranks.alone or not found else [found[int(os.environ["LOCAL_RANK"]) % len(found)]]


@contextlib.contextmanager
def _environment(gpu: str | None) -> Iterator[None]:
    """What a process that is started here finds: this GPU alone, and nothing of torchrun's, for it trains by itself."""
    wanted = {**dict.fromkeys(GIVEN), **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    former = {name: os.environ.get(name) for name in wanted}
    try:
        _set(wanted)
        yield
    finally:
        _set(former)


def _set(environment: Mapping[str, str | None]) -> None:
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _remembers(row: dict[str, Any]) -> str:
    krcu = row.get("krcu")
    return "" if not krcu else f", KRCU-AUC {krcu['auc']['mean']:.4f}"


def _why(folder: CellFolder, exit_code: int | None) -> str:
    """Why a cell's process ended without a row: the last line of its log, or how it died."""
    if exit_code is not None and exit_code < 0:
        return f"its process was killed by signal {-exit_code}; the same command goes on with it"
    try:
        lines = folder.log.read_text(encoding="utf-8").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1] if lines else f"exit code {exit_code}"
