"""How the next token is drawn, without PyTorch: the settings, the random numbers, and a draw on the host in numpy.

`dsmr.generation.sampling` is the same draw on tensors, on any device. `Noise` gives the numbers that a
`torch.Generator` of the same seed gives, bit for bit, so that a seed means the same wherever it is drawn from.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError

if TYPE_CHECKING:
    import torch

Tokens = npt.NDArray[np.int64]
Allowed = npt.NDArray[np.bool_] | None
Uniform = npt.NDArray[np.float32]

NOT_FINITE = "the model's logits are not finite (NaN or infinity): its weights are damaged or overflow"

_WORDS = 624  # of the Mersenne Twister's state
_HEAD = np.dtype([("seed", "<u8"), ("left", "<i4"), ("seeded", "<i4"), ("next", "<u8"), ("words", "<u8", _WORDS)])
_TAIL = bytes(40)  # what PyTorch keeps of normal numbers, of which none are drawn here
STATE_BYTES = _HEAD.itemsize + len(_TAIL)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in the order of the fields, each to what the last one left.

    temperature  divides the logits; 0 takes the likeliest token every time, and the filters then change nothing
    top_k        keep the k likeliest tokens; None keeps all
    top_p        keep the fewest tokens whose probabilities reach p together; 1 keeps all
    min_p        keep tokens at least min_p times as likely as the likeliest; 0 keeps all
    seed         the same seed, model, prompt and settings give the same music; None draws a fresh one
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None to keep every token, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (which keeps every token), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie between 0 (which keeps every token) and 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")

    def noise(self, row: int = 0) -> Noise:
        """Fresh random numbers. Row r of a batch draws as a stream of seed + r alone would."""
        return Noise(secrets.randbits(63) if self.seed is None else (self.seed + row) % 2**63)

    def generator(self, row: int = 0) -> torch.Generator:
        """The generator of PyTorch that gives what `noise(row)` gives, on the CPU, so that a seed means the same on
        every device."""
        import torch

        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + row) % 2**63)
        return generator


class Noise:
    """Uniform numbers, at least 0 and below 1: those of `torch.rand(())` from a CPU generator with this seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        # Both begin as Matsumoto and Nishimura's `init_genrand` with 32 bits of the seed.
        words = np.random.RandomState(seed % 2**32).get_state(legacy=False)["state"]
        self._set(words["key"], int(words["pos"]))

    def _set(self, words: npt.NDArray[np.uint32], place: int) -> None:
        self._bits = np.random.MT19937()
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": place}}

    def draw(self) -> float:
        """The next number, a multiple of 2**-24."""
        return (int(self._bits.random_raw()) & (1 << 24) - 1) / (1 << 24)

    def get_state(self) -> npt.NDArray[np.uint8]:
        """(STATE_BYTES,), a state of `torch.Generator` that gives the same numbers from here on."""
        words = self._bits.state["state"]
        place = int(words["pos"])
        head = np.zeros((), _HEAD)
        # PyTorch counts the words that are left, and says 1 where they are to be made anew.
        head["seed"], head["seeded"], head["words"] = self.seed, 1, words["key"]
        head["left"], head["next"] = (1, 0) if place == _WORDS else (_WORDS + 1 - place, place)
        return np.frombuffer(head.tobytes() + _TAIL, np.uint8).copy()

    @classmethod
    def of_state(cls, state: npt.NDArray[np.uint8]) -> Noise:
        """The inverse of `get_state`, also of PyTorch's own; `ValueError` for what is neither."""
        raw = np.ascontiguousarray(state, np.uint8).tobytes()
        if len(raw) != STATE_BYTES:
            raise ValueError(f"a generator's state has {STATE_BYTES} bytes, got {len(raw)}")
        head = np.frombuffer(raw[: _HEAD.itemsize], _HEAD)[0]
        left = int(head["left"])
        if not 1 <= left <= _WORDS or int(head["words"].max()) >= 2**32:
            raise ValueError("its random numbers are not those of a Mersenne Twister")
        noise = cls.__new__(cls)
        noise.seed = int(head["seed"])
        noise._set(head["words"], _WORDS + 1 - left)
        return noise


def draw(
    logits: npt.NDArray[np.float32],
    sampling: Sampling,
    allowed: Allowed,
    noise: Uniform,
) -> Tokens:
    """The tokens (B,) that `noise` (B,) falls on; `allowed` (B, V) may be drawn.

    `UserError` where logits (B, V) are not finite; minus infinity is.
    """
    if not math.isfinite(logits.sum()) and bool((np.isnan(logits) | np.isposinf(logits)).any()):
        raise UserError(NOT_FINITE)
    if allowed is not None:
        logits = np.where(allowed, logits, np.float32(-np.inf))
    return np.array([_pick(row, sampling, float(one)) for row, one in zip(logits, noise, strict=True)], dtype=np.int64)


def _pick(logits: npt.NDArray[np.float32], sampling: Sampling, noise: float) -> int:
    """One row's token; the steps are those of `dsmr.generation.sampling.candidates` and `pick`."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order: npt.NDArray[np.int64] | None = None
    if (sampling.top_k is not None and sampling.top_k < len(logits)) or sampling.top_p < 1:
        order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    ranked = logits if order is None else logits[order]
    ranked = (ranked - ranked.max()) / np.float32(max(sampling.temperature, 1e-6))
    if sampling.top_p < 1:
        chances = _softmax(ranked)
        before = chances.cumsum(dtype=np.float32) - chances
        ranked = np.where(before >= np.float32(sampling.top_p), np.float32(-np.inf), ranked)
    if sampling.min_p > 0:
        ranked = np.where(ranked < np.float32(math.log(sampling.min_p)), np.float32(-np.inf), ranked)
    reached = _softmax(ranked).cumsum(dtype=np.float64)  # double, so that noise times the whole stays below the whole
    index = min(int(np.searchsorted(reached, noise * reached[-1], side="right")), len(reached) - 1)
    return index if order is None else int(order[index])


def _softmax(ranked: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of a row whose largest entry is 0."""
    weights = np.exp(ranked)
    return weights / weights.sum(dtype=np.float32)
