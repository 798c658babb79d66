"""What may come next in a stream of music, how far it has come, and where it may stop."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.music.vocabulary import TIME_TYPES, StreamClock, Vocabulary

# A model that never moves on in time would play one endless chord, and a length in seconds would never be reached:
# after this many tokens on one instant the only tokens drawn are those that move time, where the grammar has them.
TOKENS_ON_ONE_INSTANT = 512


@dataclass(frozen=True)
class Limits:
    """How long to play, counted in music; None is no limit."""

    seconds: float | None = None
    notes: int | None = None


class Progress:
    """What may come next, how far the stream has come in seconds and notes, and where it may stop."""

    def __init__(self, vocabulary: Vocabulary, heard: Iterable[int], limits: Limits, stop_at_end: bool) -> None:
        self.vocabulary = vocabulary
        self.limits = limits
        self.stop_at_end = stop_at_end
        self.clock = StreamClock(vocabulary)
        self.grammar = vocabulary.grammar()
        for token in heard:
            self.clock.push(token)
            self.grammar.push(token)
        self.began = self.now = self.clock.seconds
        self.notes = 0
        self.on_one_instant = 0
        self._moves_time = vocabulary.of_type(*TIME_TYPES)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """(V,) bool: the tokens that may come next."""
        allowed = self.grammar.allowed()
        if not self.stop_at_end:
            allowed[self.vocabulary.eos_id] = False
        if self.on_one_instant >= TOKENS_ON_ONE_INSTANT and (allowed & self._moves_time).any():
            allowed &= self._moves_time
        if not allowed.any():
            raise UserError(f"nothing may follow {self.vocabulary.tokens[self.grammar.previous]} in this vocabulary")
        return allowed

    def reached(self) -> bool:
        """Whether the asked notes are complete, or no second is left."""
        full = self.limits.notes is not None and self.notes >= self.limits.notes
        return (full or self._late(self.now)) and may_stop(self.vocabulary, self.grammar.previous)

    def ends(self, token: int) -> bool:
        """Whether the stream ends before `token`, drawn next (EOS, or time past the asked length); else count it."""
        if self.stop_at_end and token == self.vocabulary.eos_id:
            return True
        clock = copy.copy(self.clock)
        now = clock.push(token)
        if self._late(now):
            return True  # time never passes within a note's tokens, so none is broken here
        self.clock = clock
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
