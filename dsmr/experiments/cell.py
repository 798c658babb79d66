"""One cell of a table: trained, measured as all others are, and made into a row of plain values.

A cell may be killed at any moment. Training goes on from its checkpoint; each measurement that was finished lies in
the cell's folder; and a row, once written, is final.
"""

import os
import platform
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

import numpy as np
import torch

from dsmr.console.devices import resolve_device, resolve_dtype
from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.console.locks import locked
from dsmr.console.schema import Natural, Real, check
from dsmr.corpus.returns import Planter
from dsmr.corpus.store import Corpus
from dsmr.evaluation.losses import open_run, piece_losses, pieces_of
from dsmr.evaluation.memory_use import check_reset, memory_use
from dsmr.evaluation.report import report_losses
from dsmr.evaluation.returns import return_losses
from dsmr.experiments.rows import FORMAT, checked_row
from dsmr.experiments.table import Cell, Measure, Table
from dsmr.runs.checkpoint import Metrics, RunDirectory, load_settings
from dsmr.runs.settings import TrainConfig
from dsmr.training.loop import train
from dsmr.training.side_by_side import stop_with_parent

STEP = {"tokens": Natural, "tokens_per_second": Real, "seconds": Real}
NICE = 10  # cells give way to whatever else the machine is used for


class CellFolder:
    """The files of one cell, by name."""

    def __init__(self, out: Path, key: str) -> None:
        self.path = out / "cells" / key
        self.run = self.path / "run"
        self.row = self.path / "row.json"
        self.log = self.path / "cell.log"
        self.peak = self.path / "peak.json"
        self.lock = self.path / ".lock"

    def measured(self, what: str) -> Path:
        """Where one finished measurement lies."""
        return self.path / f"{what}.json"


def measured_pieces(corpus: Corpus, measure: Measure) -> np.ndarray:
    """The pieces that every model is measured on: all of the split, or a fixed choice of about `tokens` tokens."""
    pieces = pieces_of(corpus, measure.split)
    if measure.tokens is None:
        return pieces
    lengths = np.diff(np.asarray(corpus.offsets))
    chosen: list[int] = []
    total = 0
    for piece in np.random.default_rng(0).permutation(pieces):
        if not chosen or total + lengths[piece] <= measure.tokens:
            chosen.append(int(piece))
            total += int(lengths[piece])
    return np.array(sorted(chosen), dtype=np.int64)


def work(written: dict[str, Any], key: str, data: str, out: Path, graph: bool = False) -> None:
    """In a process of its own, for the cell `key` of the table `written`: train (with `graph` by a CUDA graph),
    measure, write the row. Ends with exit code 0, or says why not in the log."""
    from rich.console import Console

    table = Table.parse(written)
    cell = next(cell for cell in table.cells if cell.key == key)

    if hasattr(os, "setpgrp"):
        os.setpgrp()  # a terminal's Ctrl-C is the runner's to pass on
    if hasattr(os, "nice"):
        os.nice(NICE)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    folder = CellFolder(out, cell.key)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.lock, wait=True):  # a runner killed a moment ago may leave a cell that is just saving
        if folder.row.exists():
            return
        with open(folder.log, "a", encoding="utf-8") as file:
            try:
                code = run_cell(table, cell, data, folder, Console(file=file, width=160), graph=graph)
            except UserError as error:
                print(error, file=file)
                code = 1
    if code:
        sys.exit(code)


def run_cell(table: Table, cell: Cell, data: str, folder: CellFolder, console: Any, *, graph: bool = False) -> int:
    """Train (or go on), measure what is not measured yet, write the row; returns an exit code."""
    config = replace(table.config(cell, data, str(folder.run)), graph=graph)
    run = RunDirectory(config.out)
    before = _resident()
    result = train(config, resume=run.holds_run, console=console)
    _keep_peak(folder.peak, before, config)
    if not result.finished:
        return result.exit_code or 1
    torch.set_num_threads(config.threads or torch.get_num_threads())
    found = {what: _once(folder.measured(what), measure) for what, measure in _measurements(table, folder, config)}
    write_json(folder.row, _row(table, cell, config, folder, found), sealed=True)
    return 0


def _once(path: Path, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, from the file where it was written before."""
    if not path.exists():
        write_json(path, measure(), sealed=True)
    return check(read_json(path), dict, path)


def _measurements(table: Table, folder: CellFolder, config: TrainConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    measure = table.measure
    model, corpus = open_run(folder.run, config.data, config.device)
    device = next(model.parameters()).device
    how: dict[str, Any] = {"batch_size": measure.batch_size, "dtype": resolve_dtype(measure.dtype, device)}
    pieces = measured_pieces(corpus, measure)
    known: list[list[np.ndarray]] = []

    def losses() -> list[np.ndarray]:
        if not known:
            known.append(piece_losses(model, corpus, pieces, **how))
        return known[0]

    def evaluation() -> Any:
        report = report_losses(corpus, measure.split, pieces, losses(), name=config.out).to_json()
        del report["by_piece"], report["model"]
        return {**report, "parameters": sum(p.numel() for p in model.parameters())}

    def memory() -> Any:
        return memory_use(
            model, corpus, measure.split, pieces, losses(), bins=measure.krcu, retain=measure.retain, **how
        ).to_json()

    def returns() -> Any:
        probe = measure.returns
        assert probe is not None
        planter = Planter(corpus.vocabulary, distance=(probe.nearest, probe.farthest))
        return return_losses(model, corpus, measure.split, planter, pieces=pieces, seed=probe.seed, **how).to_json()

    yield "evaluation", evaluation
    if measure.krcu is not None or measure.retain:
        yield "memory", memory
    if measure.returns is not None:
        yield "returns", returns


def _row(table: Table, cell: Cell, config: TrainConfig, folder: CellFolder, found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is said of a cell; what differs from machine to machine stands under "measured"."""
    records = Metrics(folder.run / "metrics.jsonl").read()
    steps = [record for record in records if record["kind"] == "train"]
    for record in steps:
        check(record, STEP, folder.run / "metrics.jsonl")
    if not steps:
        raise UserError(f"{folder.run / 'metrics.jsonl'} is damaged: it holds no step")
    a_step = config.batch_size * config.segments_per_step * config.segment_length
    evaluation, memory = dict(found["evaluation"]), found.get("memory") or {}
    row = {
        "format": FORMAT,
        "table": table.name,
        "model": cell.model.name,
        "title": cell.model.title,
        "preset": None if cell.model.preset is None else cell.model.preset.name,
        "our_reading": "" if cell.model.preset is None else cell.model.preset.ours,
        "seed": cell.seed,
        "schedule": str(cell.model.schedule),
        "train": table.train,
        "settings": cell.model.settings,
        "kv_bytes": table.size.bytes(cell.model.schedule),
        "steps": steps[-1]["step"],
        "trained_tokens": steps[-1]["tokens"],
        **evaluation,
        "krcu": memory.get("krcu"),
        "retain": memory.get("retain", []),
        "returns": found.get("returns"),
        "learning": [[r["step"] * a_step, r.get("nats_per_note")] for r in records if r["kind"] == "validation"],
        "measured": {
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in steps[len(steps) // 2 :]),
            "training_seconds": steps[-1]["seconds"],
            "peak_bytes": _peak(folder.peak),
            "device": _device(config),
            "device_type": resolve_device(config.device).type,
            "dtype": load_settings(RunDirectory(folder.run))["dtype"],
            "threads": config.threads,
            "graph": config.graph,
            "torch": str(torch.__version__),
        },
    }
    return checked_row(row, f"what was measured in {folder.path}")


def _device(config: TrainConfig) -> str:
    device = resolve_device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = {line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")}
    return sorted(names)[0] if names else platform.processor() or platform.machine()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _resident() -> int:
    """Bytes that this process holds now, as far as the system tells; else the most that it has held."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return _most_resident()


def _most_resident() -> int:
    """The most bytes that this process has held; 0 where the system does not tell."""
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _keep_peak(path: Path, before: int, config: TrainConfig) -> None:
    """Note the most memory that training took beyond what Python and PyTorch take: the highest of all its parts."""
    if resolve_device(config.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = max(0, _most_resident() - before)
    former = _peak(path) if path.exists() else 0
    write_json(path, {"bytes": max(peak, former)}, sealed=True)


def _peak(path: Path) -> int:
    return int(check(read_json(path), {"bytes": Natural}, path)["bytes"])


def settings_of(table: Table, corpus: Corpus) -> dict[str, Any]:
    """What a folder of results is held to: the table without its cells, and the corpus."""
    return {"format": FORMAT, **table.settings(), "corpus": {"name": corpus.name, "digest": corpus.digest}}


def check_measurable(table: Table, corpus: Corpus) -> None:
    """`UserError` for measurements that the corpus or a cell cannot serve, before anything is trained."""
    measure = table.measure
    pieces = measured_pieces(corpus, measure)
    if measure.krcu is not None:
        lengths = [int(n) - 1 for n in np.diff(np.asarray(corpus.offsets))[pieces]]
        for cell in table.cells:  # a model may have a segment length of its own
            segment = table.config(cell, "", "").segment_length
            try:
                check_reset(measure.krcu, segment, lengths, corpus.name, measure.split)
            except UserError as error:
                raise UserError(f"{cell.model.name} cannot be measured: {error}") from error
    if measure.returns is not None:
        planter = Planter(corpus.vocabulary, distance=(measure.returns.nearest, measure.returns.farthest))
        longest = int(np.diff(np.asarray(corpus.offsets))[pieces].max())
        if longest <= planter.distance[0]:
            raise UserError(
                f"no piece of {corpus.name}, split '{measure.split}', is long enough for a return after "
                f"{planter.distance[0]:,} tokens: the longest has {longest:,}"
            )
    for cell in table.cells:
        config = table.config(cell, "", "")
        if config.returns:
            Planter(corpus.vocabulary, distance=(config.returns_nearest, config.returns_farthest))
