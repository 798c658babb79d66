"""What a training run is asked to do: the fields of `TrainConfig` are the options of `dsmr train`."""

import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmr.console.errors import UserError
from dsmr.console.schema import check_fields
from dsmr.corpus.store import Corpus
from dsmr.model.config import DSMRConfig
from dsmr.runs.checkpoint import FORMAT, RunDirectory, load_settings

WHOLE = (
    *("batch_size", "segments_per_step", "segment_length", "steps", "threads"),
    *("eval_every", "eval_tokens", "save_every"),
)
"""Settings that count something, so that they are at least 1."""
MOST = {"batch_size": 2**20, "segments_per_step": 2**20, "threads": 2**12}
"""Beyond any machine; for what counts otherwise and is not told of a model, see `MOST_COUNTED`."""
MOST_COUNTED = 2**53
DEFAULT_EPOCHS = 10.0
WARM_SHARE = 0.03
"""The part of a run in which the learning rate rises, where `warmup` does not say otherwise."""
EVALUATIONS = 20
"""The most validations in a run, where `eval_every` does not say otherwise; fewer where they would take too long:"""
EVALUATION_SHARE = 0.1
"""the part of a run's time that they may take,"""
EVALUATION_SPEED = 3
"""given that a token is evaluated about three times as fast as it is trained on (no backward, no update)."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run, which ends when the first of `steps`, `epochs`, `minutes` is reached."""

    data: str
    out: str
    # The model; see DSMRConfig.
    schedule: str = "two_scale(layers=8, long=4096, short=512, n_long=2)"
    d_model: int = 512
    n_heads: int = 8
    d_ff: int | None = None
    segment_length: int = 1024
    visibility: str = "segment"
    position: str = "rope"
    ffn: str = "gelu"
    dropout: float = 0.1
    rope_base: float = 10000.0
    init_std: float = 0.02
    recall: int = 0
    # The stream.
    batch_size: int = 4
    segments_per_step: int = 1
    augment: bool = True
    curriculum: float = 0.0  # part of the run in which what is heard at a stretch grows, see `excerpt`
    # Planted returns (dsmr.corpus.returns): their share of the tokens (0: none), and how far back, in tokens.
    returns: float = 0.0
    returns_nearest: int = 1000
    returns_farthest: int = 16000
    seed: int = 0
    # How long; all None means 10 epochs.
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    # The optimiser. `warmup` is in steps (None: 3 % of the run); `min_lr` None means a tenth of `lr`; `clip` 0 is off.
    lr: float = 5e-4
    min_lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    # Where, and in which precision.
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    checkpoint_layers: bool = (
        False  # memory for time: each layer is computed again in the backward, to the same gradients
    )
    compile: bool = False  # fuse what surrounds attention with torch.compile, which needs a compiler
    graph: bool = False  # record the step as a CUDA graph and replay it
    # Measuring and saving. `eval_every` and `save_every` are in steps (None: up to
    # 20 times a run, taking a tenth of its time at most; only by the clock).
    eval_every: int | None = None
    eval_tokens: int = 100_000
    save_every: int | None = None
    save_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, but it is {value}")
            if value is not None and value > (most := MOST.get(name, MOST_COUNTED)):
                raise UserError(f"{name} must be at most {most:,}, but it is {value}")
        for name in ("epochs", "minutes", "lr", "save_minutes", "rope_base"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} must be above 0, but it is {value}")
        for name in ("min_lr", "warmup", "weight_decay", "clip", "init_std", "seed"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name} must not be negative, but it is {value}")
        if not 0 <= self.curriculum <= 1:
            raise UserError(f"curriculum must be at least 0 and at most 1, but it is {self.curriculum}")
        if not 0 <= self.returns <= 0.5:
            raise UserError(f"returns must be at least 0 and at most 0.5, but it is {self.returns}")
        if not 1 <= self.returns_nearest <= self.returns_farthest:
            raise UserError(
                f"returns_nearest must be at least 1 and at most returns_farthest, but they are "
                f"{self.returns_nearest} and {self.returns_farthest}"
            )
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, but it is {self.seed}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, but it is {self.dropout}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be two numbers of at least 0 and below 1, but they are {self.betas}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The opposite of `to_dict`; `UserError` for a field that this version does not have."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"unknown training setting '{unknown[0]}'")
        check_fields(values, cls, "the settings of the run")
        return cls(**{**values, "betas": tuple(values.get("betas", cls.betas))})

    @classmethod
    def of_run(cls, out: str | Path) -> "TrainConfig":
        """The settings of the run in `out`: resume it with `train(dataclasses.replace(TrainConfig.of_run(out), …))`."""
        run = RunDirectory(out)
        try:
            config = cls.from_dict(load_settings(run)["train"])
            config.model_config(vocab_size=1)
        except UserError as error:
            raise error if str(run.path) in str(error) else UserError(f"{run.settings}: {error}") from error
        return cls.from_dict({**config.to_dict(), "out": str(out)})

    def model_config(self, vocab_size: int) -> "DSMRConfig":
        """The model's configuration; `UserError` for a schedule or shape that cannot be."""
        names = (
            *("schedule", "d_model", "n_heads", "d_ff", "segment_length", "visibility", "position", "ffn", "dropout"),
            *("rope_base", "init_std", "recall"),
        )
        try:
            return DSMRConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """Steps until the end; None if only the clock ends the run."""
        epochs = self.epochs
        if self.steps is None and epochs is None and self.minutes is None:
            epochs = DEFAULT_EPOCHS
        ends = [self.steps] if self.steps is not None else []
        if epochs is not None:
            ends.append(max(1, math.ceil(epochs * steps_per_epoch)))
        return min(ends, default=None)

    def evaluations(self, steps: int | None, tokens: int) -> int:
        """Validations in a run of `steps` steps, where each of them reads `tokens` tokens."""
        if steps is None or self.minutes is not None:
            return EVALUATIONS  # the clock decides
        read = steps * self.batch_size * self.segments_per_step * self.segment_length
        return max(1, min(EVALUATIONS, int(EVALUATION_SHARE * EVALUATION_SPEED * read / max(tokens, 1))))

    def learning_rate(self, step: int, done: float) -> float:
        """The learning rate of step `step` (from 0), when the part `done` (0 to 1) of the run lies behind."""
        rise = (done + 1e-3) / WARM_SHARE if self.warmup is None else (step + 1) / max(self.warmup, 1)
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        return min(rise, 1.0) * (low + (self.lr - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))

    def excerpt(self, done: float, longest: int) -> int | None:
        """Tokens after which a piece counts as a new one, so that nothing before is remembered, when the part `done` of
        the run lies behind and memories hold up to `longest` tokens; None: a piece is a piece.

        A curriculum of length: from one segment on it doubles, in stages that last equally long, until at the end of
        the part `curriculum` nothing is cut any more.
        """
        if done >= self.curriculum or longest <= 0:
            return None
        stages = max(1, math.ceil(math.log2(longest / self.segment_length)) + 1)
        return self.segment_length << int(done / self.curriculum * stages)


def run_settings(
    config: TrainConfig, corpus: "Corpus", model_config: "DSMRConfig", dtype: torch.dtype
) -> dict[str, Any]:
    """What `train.json` says: the settings, and what they were applied to."""
    return {
        "format": FORMAT,
        "train": config.to_dict(),
        "model": model_config.to_dict(),
        "dtype": str(dtype).removeprefix("torch."),
        "corpus": {"name": corpus.name, "digest": corpus.digest, "pieces": int(corpus.n_pieces)},
        "tokenizer_hash": corpus.vocabulary.hash,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
    }


def validation_pieces(corpus: "Corpus", tokens: int) -> np.ndarray:
    """A fixed choice of whole validation pieces of about `tokens` tokens together, the same for every run.

    Taken in a shuffled order, leaving out what would be too much; the shortest piece where none is short enough.
    """
    pieces = np.asarray(corpus.pieces_of("validation"), dtype=np.int64)
    lengths = np.diff(np.asarray(corpus.offsets))
    chosen: list[int] = []
    total = 0
    for piece in np.random.default_rng(0).permutation(pieces):
        if total + lengths[piece] <= tokens:
            chosen.append(int(piece))
            total += int(lengths[piece])
    if not chosen and len(pieces):
        chosen = [int(pieces[lengths[pieces].argmin()])]
    return np.array(sorted(chosen), dtype=np.int64)
