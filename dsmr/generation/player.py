"""Play on from the recurrent state: one stream or several side by side, for ever if asked, in bounded memory.

A `Player` feeds the prompt in whole segments and then one token at a time; the model's state is the only thing that
grows with nothing, so memory stays at the schedule's budget however long it plays. With a vocabulary, successors that
the token grammar forbids are never drawn, so every sample decodes to music. `dsmr.generation.engines` turns a token
into the next, of a model in PyTorch or of an exported one, for which nothing here imports PyTorch;
`dsmr.generation.saved_stream` keeps a player in a file, to play on another day exactly as it would have today.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.doors import door
from dsmr.generation.drawing import Noise, Sampling
from dsmr.generation.engines import engine_of, new_state, vocab_size
from dsmr.generation.heard import Heard
from dsmr.music.progress import Limits, Progress, may_stop
from dsmr.music.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dsmr.generation.engines import Model, State

    Prompt = Sequence[int] | np.ndarray | Tensor

__all__ = ["Limits", "Player", "Progress", "Sampling", "may_stop", "stream"]

# What works on tensors, and so needs PyTorch, is taken in when it is asked for.
__getattr__ = door(
    __name__,
    {
        "prefill": "dsmr.generation.stepping.engine",
        "probabilities": "dsmr.generation.sampling",
        "sample": "dsmr.generation.sampling",
    },
)


class Player:
    """Streams that play on side by side, from one prompt or from a saved state.

    Made by `begin` or by `saved_stream.load_player`. `play` yields the tokens; between two of them a player may be
    saved, or played on under other limits.

    Attributes:
        state: of all streams, updated in place; it has seen all tokens but those in `unseen`.
        tokens: for each stream all tokens of its piece so far, the prompt's first.
        unseen: the newest token of each stream (B,), played but not yet shown to the model; None if there is none.
        drawn: the next token of each stream (B,), drawn but not yet played; None if `unseen` must be shown first.
        generators: of each stream's random numbers.
    """

    def __init__(
        self,
        model: Model,
        state: State,
        tokens: Sequence[Iterable[int]],
        sampling: Sampling,
        vocabulary: Vocabulary | None = None,
        *,
        generators: Sequence[Noise | Generator] | None = None,
        dtype: str = "float32",
    ) -> None:
        check_vocabulary(model, vocabulary)
        if state.batch != len(tokens):
            raise ValueError(f"the state holds {state.batch} streams, but {len(tokens)} are to be played")
        self.model, self.state, self.sampling, self.vocabulary = model, state, sampling, vocabulary
        self.tokens = [Heard(heard) for heard in tokens]
        given = generators or [sampling.noise(row) for row in range(len(tokens))]
        self.generators = [one if isinstance(one, Noise) else Noise.of_state(one.get_state().numpy()) for one in given]
        self.engine = engine_of(model, state, dtype)
        self.dtype = self.engine.dtype
        self.unseen: npt.NDArray[np.int64] | None = None
        self.drawn: npt.NDArray[np.int64] | None = None
        self.on_one_instant = [0] * len(tokens)
        self.ended = [False] * len(tokens)

    @classmethod
    def begin(
        cls,
        model: Model,
        prompt: Prompt,
        sampling: Sampling | None = None,
        vocabulary: Vocabulary | None = None,
        *,
        variations: int = 1,
        state: State | None = None,
        dtype: str = "float32",
        memory_dtype: str = "auto",
    ) -> Player:
        """A player that has heard nothing yet: `play` shows it the prompt (T,) first.

        Args:
            model: in PyTorch, or an exported one, whose weights and memory are what it was exported with.
            variations: streams that play on from the same prompt; stream i draws as one of seed + i alone.
            state: to play on from, updated in place; the prompt is then what it has not seen.
            dtype: of the weights: "float32" (the model's own), "bfloat16", "int8" or "auto", see `stepping`.
            memory_dtype: of keys and values: "float32", "bfloat16", "int8" or "auto" (the model's own).
        """
        on_host: Any = prompt.cpu() if hasattr(prompt, "cpu") else prompt
        tokens = np.asarray(on_host, dtype=np.int64).reshape(-1)
        size = vocab_size(model)
        if len(tokens) == 0:
            raise ValueError("prompt must hold at least one token (a piece begins with BOS)")
        if int(tokens.min()) < 0 or int(tokens.max()) >= size:
            raise ValueError(
                f"prompt must hold token ids from 0 to {size - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )
        if variations < 1:
            raise ValueError(f"variations must be at least 1, got {variations}")
        heard = [tokens.tolist() for _ in range(variations)]
        if state is None:
            state = new_state(model, variations, memory_dtype)
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
        with self.engine.playing():
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

    def _progress(self, limits: Limits, stop_at_end: bool) -> list[Progress] | None:
        if self.vocabulary is None:
            return None
        progress = [Progress(self.vocabulary, heard, limits, stop_at_end) for heard in self.tokens]
        for one, count in zip(progress, self.on_one_instant, strict=True):
            one.on_one_instant = count
        return progress

    def _allowed(self, progress: list[Progress] | None) -> npt.NDArray[np.bool_] | None:
        """(B, V): what each stream may draw; a stream that has ended draws what it likes."""
        if progress is None:
            return None
        anything = np.ones(vocab_size(self.model), dtype=np.bool_)
        return np.stack([anything if ended else one.allowed() for ended, one in zip(self.ended, progress, strict=True)])

    def _draw(self, allowed: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        """`drawn`, made anew where it was played."""
        if self.drawn is not None:
            if allowed is not None and not np.take_along_axis(allowed, self.drawn[:, None], 1).all():
                raise UserError("the model has ended this piece: there is nothing to play on")
            return self.drawn
        noise = np.array([generator.draw() for generator in self.generators], dtype=np.float32)
        if self.unseen is None:
            prompts = np.stack([np.array(heard, dtype=np.int64) for heard in self.tokens])
            self.drawn = self.engine.first(prompts, self.sampling, allowed, noise)
        else:
            self.drawn = self.engine.next(self.unseen, self.sampling, allowed, noise)
        return self.drawn


def stream(
    model: Model,
    prompt: Prompt,
    sampling: Sampling | None = None,
    vocabulary: Vocabulary | None = None,
    *,
    max_tokens: int | None = None,
    seconds: float | None = None,
    notes: int | None = None,
    stop_at_end: bool = False,
    state: State | None = None,
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


def check_vocabulary(model: Model, vocabulary: Vocabulary | None) -> None:
    """`ValueError` unless the vocabulary has the model's number of tokens."""
    size = vocab_size(model)
    if vocabulary is not None and vocabulary.size != size:
        raise ValueError(f"the model has {size} tokens and the vocabulary {vocabulary.size}: they belong to two runs")
