"""What `dsmr profile` is asked to measure: the sizes of a model, and one shape of work for it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dsmr.console.errors import UserError
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule

KINDS = ("train", "piece", "decode")
"""One training step behind full memories; a whole piece in one call, forward and backward; one token at a time."""


@dataclass(frozen=True)
class Sizes:
    """Of the model and of the calls; the same for all schedules of a profile.

    Attributes:
        batch: rows of the training step; whole pieces and decoding have one row.
        piece_tokens: tokens of the whole-piece call.
        positions: tokens of the piece seen before, at which a token's time is taken.
        dtype: "float32" or "bfloat16" (autocast; the memory is in bfloat16 too).
        device: "cpu", "cuda" or "cuda:N".
        rounds, seconds: at most so many timed rounds of a step, and no further one after so many seconds.
    """

    d_model: int = 256
    heads: int = 4
    segment_length: int = 256
    batch: int = 1
    vocab_size: int = 746
    visibility: str = "segment"
    piece_tokens: int = 2048
    positions: tuple[int, ...] = (0, 256, 1024, 4096)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    seconds: float = 2.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))
        for name in ("segment_length", "batch", "vocab_size", "piece_tokens", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if any(position < 0 for position in self.positions):
            raise UserError(f"positions must not be negative, got {', '.join(map(str, self.positions))}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"unknown dtype {self.dtype!r}: use float32 or bfloat16")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def element_bytes(self) -> int:
        """Of keys and values."""
        return 2 if self.dtype == "bfloat16" else 4

    def config(self, schedule: MemorySchedule) -> Any:
        """The `DSMRConfig`; `UserError` in one sentence for sizes that do not go together, and for a schedule whose
        calls are read segment by segment: the parts of a step are told apart for one call."""
        if not schedule.newest:
            raise UserError(f"{schedule}: dsmr profile measures memories that keep the newest tokens only")
        try:
            return DSMRConfig(
                self.vocab_size,
                schedule,
                d_model=self.d_model,
                n_heads=self.heads,
                segment_length=self.segment_length,
                visibility=self.visibility,
            )
        except ValueError as error:
            raise UserError(f"{schedule}: {error}") from error


@dataclass(frozen=True)
class Job:
    """One row of a profile."""

    schedule: str
    kind: str
    sizes: Sizes
    trace: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As the process that does the job reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "sizes": Sizes(**values["sizes"])})
