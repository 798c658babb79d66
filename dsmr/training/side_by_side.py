"""Train several small models at the same time, a core each, and say how they are doing on one line.

Small models use one core better than several: side by side they learn about twice as much in the same time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsmr.console.errors import UserError
from dsmr.console.progress import ProgressLine, duration
from dsmr.console.schema import Real, check
from dsmr.corpus.pool import cores
from dsmr.corpus.store import Corpus
from dsmr.corpus.streams import StreamLoader
from dsmr.model.transformer import DSMRModel
from dsmr.runs.checkpoint import LINE
from dsmr.runs.settings import TrainConfig
from dsmr.training.loop import train

if TYPE_CHECKING:
    from rich.console import Console


AT_ONCE = cores() > 1
"""Whether there are cores to train at the same time; otherwise the models are trained one after another."""


def train_side_by_side(configs: Mapping[str, TrainConfig], seconds: float, console: Console) -> None:
    """Train each of the named models into its own run directory; `seconds` is how long each is expected to take.

    What a run says goes to its `train.log`. Raises `UserError` with the last line of it if one fails. Ctrl-C lets the
    runs save and end.
    """
    context = multiprocessing.get_context("spawn")
    workers = {name: context.Process(target=train_one, args=(config,), daemon=True) for name, config in configs.items()}
    waves = [list(workers)] if AT_ONCE else [[name] for name in workers]
    try:
        with ProgressLine(console) as line:
            for wave in waves:
                began = time.monotonic()
                for name in wave:
                    workers[name].start()
                while any(workers[name].is_alive() for name in wave):
                    time.sleep(0.2)
                    left = max(0.0, seconds - (time.monotonic() - began))
                    phrases = [status(name, Path(configs[name].out)) for name in wave]
                    line.update("; ".join([f"training, {duration(left)} to go", *filter(None, phrases)]))
    finally:
        for worker in workers.values():
            if worker.is_alive():
                worker.terminate()
            if worker.pid is not None:
                worker.join()
    for name, worker in workers.items():
        if worker.exitcode:
            log = Path(configs[name].out) / "train.log"
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:] if log.is_file() else []
            raise UserError(
                f"training the model with {name} failed: {' '.join(last) or f'exit code {worker.exitcode}'}"
            )


def steps_a_second(config: TrainConfig, corpus: Corpus, seconds: float = 4.0) -> float:
    """Training steps a second of `config` on one core, measured for about so many seconds with full memories."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = DSMRModel(config.model_config(corpus.vocabulary.size))
        length = config.segments_per_step * config.segment_length
        loader = StreamLoader(corpus, "train", config.batch_size, length, config.seed)
        state = model.new_state(config.batch_size, aligned=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        began, steps = time.monotonic(), 0
        measured_from, measured = began, 0
        while time.monotonic() - began < seconds or not measured:
            batch = next(loader)
            optimizer.zero_grad()
            output = model(batch.tokens, state, targets=batch.targets, piece_start=batch.piece_start)
            assert output.loss is not None
            output.loss.backward()
            optimizer.step()
            steps += 1
            if time.monotonic() - began < seconds / 2:  # memories fill, caches warm
                measured_from = time.monotonic()
            else:
                measured += 1
        return measured / (time.monotonic() - measured_from)
    finally:
        torch.set_num_threads(threads)


def train_one(config: TrainConfig) -> None:
    """One worker: train, with everything that is said written to the run's train.log."""
    from dsmr.console.screen import Screen

    if hasattr(os, "setpgrp"):
        # A terminal sends Ctrl-C to its whole group: it would reach the run beside the parent's SIGTERM, and the second
        # of two signals ends a run at once, unsaved.
        os.setpgrp()
    threading.Thread(target=stop_with_parent, daemon=True).start()
    log = Path(config.out) / "train.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        try:
            result = train(config, console=Screen(file=file, width=160))
        except UserError as error:
            print(error, file=file)
            raise SystemExit(1) from error
    raise SystemExit(result.exit_code)


def stop_with_parent() -> None:
    """Ask this process to save and end when its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def status(name: str, run: Path) -> str | None:
    """A phrase on a model in training: its latest step and loss; None before the first step."""
    record = last_record(run / "metrics.jsonl", "train")
    return record and f"{name}: step {record['step']:,}, loss {record['loss']:.2f}"


def last_record(metrics: Path, kind: str) -> Any:
    """The latest whole line of that kind near the end of a metrics file; None where there is none."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = check(json.loads(line), {**LINE, "loss": Real}, metrics)
        except (UserError, ValueError, RecursionError):
            continue
        if record["kind"] == kind:
            return record
    return None
