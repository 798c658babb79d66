"""What a model is: everything that fixes its shape and meaning, and how many numbers it learns."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dsmr.model.attention import check_retention
from dsmr.model.positions import POSITIONS
from dsmr.model.schedule import MOST_TOKENS, MemorySchedule
from dsmr_kernels.visibility import VISIBILITIES

FEED_FORWARDS = ("gelu", "swiglu")
MOST = {
    **{"vocab_size": 2**24, "d_model": 2**20, "n_heads": 2**20, "d_ff": 2**24, "recall": 2**16},
    "segment_length": MOST_TOKENS,
}
"""Beyond any model, so that what is counted still fits in 64 bits."""
MOST_PARAMETERS = 2**40


@dataclass(frozen=True)
class DSMRConfig:
    """Everything that fixes a model's shape and meaning; goes to and from config.json.

    Attributes:
        vocab_size: number of token ids.
        schedule: `MemorySchedule` or its text; its length is the number of layers, its KV heads override n_heads.
        d_model: width.
        n_heads: query heads.
        segment_length: tokens of a segment.
        visibility: "segment" (the paper) or "sliding".
        position: "rope", "sinusoidal", "alibi" or "none".
        ffn: "gelu" or "swiglu".
        dropout: of the embedding and of what each sub-layer adds to the residual stream.
        d_ff: inner width of the feed-forward layer; None = 4 * d_model (gelu) or 8 / 3 * d_model (swiglu).
        tie_embeddings: use the embedding as the output projection.
        rope_base: base of the rotary frequencies.
        init_std: standard deviation of the initial weights.
        recall: label every key with the `recall` tokens heard just before it, and every query with those heard just
            now, see `Recall`. 0 = the paper's model.
    """

    vocab_size: int
    schedule: MemorySchedule
    d_model: int = 512
    n_heads: int = 8
    segment_length: int = 1024
    visibility: str = "segment"
    position: str = "rope"
    ffn: str = "gelu"
    dropout: float = 0.0
    d_ff: int | None = None
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    init_std: float = 0.02
    recall: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", MemorySchedule.parse(self.schedule))
        for name in ("vocab_size", "d_model", "n_heads", "segment_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if isinstance(self.recall, bool) or not isinstance(self.recall, int) or self.recall < 0:
            raise ValueError(f"recall must be an integer >= 0, got {self.recall!r}")
        if not 0 < self.rope_base < math.inf:
            raise ValueError(f"rope_base must be above 0 and finite, got {self.rope_base}")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std must not be negative, nor infinite, got {self.init_std}")
        if self.d_ff is not None and self.d_ff < 1:
            raise ValueError(f"d_ff must be >= 1, got {self.d_ff}")
        for name, most in MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        for name, known in (("visibility", VISIBILITIES), ("position", POSITIONS), ("ffn", FEED_FORWARDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {self.d_model} and {self.n_heads}")
        self.schedule.heads(self.n_heads)
        if self.parameters > MOST_PARAMETERS:
            raise ValueError(f"a model has at most {MOST_PARAMETERS:,} parameters, and this has {self.parameters:,}")
        for retention, horizon in zip(self.schedule.retention, self.schedule.horizons, strict=True):
            check_retention(retention, horizon, self.visibility, self.position)

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layers."""
        return self.d_ff or (8 * self.d_model // 3 if self.ffn == "swiglu" else 4 * self.d_model)

    @property
    def parameters(self) -> int:
        """Numbers that a model of this configuration learns."""
        width, layers = self.d_model, self.schedule.layers
        kv_heads = sum(self.schedule.heads(self.n_heads))
        attention = 2 * layers * width**2 + 2 * kv_heads * self.head_dim * width
        feed_forward = layers * width * self.inner * (3 if self.ffn == "swiglu" else 2)
        tables = self.vocab_size * width * (1 if self.tie_embeddings else 2)
        labels = self.recall * width**2 + width if self.recall else 0
        return attention + feed_forward + tables + labels + (2 * layers + 1) * width

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it."""
        return {**dataclasses.asdict(self), "schedule": str(self.schedule)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DSMRConfig":
        """The inverse of `to_dict`; `ValueError` names fields that are missing or unknown."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted({"vocab_size", "schedule"} - set(values))
        if unknown or missing:
            raise ValueError(f"a model's configuration has unknown fields {unknown} and lacks {missing}")
        return cls(**values)
