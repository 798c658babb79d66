"""Play on from the recurrent state: one stream or several side by side, for ever if asked, in bounded memory.

A `Player` feeds the prompt in whole segments and then one token at a time; the model's state is the only thing that
grows with nothing, so memory stays at the schedule's budget however long it plays. With a vocabulary, successors that
the token grammar forbids are never drawn, so every sample decodes to music. `dsmr.generation.stepping` turns a token
into the next; `dsmr.generation.saved_stream` keeps a player in a file, to play on another day exactly as it would have
today.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsmr.console.devices import resolve_memory_dtype
from dsmr.console.errors import UserError
from dsmr.generation.sampling import Sampling, draw, probabilities, sample
from dsmr.generation.stepping import Stepper, stepper
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr.music.progress import Limits, Progress, may_stop
from dsmr.music.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

    Prompt = Sequence[int] | np.ndarray | Tensor

__all__ = ["Limits", "Player", "Progress", "Sampling", "may_stop", "prefill", "probabilities", "sample", "stream"]


@torch.no_grad()
def prefill(model: DSMRModel, tokens: Tensor, state: DSMRState) -> Tensor:
    """Show the model a prompt (B, T), one segment a call so that a long one needs no more memory.

    Returns:
        The next tokens' logits (B, V), float32, CPU. The model should be in evaluation mode.
    """
    length = model.config.segment_length
    logits = None
    for start in range(0, tokens.shape[1], length):
        segment = tokens[:, start : start + length].to(next(model.parameters()).device)
        logits = model(segment, state).logits[:, -1]
    if logits is None:
        raise ValueError("a prompt needs at least one token (a piece begins with BOS)")
    return logits.float().cpu()


class Player:
    """Streams that play on side by side, from one prompt or from a saved state.

    Made by `begin` or by `saved_stream.load_player`. `play` yields the tokens; between two of them a player may be
    saved, or played on under other limits.

    Attributes:
        state: of all streams, updated in place; it has seen all tokens but those in `unseen`.
        tokens: for each stream all tokens of its piece so far, the prompt's first.
        unseen: the newest token of each stream, played but not yet shown to the model; None if there is none.
        drawn: the next token of each stream, drawn but not yet played; None if `unseen` must be shown first.
    """

    def __init__(
        self,
        model: DSMRModel,
        state: DSMRState,
        tokens: list[array[int]],
        sampling: Sampling,
        vocabulary: Vocabulary | None = None,
        *,
        generators: list[torch.Generator] | None = None,
        dtype: str = "float32",
    ) -> None:
        check_vocabulary(model, vocabulary)
        if state.batch != len(tokens):
            raise ValueError(f"the state holds {state.batch} streams, but {len(tokens)} are to be played")
        self.model, self.state, self.tokens, self.sampling, self.vocabulary = model, state, tokens, sampling, vocabulary
        self.generators = generators or [sampling.generator(row) for row in range(len(tokens))]
        self.dtype = dtype
        self.unseen: Tensor | None = None
        self.drawn: Tensor | None = None
        self.on_one_instant = [0] * len(tokens)
        self._step: Stepper | None = None
        self.ended = [False] * len(tokens)

    @classmethod
    def begin(
        cls,
        model: DSMRModel,
        prompt: Prompt,
        sampling: Sampling | None = None,
        vocabulary: Vocabulary | None = None,
        *,
        variations: int = 1,
        state: DSMRState | None = None,
        dtype: str = "float32",
        memory_dtype: str = "auto",
    ) -> Player:
        """A player that has heard nothing yet: `play` shows it the prompt (T,) first.

        Args:
            variations: streams that play on from the same prompt; stream i draws as one of seed + i alone.
            state: to play on from, updated in place; the prompt is then what it has not seen.
            dtype: of the weights: "float32" (the model's own), "bfloat16", "int8" or "auto", see `stepping`.
            memory_dtype: of keys and values: "float32", "bfloat16", "int8" or "auto" (the model's own).
        """
        tokens = torch.as_tensor(prompt, dtype=torch.int64).cpu().reshape(-1)
        size = model.config.vocab_size
        if len(tokens) == 0:
            raise ValueError("prompt must hold at least one token (a piece begins with BOS)")
        if int(tokens.min()) < 0 or int(tokens.max()) >= size:
            raise ValueError(
                f"prompt must hold token ids from 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )
        if variations < 1:
            raise ValueError(f"variations must be at least 1, got {variations}")
        heard = [array("i", tokens.tolist()) for _ in range(variations)]
        if state is None:
            remembering = None if memory_dtype == "auto" else resolve_memory_dtype(memory_dtype, torch.float32)
            state = model.new_state(variations, dtype=remembering)
        elif memory_dtype != "auto":
            raise ValueError(f"memory_dtype must be left out beside a state, which has its own, got {memory_dtype!r}")
        return cls(model, state, heard, sampling or Sampling(), vocabulary, dtype=dtype)

    def play(
        self, max_tokens: int | None = None, limits: Limits | None = None, stop_at_end: bool = False
    ) -> Iterator[list[int | None]]:
        """The next token of every stream, None for one that has ended, until all have or `max_tokens` are made.

        Raises `UserError` where the model's logits are not finite; what was yielded until then is good. The model runs
        in evaluation mode meanwhile.
        """
        rows = range(len(self.tokens))
        self.ended = [False] * len(self.tokens)
        progress = self._progress(limits or Limits(), stop_at_end)
        was_training = self.model.training
        self.model.eval()
        try:
            made = 0
            while max_tokens is None or made < max_tokens:
                for row in rows:
                    self.ended[row] = self.ended[row] or (progress is not None and progress[row].reached())
                if all(self.ended):
                    return
                allowed = self._allowed(progress)
                drawn = self._draw(allowed).tolist()
                for row, token in enumerate(drawn):
                    self.ended[row] = self.ended[row] or (progress is not None and progress[row].ends(token))
                if all(self.ended):
                    return
                self.unseen, self.drawn = self.drawn, None
                for row in rows:
                    if not self.ended[row]:
                        self.tokens[row].append(drawn[row])
                    if progress is not None:
                        self.on_one_instant[row] = progress[row].on_one_instant
                yield [None if ended else token for ended, token in zip(self.ended, drawn, strict=True)]
                made += 1
        finally:
            self.model.train(was_training)

    def _progress(self, limits: Limits, stop_at_end: bool) -> list[Progress] | None:
        if self.vocabulary is None:
            return None
        progress = [Progress(self.vocabulary, heard, limits, stop_at_end) for heard in self.tokens]
        for one, count in zip(progress, self.on_one_instant, strict=True):
            one.on_one_instant = count
        return progress

    def _allowed(self, progress: list[Progress] | None) -> Tensor | None:
        """(B, V) bool: what each stream may draw; a stream that has ended draws what it likes."""
        if progress is None:
            return None
        anything = torch.ones(self.model.config.vocab_size, dtype=torch.bool)
        return torch.stack(
            [anything if ended else one.allowed() for ended, one in zip(self.ended, progress, strict=True)]
        )

    def _draw(self, allowed: Tensor | None) -> Tensor:
        """`drawn`, made anew where it was played."""
        if self.drawn is not None:
            if allowed is not None and not bool(allowed.gather(1, self.drawn[:, None]).all()):
                raise UserError("the model has ended this piece: there is nothing to play on")
            return self.drawn
        noise = torch.stack([torch.rand((), generator=generator) for generator in self.generators])
        if self.unseen is None:
            prompt = torch.tensor([list(heard) for heard in self.tokens])
            self.drawn = draw(prefill(self.model, prompt, self.state), self.sampling, allowed, noise)
        else:
            if self._step is None:
                self._step = stepper(self.model, self.state, self.dtype)
            self.drawn = self._step.next(self.unseen, self.sampling, allowed, noise)
        return self.drawn


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
    dtype: str = "float32",
    memory_dtype: str = "auto",
) -> Iterator[int]:
    """Play on after `prompt`: token ids, one at a time, for ever or until the first length that is reached.

    prompt        token ids (T,), T ≥ 1, a piece's own beginning with BOS; with `state`, the tokens that it has not seen
    vocabulary    masks what the grammar forbids, and counts seconds and notes; without it every token may be drawn
    max_tokens    stops after exactly so many tokens
    seconds       stops before the piece would be further than so many seconds past its prompt
    notes         stops when so many notes are complete
    stop_at_end   lets the model end the piece: the stream ends where it draws EOS. Otherwise EOS is never drawn
    state         a batch-of-one state to play on from, updated in place; by default a new one
    dtype         of the weights: "float32" (the model's own), "bfloat16", "int8" or "auto"
    memory_dtype  of keys and values in a new state: "float32", "bfloat16", "int8" or "auto" (the model's own)

    Raises `ValueError` at once for arguments that cannot be served (`UserError` for an unknown dtype), and `UserError`
    from the stream if the model's logits are not finite; the tokens yielded until then are good. The model runs in
    evaluation mode meanwhile.
    """
    limits = check_limits(vocabulary, max_tokens, seconds, notes, stop_at_end)
    player = Player.begin(model, prompt, sampling, vocabulary, state=state, dtype=dtype, memory_dtype=memory_dtype)
    return _single(player.play(max_tokens, limits, stop_at_end))


def _single(playing: Iterator[list[int | None]]) -> Iterator[int]:
    for (token,) in playing:
        assert token is not None
        yield token


def check_limits(
    vocabulary: Vocabulary | None,
    max_tokens: int | None,
    seconds: float | None,
    notes: int | None,
    stop_at_end: bool = False,
) -> Limits:
    """The lengths in music; `ValueError` for a length that means nothing or that nobody could tell."""
    if vocabulary is None and (seconds is not None or notes is not None or stop_at_end):
        raise ValueError("seconds, notes and stop_at_end need a vocabulary, which knows time, notes and EOS")
    for name, value in (("max_tokens", max_tokens), ("seconds", seconds), ("notes", notes)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be 0 or more, got {value}")
    return Limits(seconds, notes)


def check_vocabulary(model: DSMRModel, vocabulary: Vocabulary | None) -> None:
    """`ValueError` unless the vocabulary has the model's number of tokens."""
    size = model.config.vocab_size
    if vocabulary is not None and vocabulary.size != size:
        raise ValueError(f"the model has {size} tokens and the vocabulary {vocabulary.size}: they belong to two runs")
