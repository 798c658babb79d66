"""`dsmr demo`: what a memory is good for, shown from nothing in a few minutes on a laptop.

Pieces are composed whose refrain returns long after it was first played. Two models of the same size learn from the
same tokens side by side, a core each: one with a two-scale memory, one that knows only the segment in which it is.
Where the refrain returns, only the first can know what comes. Then it continues a piece that it has never seen.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.files import write_json, write_text
from dsmr.corpus.etudes import compose_with_etudes
from dsmr.corpus.store import Corpus
from dsmr.demo.figures import comparison_figure, refrains
from dsmr.evaluation.losses import evaluate_run, piece_losses
from dsmr.evaluation.report import EvaluationReport
from dsmr.generation.continuation import continue_piece
from dsmr.generation.player import Sampling
from dsmr.model.transformer import DSMRModel
from dsmr.music.tokenizer import decode, write_midi
from dsmr.runs.settings import TrainConfig
from dsmr.training.side_by_side import AT_ONCE, last_record, steps_a_second, train_side_by_side
from dsmr_kernels.costing.cost import human_bytes as human

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


WITH, WITHOUT = "two-scale memory", "no memory"
SHARED = 0.7  # of the speed that a model has alone, when two train at once on two cores


@dataclass(frozen=True)
class DemoSize:
    """What the demo composes and trains. The two models differ in their schedule only."""

    pieces: int = 160
    piece_minutes: float = 2.0
    etude_share: float = 0.5  # of the training tokens; see dsmr/corpus/etudes.py
    etude_tokens: int = 240
    layers: int = 2
    n_long: int = 1
    long: int = 4096
    short: int = 128
    d_model: int = 96
    n_heads: int = 2
    segment_length: int = 128
    batch_size: int = 4
    # Copying is learned within minutes when keys are labelled with what was heard before them (`recall`), the labels
    # are matched from the start, and most rotary frequencies are too low to part them over thousands of tokens.
    recall: int = 6
    init_std: float = 0.1
    rope_base: float = 1e10
    lr: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    prompt_seconds: float = 15.0
    seconds: float = 30.0

    @property
    def schedules(self) -> dict[str, str]:
        """The schedule of each model, by name."""
        return {
            WITH: f"two_scale(layers={self.layers}, long={self.long}, short={self.short}, n_long={self.n_long})",
            WITHOUT: f"none(layers={self.layers})",
        }


@dataclass(frozen=True)
class ModelResult:
    """One model's part of results.json; losses in nats."""

    schedule: str
    parameters: int
    memory_bytes: int
    trained_tokens: int
    nats_per_note: float
    nats_per_token: float
    by_label: dict[str, float]


@dataclass(frozen=True)
class DemoResult:
    """What the demo found, and what it wrote."""

    models: dict[str, ModelResult]
    seconds: dict[str, float]
    files: dict[str, str]

    @property
    def advantage(self) -> dict[str, float]:
        """Nats a token that memory saves on each kind of passage."""
        with_memory, without = self.models[WITH].by_label, self.models[WITHOUT].by_label
        return {label: without[label] - with_memory[label] for label in with_memory}


def run_demo(
    out: str | os.PathLike[str],
    *,
    minutes: float = 3.5,
    seed: int = 0,
    size: DemoSize | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Compose, train, evaluate, continue and draw into the folder `out`, in about `minutes` minutes of computing.

    Raises `UserError` if `out` holds anything but a former demo, or cannot be written.
    """
    from dsmr.console.screen import Screen

    size = size or DemoSize()
    console = console or Screen()
    folder = Path(out)
    clear(folder)
    timer = Timer(console, minutes)
    corpus = compose_corpus(folder, size, seed)
    timer.done("compose")
    # What is left after training, measured: a tenth of a second for each piece to evaluate and for each second to play.
    reserve = 8.0 + 0.1 * (size.pieces / 10) * 2 + 0.15 * size.seconds
    seconds = max(1.0, timer.left - reserve)
    seconds = seconds if AT_ONCE else seconds / 2
    configs = training_configs(folder, corpus.path, size, seed, seconds)
    train_side_by_side(same_steps(configs, corpus, seconds), seconds, console)
    timer.done("train")
    reports = evaluate_both(folder, corpus)
    timer.done("evaluate")
    files = draw(folder, corpus, reports)
    files |= continue_one(folder, corpus, size, seed)
    timer.done("continue and draw")
    models = {name: model_result(folder, name, size, reports[name]) for name in size.schedules}
    result = DemoResult(models, timer.seconds, {name: str(path) for name, path in files.items()})
    found = {**asdict(result), "advantage": result.advantage, "size": asdict(size)}
    write_json(folder / "results.json", found, sealed=True)
    write_text(folder / "summary.md", summary(result))
    console.print(table(result))
    console.print(conclusion(result))
    for name, path in files.items():
        console.print(f"  {name}: {path}", soft_wrap=True)
    return result


class Timer:
    """Says how long each stage took, and knows how much time is left."""

    def __init__(self, console: Console, minutes: float) -> None:
        self.console = console
        self.began = self.last = time.monotonic()
        self.end = self.began + 60 * minutes
        self.seconds: dict[str, float] = {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def done(self, stage: str) -> None:
        """The stage that ends now."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self.last, 2)
        self.last = now
        self.console.print(f"{stage}: {self.seconds[stage]:.0f} s")


def clear(folder: Path) -> None:
    """Delete a former demo, and nothing else."""
    import shutil

    if folder.exists() and not folder.is_dir():
        raise UserError(f"cannot write the demo to {folder}: it is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / MARK).is_file():
        raise UserError(f"{folder} holds other files: choose an empty folder for the demo")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


MARK = ".dsmr-demo"  # a folder with this file was made by the demo, and may be replaced by the next


def compose_corpus(folder: Path, size: DemoSize, seed: int) -> Corpus:
    """Compose the corpus of the demo."""
    write_text(folder / MARK, "This folder is replaced by the next `dsmr demo`.\n")
    return compose_with_etudes(
        folder / "corpus",
        pieces=size.pieces,
        piece_minutes=size.piece_minutes,
        etude_share=size.etude_share,
        etude_tokens=size.etude_tokens,
        seed=seed,
    )


def run_folder(folder: Path, name: str) -> Path:
    """The run directory of the model `name`."""
    return folder / "runs" / name.replace(" ", "-")


def training_configs(folder: Path, corpus: Path, size: DemoSize, seed: int, seconds: float) -> dict[str, TrainConfig]:
    """What the two models are trained with, for so many seconds at most: the same but for the schedule."""
    return {
        name: TrainConfig(
            data=str(corpus),
            out=str(run_folder(folder, name)),
            schedule=schedule,
            d_model=size.d_model,
            n_heads=size.n_heads,
            segment_length=size.segment_length,
            batch_size=size.batch_size,
            recall=size.recall,
            init_std=size.init_std,
            rope_base=size.rope_base,
            lr=size.lr,
            weight_decay=size.weight_decay,
            betas=size.betas,
            dropout=0.0,
            augment=False,
            seed=seed,
            minutes=seconds / 60,
            device="cpu",
            dtype="float32",
            threads=1,
            eval_tokens=10_000,
        )
        for name, schedule in size.schedules.items()
    }


def same_steps(configs: dict[str, TrainConfig], corpus: Corpus, seconds: float) -> dict[str, TrainConfig]:
    """Give all models as many steps as the slowest, the one with memory, can do in the time: all read the same tokens.

    Its speed is measured while it has the machine for itself, so a part is taken off for what they share at once.
    """
    measuring = min(4.0, 0.1 * seconds)
    speed = steps_a_second(configs[WITH], corpus, measuring)
    steps = max(1, int(SHARED * speed * (seconds - measuring)))
    left = max(1.0, seconds - measuring) / 60
    return {name: dataclasses.replace(config, steps=steps, minutes=left) for name, config in configs.items()}


# --- evaluation, continuation, pictures ---------------------------------------------------------------------------


def evaluate_both(folder: Path, corpus: Corpus) -> dict[str, EvaluationReport]:
    """The reports of both models on the validation split, written into their runs as well."""
    return {
        name: evaluate_run(run_folder(folder, name), corpus.path, "validation", batch_size=8, device="cpu")
        for name in (WITH, WITHOUT)
    }


def draw(folder: Path, corpus: Corpus, reports: dict[str, EvaluationReport]) -> dict[str, Path]:
    """The comparison: bars by passage, and the loss along the validation piece on which memory helps at the median."""
    assert corpus.labels is not None
    piece = int(corpus.pieces_of("validation")[0])
    span = slice(int(corpus.offsets[piece]) + 1, int(corpus.offsets[piece + 1]))
    clock = corpus.vocabulary.clock(corpus.piece(piece))[1:]
    along = {
        name: piece_losses(DSMRModel.from_pretrained(run_folder(folder, name)), corpus, [piece])[0] for name in reports
    }
    path = folder / "comparison.png"
    stretches = refrains(np.asarray(corpus.labels[span]), clock)
    comparison_figure(path, reports, str(corpus.source[piece]), clock, along, stretches)
    return {"comparison": path}


def continue_one(folder: Path, corpus: Corpus, size: DemoSize, seed: int) -> dict[str, Path]:
    """Continue the beginning of a validation piece with the model that has a memory."""
    import torch

    piece = int(corpus.pieces_of("validation")[0])
    prompt = folder / "prompt.mid"
    write_midi(prompt, decode(corpus.piece(piece), corpus.vocabulary))
    # A model this small is no faster on several threads, and much slower where they have to share their cores.
    torch.set_num_threads(1)
    done = continue_piece(
        run_folder(folder, WITH),
        prompt,
        folder / "continued.mid",
        prompt_seconds=size.prompt_seconds,
        seconds=size.seconds,
        sampling=Sampling(temperature=0.95, top_p=0.95, seed=seed),
        device="cpu",
    )
    return {"piece": prompt, "whole": done.whole, "continuation": done.continuation, "piano roll": done.picture}


# --- results ------------------------------------------------------------------------------------------------------


def model_result(folder: Path, name: str, size: DemoSize, report: EvaluationReport) -> ModelResult:
    """The figures of one model."""
    model = DSMRModel.from_pretrained(run_folder(folder, name))
    record = last_record(run_folder(folder, name) / "metrics.jsonl", "train") or {}
    return ModelResult(
        schedule=size.schedules[name],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        memory_bytes=model.new_state(1, aligned=True).nbytes,
        trained_tokens=int(record.get("tokens", 0)),
        nats_per_note=report.nats_per_note,
        nats_per_token=report.nats_per_token,
        by_label={loss.label: loss.nats_per_token for loss in report.by_label or ()},
    )


def rows(result: DemoResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the one table: each kind of passage, both models, and what memory saves."""
    header = ["validation loss", *result.models, "memory saves"]
    body = []
    for label, saved in result.advantage.items():
        values = [model.by_label[label] for model in result.models.values()]
        body.append([f"{label} (nats a token)", *(f"{value:.3f}" for value in values), f"{saved:+.3f}"])
    notes = [model.nats_per_note for model in result.models.values()]
    body.append(["all (nats a note)", *(f"{value:.3f}" for value in notes), f"{notes[1] - notes[0]:+.3f}"])
    models = result.models.values()
    body.append(["parameters", *(f"{model.parameters:,}" for model in models), ""])
    body.append(["tokens read in training", *(f"{model.trained_tokens:,}" for model in models), ""])
    body.append(["memory of a stream", *(human(model.memory_bytes) for model in models), ""])
    return header, body


def table(result: DemoResult) -> Table:
    """The one table, for a terminal (rich)."""
    from rich.table import Table

    header, body = rows(result)
    drawn = Table(title="same size, same training, with and without memory")
    for number, name in enumerate(header):
        drawn.add_column(name, justify="right" if number else "left")
    for row in body:
        drawn.add_row(*row, style="bold" if row[0].startswith("refrain return") else "")
    return drawn


def conclusion(result: DemoResult) -> str:
    """What the table says, in a sentence that holds whichever way it came out."""
    saved = result.advantage
    returns, elsewhere = saved.get("refrain return", math.nan), saved.get("elsewhere", math.nan)
    return (
        f"Against the model without memory, the one with memory {_better(returns)} where the refrain returns, "
        f"and {_better(elsewhere)} elsewhere."
    )


def _better(saved: float) -> str:
    return f"is {abs(saved):.2f} nats a token {'better' if saved >= 0 else 'worse'}"


def summary(result: DemoResult) -> str:
    """summary.md: the table, the sentence and the pictures."""
    header, body = rows(result)
    lines = ["# What the demo found", "", "| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body]
    took = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    lines += ["", conclusion(result), "", f"Time: {took}.", ""]
    lines += ["![Loss by passage and along a piece](comparison.png)", "", "![The piece continued](continued.png)", ""]
    return "\n".join(lines)
