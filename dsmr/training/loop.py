"""Train a DSMR model on streams of whole pieces, so that the run can be stopped, killed and resumed at any moment.

Each step reads the next `segments_per_step` segments of every row; the rows' memories go on from step to step and are
reset, row by row, where a piece begins. A run whose length is given in steps or epochs and which is killed and resumed
has bit for bit the losses of one that was never killed. (With `minutes` the learning rate follows the clock.)
"""

import contextlib
import functools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsmr.console.devices import autocast, resolve_device, resolve_dtype
from dsmr.console.errors import UserError
from dsmr.console.figures import available
from dsmr.console.files import write_json
from dsmr.console.heap import keep_freed_memory
from dsmr.console.locks import alone_in
from dsmr.console.progress import ProgressLine, duration
from dsmr.console.schema import Maybe, Natural, Number, check
from dsmr.console.stopping import Stop, StoppedError, graceful_stop
from dsmr.console.words import one_line
from dsmr.corpus.returns import Planter
from dsmr.corpus.store import Corpus
from dsmr.corpus.streams import Augment, Batch, StreamLoader
from dsmr.evaluation.losses import evaluate
from dsmr.model.transformer import DSMRModel
from dsmr.music.augment import Augmenter
from dsmr.runs.checkpoint import (
    Metrics,
    RunDirectory,
    check_same_run,
    load_checkpoint,
    load_settings,
    save_checkpoint,
)
from dsmr.runs.settings import TrainConfig, run_settings, validation_pieces
from dsmr.training.captured import CapturedStep, unrecordable, without_graph
from dsmr.training.compiling import missing_compiler
from dsmr.training.figures import loss_figure
from dsmr.training.joining import joined
from dsmr.training.pacing import PACE, Pace
from dsmr.training.ranks import TrainingRanks
from dsmr.training.update import clip_gradients, optimizer_of
from dsmr_kernels.backends.sdpa.workers import without_denormals
from dsmr_kernels.costing.cost import human_bytes

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. `best` is the lowest validation loss in nats a note, None if nothing was validated."""

    out: Path
    step: int
    finished: bool
    signal: int | None
    loss: float | None
    best: float | None
    best_step: int | None
    tokens: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or 128 + the number of the signal that ended the run early (130 for SIGINT, 143 for SIGTERM)."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    corpus: "Corpus | None" = None,
    console: "Console | None" = None,
    parallel: str | None = None,
) -> TrainResult:
    """Train a model into the run directory `config.out`, or go on with the run there.

    A directory that holds a run is refused unless `resume` or `overwrite` is given, and one that holds a corpus or a
    model of other origin always is. A run that is to be resumed and is at its end says so, and nothing is trained.
    SIGINT and SIGTERM finish the step, save and return (a second one ends the process at once). Raises `UserError` for
    bad settings, for a run that `config` does not continue, for a loss that is not finite, and for files that cannot be
    written.

    With `parallel` "ddp" or "fsdp" the processes that torchrun started train together (`dsmr.training.ranks`), and only
    the first writes and prints.
    """
    if resume and overwrite:
        raise ValueError("a run can be resumed or overwritten, not both")
    with joined(parallel, config.batch_size, config.device) as ranks:
        return _train(config, ranks, resume, overwrite, corpus, console)


def _train(
    config: TrainConfig,
    ranks: TrainingRanks,
    resume: bool,
    overwrite: bool,
    corpus: "Corpus | None",
    console: "Console | None",
) -> TrainResult:
    run = RunDirectory(config.out)
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"cannot train into {run.path}: it is a file, not a folder")
    if resume:
        load_settings(run)  # refuses a directory without a run
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if corpus is None:
        corpus = Corpus.open(config.data)
    with alone_in(run.path, "a training is running") if ranks.first else contextlib.nullcontext():
        if ranks.first:
            run.check_free(resume=resume, overwrite=overwrite)
        ranks.meet()  # the others begin when the directory is the first's
        training = _Training(config, run, corpus, resume, ranks)
        with ProgressLine(ranks.console(console)) as line, graceful_stop() as stop, without_denormals():
            return training.run(line, stop)


class _Training:
    """A run in progress: the model, its optimiser, its stream, and how far they are."""

    def __init__(
        self, config: TrainConfig, run: RunDirectory, corpus: "Corpus", resume: bool, ranks: TrainingRanks
    ) -> None:
        self.config, self.directory, self.corpus, self.ranks = config, run, corpus, ranks
        self.metrics = Metrics(run.metrics)
        self.device = resolve_device(ranks.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        model_config = config.model_config(corpus.vocabulary.size)
        if resume and config.dtype == "auto":
            self.dtype = resolve_dtype(load_settings(run)["dtype"], self.device)
        else:
            self.dtype = resolve_dtype(config.dtype, self.device)
        if config.compile and (reason := missing_compiler(self.device)) is not None:
            raise UserError(f"cannot compile the model: {reason}; train without --compile")
        if config.graph and (reason := unrecordable(config, self.device, ranks.alone)) is not None:
            raise UserError(f"the step cannot be recorded as a CUDA graph {reason}; train without --graph")
        settings = run_settings(config, corpus, model_config, self.dtype)
        if resume:
            check_same_run(run, load_settings(run), settings)

        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)  # noqa: NPY002 (whatever uses the global generators is then seeded too)
        random.seed(config.seed)
        self.loader = StreamLoader(
            corpus,
            "train",
            config.batch_size,
            config.segments_per_step * config.segment_length,
            config.seed,
            _augmenter(config, corpus),
            ranks.rows(config.batch_size),
        )
        saving = {"checkpoint_layers": config.checkpoint_layers, "compile_layers": config.compile}
        self.model = ranks.placed(DSMRModel(model_config, **saving), self.device)
        self.optimizer = optimizer_of(self.model, config)
        self.state = ranks.new_state(
            self.model, config.batch_size, device=self.device, dtype=self.dtype, aligned=True, apart=True
        )
        self.longest = max(model_config.schedule.horizons)
        self.memory = human_bytes(ranks.world * self.state.nbytes)
        self.validation = validation_pieces(corpus, config.eval_tokens)
        tokens = int(np.diff(np.asarray(corpus.offsets))[self.validation].sum())
        self.pace = Pace(config, config.total_steps(self.loader.steps_per_epoch), tokens, ranks.clock)
        ranks.seed(config.seed)

        self.captured: CapturedStep | None = None
        self.tokens = 0
        self.loss: float | None = None
        self.smooth_loss: float | None = None
        self.best: float | None = None
        self.best_step: int | None = None
        self.saved_step = -1

        if resume and run.last.exists():
            self._restore(load_checkpoint(run.last, mapped=not ranks.alone))
        asked = {name: value for name, value in config.to_dict().items() if name not in ("data", "out", "threads")}
        ranks.check_agreement({"the corpus": corpus.digest, "the step": self.pace.step, **asked})
        self.step_model = ranks.over(self.model)
        if config.graph:
            clip = config.clip or math.inf
            context = functools.partial(autocast, self.device, self.dtype)
            self.captured = CapturedStep(self.model, self.state, self.optimizer, clip, context)
        if ranks.first:
            self._begin_files(settings, resume)
        self.pace.start()

    def _begin_files(self, settings: dict[str, Any], resume: bool) -> None:
        if not resume:
            self.directory.clear()
        self.directory.sweep()
        write_json(self.directory.settings, settings, sealed=True)
        self.corpus.vocabulary.save(self.directory.tokenizer)
        self.metrics.cut(self.pace.step, self.pace.validated)

    # The run ------------------------------------------------------------------------------------------------------

    def run(self, line: ProgressLine, stop: Stop) -> TrainResult:
        self.ranks.stop = stop
        done = self.pace.step > 0 and self.pace.share >= 1
        line.say(self._already() if done else self._title())
        while True:
            if self.pace.validation_due:
                try:
                    self._validate(line, stop)
                except StoppedError:
                    break
                self._save()
            if self.ranks.signal is not None or self.pace.share >= 1:
                break
            self._train_step()
            line.update(self._status())
            if self.pace.save_due:
                self._save()
        finished = self.pace.share >= 1 and self.pace.validated == self.pace.step
        if self.saved_step != self.pace.step:
            self._save()
        if self.ranks.first:
            self._draw(line)
        end = "finished" if finished else f"stopped by {stop.name}"
        best = "" if self.best is None else f", best validation {self.best:.4f} nats a note at step {self.best_step:,}"
        if not (done and finished):
            said = f"{end} at step {self.pace.step:,} after {duration(self.pace.seconds)}"
            line.say(f"{said}{best}: {self.directory.path}")
        return TrainResult(
            out=self.directory.path,
            step=self.pace.step,
            finished=finished,
            signal=None if finished else stop.signal,
            loss=self.loss,
            best=self.best,
            best_step=self.best_step,
            tokens=self.tokens,
            seconds=self.pace.seconds,
        )

    def _train_step(self) -> None:
        begun = self.ranks.clock()
        config = self.config
        batch = next(self.loader).to(self.device)
        if (excerpt := config.excerpt(self.pace.share, self.longest)) is not None:
            batch = batch.cut(excerpt)
        rate = config.learning_rate(self.pace.step, self.pace.share)
        self.model.train()
        loss, norm = self._updated(batch, rate) if self.captured is None else self._replayed(batch, rate)
        self.loss = loss = self.ranks.meet(loss)
        tokens = batch.tokens.numel() * self.ranks.world
        self.tokens += tokens
        speed = self.pace.trained(tokens, self.ranks.clock() - begun)
        self.smooth_loss = loss if self.smooth_loss is None else 0.95 * self.smooth_loss + 0.05 * loss
        self._note(
            {
                "kind": "train",
                "step": self.pace.step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": self.tokens,
                "tokens_per_second": round(speed, 1),
                "seconds": round(self.pace.seconds, 3),
            }
        )

    def _updated(self, batch: Batch, rate: float) -> tuple[float, float]:
        """The loss of a batch and the length of its gradient, after the weights have followed it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with autocast(self.device, self.dtype, cached=self.ranks.hold_weights):
            output = self.step_model(
                batch.tokens,
                self.state,
                targets=batch.targets,
                piece_start=batch.piece_start,
                reduction=self.ranks.reduction,
            )
        share, objective = self.ranks.loss(output, batch)
        loss = share.item()
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss, batch, output.logits)
        self.optimizer.zero_grad(set_to_none=True)
        objective.backward()
        norm = clip_gradients(self.model.parameters(), self.config.clip or math.inf)
        if not math.isfinite(norm):
            raise self._not_finite("norm of the gradient", norm, batch, output.logits)
        self.optimizer.step()
        return loss, norm

    def _replayed(self, batch: Batch, rate: float) -> tuple[float, float]:
        """The same in one go, by a CUDA graph."""
        assert self.captured is not None
        loss, norm = self.captured(batch, rate)
        for what, value in (("loss", loss), ("norm of the gradient", norm)):
            if not math.isfinite(value):
                assert self.captured.logits is not None
                raise self._not_finite(what, value, batch, self.captured.logits)
        return loss, norm

    def _note(self, record: dict[str, Any]) -> None:
        if self.ranks.first:
            self.metrics.append(record)

    def _validate(self, line: ProgressLine, stop: Stop) -> None:
        """Measure the model on the fixed validation pieces, and keep its weights if they are the best so far."""

        def show(done: int, total: int) -> None:
            if stop.signal is not None:
                raise StoppedError
            line.update(f"step {self.pace.step:,} · validation {done / total:.0%}")

        better, begun = False, self.pace.seconds
        if len(self.validation):
            report = evaluate(
                self.ranks.to_measure(self.model),
                self.corpus,
                "validation",
                pieces=self.validation,
                batch_size=len(self.ranks.rows(self.config.batch_size)),
                segments_per_call=self.config.segments_per_step,
                dtype=self.dtype,
                name=f"the model at step {self.pace.step}",
                progress=show,
                ranks=self.ranks,
            )
            better = self.best is None or report.nats_per_note < self.best
            self._note(
                {
                    "kind": "validation",
                    "step": self.pace.step,
                    "loss": report.nats_per_token,
                    "nats_per_note": report.nats_per_note,
                    "perplexity": report.perplexity,
                    "best": better,
                    "seconds": round(self.pace.seconds, 3),
                }
            )
            if better:
                self.best, self.best_step = report.nats_per_note, self.pace.step
            line.say(
                f"{self._status()} · validation {report.nats_per_note:.4f} nats a note, "
                f"{report.nats_per_token:.4f} a token{' (best)' if better else ''}"
            )
        self.pace.validation_done(begun)
        if better:
            self._keep_weights()

    def _save(self) -> None:
        """Write the checkpoint, from which the run goes on as if it had never stopped."""
        self.ranks.check_weights(self.model)
        of_all = {
            "model": self.ranks.weights(self.model),
            "optimizer": without_graph(self.ranks.moments(self.model, self.optimizer)),
            "state": self.ranks.gathered(self.state.state_dict()),
            "loader": self.loader.state_dict(),
            **self.ranks.rng_states(),
            "pace": self.pace.state_dict(),
            "progress": {name: getattr(self, name) for name in _PROGRESS},
        }
        if self.ranks.first:
            save_checkpoint(self.directory.last, of_all)
        self.ranks.meet()  # so that the clock has seen the writing
        self.saved_step = self.pace.step
        self.pace.saved()
        if not len(self.validation):
            self._keep_weights()

    def _keep_weights(self) -> None:
        """Make the present weights the ones that the run directory is loaded with."""
        weights = self.ranks.weights(self.model)
        if self.ranks.first:
            self.model.save_pretrained(self.directory.path, state_dict=weights)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        check(checkpoint, {"progress": _PROGRESS, "pace": PACE}, self.directory.last)
        try:
            self.ranks.restore(self.model, self.optimizer, checkpoint)
            self.state.load_state_dict(self.ranks.own(checkpoint["state"], self.config.batch_size))
            self.loader.load_state_dict(checkpoint["loader"])
            for name in _PROGRESS:
                setattr(self, name, checkpoint["progress"][name])
            self.pace.load_state_dict(checkpoint["pace"])
            self.saved_step = self.pace.step
            self.ranks.restore_rng(checkpoint, self.config.seed, self.pace.step)
            if (self.best is None) != (self.best_step is None):
                raise ValueError(f"its best loss is {self.best}, of step {self.best_step}")
        except (
            LookupError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            AssertionError,
            OverflowError,
        ) as error:
            raise UserError(f"the checkpoint {self.directory.last} does not fit its run: {one_line(error)}") from error

    def _draw(self, line: ProgressLine) -> None:
        if available():
            loss_figure(self.metrics.read(), self.directory.loss_png, title=self.directory.path.name)
        else:
            line.say("the loss curve is not drawn, because Matplotlib is not installed")

    # What it says -------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        config, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        length = (
            f"{self.pace.total_steps:,} steps" if self.pace.total_steps is not None else f"{config.minutes:g} minutes"
        )
        return (
            f"{parameters / 1e6:.1f} M parameters, memory {self.memory}, {config.schedule}; "
            f"{len(self.loader.pieces):,} pieces, {self.loader.epoch_tokens:,} tokens; "
            f"{length} of {config.batch_size} × {self.loader.tokens_per_step:,} tokens "
            f"on {self.ranks.where(self.device)} in {str(self.dtype).removeprefix('torch.')}"
            + (f"; resumed at step {self.pace.step:,}" if self.pace.step else "")
        )

    def _already(self) -> str:
        """Of a run that has nothing left to do."""
        at = f"step {self.pace.step:,}"
        if self.pace.total_steps is not None and self.pace.step >= self.pace.total_steps:
            asked = f"{self.pace.total_steps:,}"
        else:
            at, asked = f"{at}, after {duration(self.pace.seconds)}", f"{self.config.minutes:g} minutes"
        return f"already at {at} of {asked} asked for: nothing to train; {self.directory.path}"

    def _status(self) -> str:
        left = self.pace.seconds_left
        of_all = f"/{self.pace.total_steps:,}" if self.pace.total_steps is not None else ""
        return (
            f"step {self.pace.step:,}{of_all} · {'?' if left is None else duration(left)} left · "
            f"loss {self.smooth_loss or 0:.3f} nats a token · {self.pace.speed or 0:,.0f} tokens/s · "
            f"memory {self.memory} · lr {self.optimizer.param_groups[0]['lr']:.1e}"
        )

    def _not_finite(self, what: str, value: float, batch: Batch, logits: torch.Tensor) -> UserError:
        """The error that names the step and the pieces: of the rows that went wrong, where that can be told."""
        rows = (~torch.isfinite(logits.detach()).flatten(1).all(1)).nonzero().flatten().tolist()
        named = sorted({piece for b in rows or range(len(batch.pieces)) for piece in batch.pieces[b]})
        names = ", ".join(f"'{self.corpus.source[piece]}'" for piece in named[:4])
        more = f" and {len(named) - 4} more" if len(named) > 4 else ""
        kept = (
            f"the checkpoint of step {self.saved_step:,} is kept" if self.saved_step >= 0 else "nothing was saved yet"
        )
        return UserError(
            f"the {what} is {value} at step {self.pace.step + 1:,}, in {names}{more}; {kept}; "
            "a lower learning rate or a longer warm-up may help"
        )


_PROGRESS = {
    "tokens": Natural,
    "loss": Maybe(Number),
    "smooth_loss": Maybe(Number),
    "best": Maybe(Number),
    "best_step": Maybe(Natural),
}
"""What a checkpoint keeps of `_Training` itself."""


def _augmenter(config: TrainConfig, corpus: "Corpus") -> Augment | None:
    """What happens to each piece when it is opened: returns are planted, then the whole is moved and stretched."""
    vary = Augmenter(corpus.vocabulary) if config.augment else None
    if not config.returns:
        return vary
    distance = (config.returns_nearest, config.returns_farthest)
    plant = Planter(corpus.vocabulary, share=config.returns, distance=distance)
    return plant if vary is None else lambda tokens, rng: vary(plant(tokens, rng), rng)
