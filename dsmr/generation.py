"""Play on from the recurrent state: sampling, and a stream of tokens that may go on for ever in bounded memory.

`stream` feeds the prompt in whole segments and then one token at a time; the model's state is the only thing that it
carries, so memory stays at the schedule's budget however long it plays. With a vocabulary, successors that the token
grammar forbids are never drawn, so every sample decodes to music. `step` is the one place where a token becomes
logits: a specialised decode path takes its place there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsmr.data.vocabulary import TIME_TYPES
from dsmr.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from dsmr.data.vocabulary import Vocabulary
    from dsmr.model import DSMRModel
    from dsmr.state import DSMRState

    Prompt = Sequence[int] | np.ndarray | Tensor

# A model that never moves on in time would play one endless chord, and a length in seconds would never be reached:
# after this many tokens on one instant the only tokens drawn are those that move time, where the grammar has them.
TOKENS_ON_ONE_INSTANT = 512


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

    def generator(self) -> torch.Generator:
        """A fresh random generator of this seed, on the CPU, so that a seed means the same on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def probabilities(logits: Tensor, sampling: Sampling, allowed: Tensor | None = None) -> Tensor:
    """The distribution that `sample` draws from: float32, the shape of `logits` (..., V), each row summing to 1.

    `allowed` (broadcastable to `logits`, bool) marks the tokens that may be drawn at all. `UserError` where the
    logits are not finite, `ValueError` where nothing is allowed.
    """
    logits = logits.detach().float()
    if bool(torch.isnan(logits).any()) or bool(torch.isposinf(logits).any()):
        raise UserError("the model's logits are not finite (NaN or infinity): its weights are damaged or overflow")
    if allowed is not None:
        if not bool(allowed.any(-1).all()):
            raise ValueError("allowed leaves no token to draw from")
        logits = logits.masked_fill(~allowed, -math.inf)
    logits = logits - logits.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    # The likeliest token sits at 0, so a tiny temperature can only send the others to -inf, never make a NaN.
    logits = logits / max(sampling.temperature, 1e-6)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(sampling.top_k).indices, True)
        logits = logits.masked_fill(~kept, -math.inf)
    if sampling.top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # what the likelier tokens reach without this one; 0 for the likeliest
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before < sampling.top_p)
        logits = logits.masked_fill(~kept, -math.inf)
    if sampling.min_p > 0:
        logits = logits.masked_fill(logits < math.log(sampling.min_p), -math.inf)
    return logits.softmax(-1)


def sample(
    logits: Tensor,
    sampling: Sampling,
    allowed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of `logits` (..., V); the result is (...) int64 on the logits' device."""
    chances = probabilities(logits, sampling, allowed)
    if sampling.temperature == 0:
        return chances.argmax(-1)
    rows = chances.reshape(-1, chances.shape[-1])
    return torch.multinomial(rows, 1, generator=generator).reshape(chances.shape[:-1])


@torch.no_grad()
def step(model: DSMRModel, token: int, state: DSMRState) -> Tensor:
    """Show the model one more token: updates `state` in place, returns the next token's logits (V,), float32, CPU."""
    tokens = torch.tensor([[token]], dtype=torch.int64, device=model_device(model))
    return model(tokens, state).logits[0, -1].float().cpu()


@torch.no_grad()
def prefill(model: DSMRModel, tokens: Tensor, state: DSMRState) -> Tensor:
    """Show the model a prompt (T,), one segment a call so that a long one needs no more memory; logits like `step`."""
    length = model.config.segment_length
    logits = None
    for start in range(0, len(tokens), length):
        segment = tokens[None, start : start + length].to(model_device(model))
        logits = model(segment, state).logits[0, -1]
    if logits is None:
        raise ValueError("a prompt needs at least one token (a piece begins with BOS)")
    return logits.float().cpu()


def model_device(model: DSMRModel) -> torch.device:
    """The device of the model's weights."""
    return next(model.parameters()).device


def stream(
    model: DSMRModel,
    prompt: Prompt,
    sampling: Sampling | None = None,
    vocabulary: Vocabulary | None = None,
    *,
    max_tokens: int | None = None,
    seconds: float | None = None,
    notes: int | None = None,
    stop_at_end: bool = False,
    state: DSMRState | None = None,
) -> Iterator[int]:
    """Play on after `prompt`: token ids, one at a time, for ever or until the first length that is reached.

    prompt        token ids (T,), T ≥ 1, a piece's own beginning with BOS; with `state`, the tokens that it has not seen
    vocabulary    masks what the grammar forbids, and counts seconds and notes; without it every token may be drawn
    max_tokens    stops after exactly so many tokens
    seconds       stops before the piece would be further than so many seconds past its prompt
    notes         stops when so many notes are complete
    stop_at_end   lets the model end the piece: the stream ends where it draws EOS. Otherwise EOS is never drawn
    state         a batch-of-one state to play on from, updated in place; by default a new one

    Raises `ValueError` at once for arguments that cannot be served, and `UserError` from the stream if the model's
    logits are not finite; the tokens yielded until then are good. The model runs in evaluation mode meanwhile.
    """
    sampling = Sampling() if sampling is None else sampling
    tokens = torch.as_tensor(prompt, dtype=torch.int64).cpu().reshape(-1)
    size = model.config.vocab_size
    if len(tokens) == 0:
        raise ValueError("prompt must hold at least one token (a piece begins with BOS)")
    if int(tokens.min()) < 0 or int(tokens.max()) >= size:
        raise ValueError(
            f"prompt must hold token ids from 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )
    if vocabulary is not None and vocabulary.size != size:
        raise ValueError(f"the model has {size} tokens and the vocabulary {vocabulary.size}: they belong to two runs")
    if vocabulary is None and (seconds is not None or notes is not None or stop_at_end):
        raise ValueError("seconds, notes and stop_at_end need a vocabulary, which knows time, notes and EOS")
    for name, value in (("max_tokens", max_tokens), ("seconds", seconds), ("notes", notes)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or more, got {value}")
    limits = Limits(seconds, notes)
    progress = None if vocabulary is None else Progress(vocabulary, tokens, limits, stop_at_end)
    return _stream(model, tokens, sampling, progress, max_tokens, state)


@dataclass(frozen=True)
class Limits:
    """How long to play, counted in music; None is no limit."""

    seconds: float | None = None
    notes: int | None = None


def _stream(
    model: DSMRModel,
    prompt: Tensor,
    sampling: Sampling,
    progress: Progress | None,
    max_tokens: int | None,
    state: DSMRState | None,
) -> Iterator[int]:
    was_training = model.training
    model.eval()
    try:
        if state is None:
            state = model.new_state(1)
        generator = sampling.generator()
        logits = prefill(model, prompt, state)
        made = 0
        while max_tokens is None or made < max_tokens:
            if progress is not None and progress.reached():
                return
            allowed = None if progress is None else progress.allowed()
            token = int(sample(logits, sampling, allowed, generator))
            if progress is not None and progress.ends(token):
                return
            yield token
            made += 1
            if max_tokens is None or made < max_tokens:
                logits = step(model, token, state)
    finally:
        model.train(was_training)


class Progress:
    """What may come next, how far the stream has come in seconds and notes, and where it may stop."""

    def __init__(self, vocabulary: Vocabulary, prompt: Tensor, limits: Limits, stop_at_end: bool) -> None:
        from dsmr.data.vocabulary import StreamClock

        self.vocabulary = vocabulary
        self.limits = limits
        self.stop_at_end = stop_at_end
        self.clock = StreamClock(vocabulary)
        self.clock.extend(prompt.tolist())
        self.grammar = vocabulary.grammar()
        self.grammar.extend(prompt.tolist())
        self.began = self.now = self.clock.seconds
        self.notes = 0
        self.on_one_instant = 0
        self._moves_time = vocabulary.of_type(*TIME_TYPES)

    def allowed(self) -> Tensor:
        """(V,) bool: the tokens that may come next."""
        allowed = self.grammar.allowed()
        if not self.stop_at_end:
            allowed[self.vocabulary.eos_id] = False
        if self.on_one_instant >= TOKENS_ON_ONE_INSTANT and (allowed & self._moves_time).any():
            allowed &= self._moves_time
        if not allowed.any():
            raise UserError(f"nothing may follow {self.vocabulary.tokens[self.grammar.previous]} in this vocabulary")
        return torch.from_numpy(allowed)

    def reached(self) -> bool:
        """Whether the asked notes are complete, or no second is left."""
        full = self.limits.notes is not None and self.notes >= self.limits.notes
        return (full or self._late(self.now)) and may_stop(self.vocabulary, self.grammar.previous)

    def ends(self, token: int) -> bool:
        """Count `token`, drawn next; whether the stream ends before it (EOS, or time past the asked length)."""
        if self.stop_at_end and token == self.vocabulary.eos_id:
            return True
        now = self.clock.push(token)
        if self._late(now):
            return True  # time never passes within a note's tokens, so none is broken here
        self.on_one_instant = 0 if now > self.now else self.on_one_instant + 1
        self.now = now
        self.notes += bool(self.vocabulary.is_note[token])
        self.grammar.push(token)
        return False

    def _late(self, now: float) -> bool:
        return self.limits.seconds is not None and now - self.began >= self.limits.seconds


def may_stop(vocabulary: Vocabulary, previous: int) -> bool:
    """Whether music may break off after the token `previous`: where the piece may end or time may pass, so never in
    the middle of a note's tokens."""
    after = vocabulary.allowed_after(previous)
    return bool(after[vocabulary.eos_id] or (after & vocabulary.of_type(*TIME_TYPES)).any())
