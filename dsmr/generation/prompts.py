"""The prompt: the first seconds of a MIDI file as tokens, and what of the file they do not tell."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.shown import shown
from dsmr.music.progress import may_stop
from dsmr.music.tokenizer import ScoreReport, encode_midi
from dsmr.music.vocabulary import StreamClock, Vocabulary

TOLD_APART = 0.01  # seconds: the step of the tokens' grid


@dataclass(frozen=True)
class FilePrompt:
    """The beginning of a MIDI file, for a model."""

    tokens: np.ndarray  # (T,), BOS first
    seconds: float  # where they end, and so where the continuation begins
    asked: float | None  # where it was asked to begin; None = wherever the tokens of the whole file end
    report: ScoreReport  # what became of the whole file's notes

    def notices(self, name: str | os.PathLike[str]) -> list[str]:
        """What whoever gave the file `name` should know, a sentence each."""
        lines = self.report.lines()
        if self.asked is not None and self.asked - self.seconds >= TOLD_APART:
            lines.append(
                f"the continuation begins at {self.seconds:.2f} s, not at {self.asked:g} s, as this model's tokens "
                "name no moment between two bars without a note."
            )
        return [f"{shown(os.fspath(name))}: {line}" for line in lines]


def read_prompt(
    prompt_midi: str | os.PathLike[str], vocabulary: Vocabulary, prompt_seconds: float | None
) -> FilePrompt:
    """The first `prompt_seconds` of a MIDI file, all of it by default; errors as of `cut_prompt`."""
    encoded, report = encode_midi(prompt_midi, vocabulary)
    piece = np.concatenate([[vocabulary.bos_id], np.asarray(encoded, dtype=np.int64)])
    tokens = cut_prompt(piece, vocabulary, prompt_seconds, report.seconds, prompt_midi)
    ends = float(vocabulary.clock(tokens)[-1])
    return FilePrompt(tokens, ends, prompt_seconds, report)


def cut_prompt(
    piece: np.ndarray,
    vocabulary: Vocabulary,
    prompt_seconds: float | None,
    piece_seconds: float,
    name: str | os.PathLike[str],
) -> np.ndarray:
    """The tokens of the first `prompt_seconds` of `piece` (which begins with BOS), whole notes only, and of the rest
    behind them (see `wait_until`).

    Raises `UserError` for a piece that is shorter than asked for, and for a prompt without a note.
    """
    prompt = piece
    if prompt_seconds is not None:
        if piece_seconds < prompt_seconds:
            raise UserError(
                f"{name} is {piece_seconds:.1f} s long, shorter than the prompt of {prompt_seconds:g} s asked for"
            )
        onsets = np.asarray(vocabulary.clock(piece))
        late = np.flatnonzero(onsets >= prompt_seconds)
        prompt = piece if not len(late) else piece[: late[0]]
    prompt = np.concatenate([prompt[:1], whole_notes(prompt[1:], vocabulary)])
    if vocabulary.count_notes(prompt) == 0:
        first = "it" if prompt_seconds is None else f"its first {prompt_seconds:g} s"
        raise UserError(f"{name} cannot be a prompt: {first} has no note")
    return prompt if prompt_seconds is None else wait_until(prompt, vocabulary, prompt_seconds)


def whole_notes(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """`tokens` without a note that is unfinished at their end."""
    length = len(tokens)
    while length and not may_stop(vocabulary, int(tokens[length - 1])):
        length -= 1
    return tokens[:length]


def wait_until(prompt: np.ndarray, vocabulary: Vocabulary, seconds: float) -> np.ndarray:
    """`prompt` and a rest to `seconds` of the piece, or to the last moment before it that tokens can tell.

    The rest is written as a tokeniser writes it, the longest shifts first. REMI has none: its positions must be
    followed by a note, so the rest is of whole bars.
    """
    clock, grammar = StreamClock(vocabulary), vocabulary.grammar()
    clock.extend(prompt.tolist())
    grammar.extend(prompt.tolist())
    until = math.floor(seconds * vocabulary.ticks_per_second + 1e-6)
    rests = np.flatnonzero(vocabulary.of_type("TimeShift", "Bar")).tolist()
    rest: list[int] = []
    for token in sorted(rests, key=lambda token: -int(vocabulary.ticks[token])):
        while grammar.allowed()[token]:
            later = copy.copy(clock)
            later.push(token)
            if not clock.ticks < later.ticks <= until:
                break
            clock = later
            grammar.push(token)
            rest.append(token)
    return np.concatenate([prompt, np.array(rest, dtype=prompt.dtype)])
