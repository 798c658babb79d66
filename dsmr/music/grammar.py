"""Which token may follow which: the grammar that keeps every generated sequence decodable.

Two answers to the same question. `successor_matrix` looks one token back, so that it is a fixed table of types.
`Grammar` follows a stream and knows which notes sound and where in the bar it stands, so that it is exact.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

EVENTS = ("Pedal", "PedalOff", "Pitch", "NoteOn")  # what may begin at a moment, in the order in which it is written


def _successors(types: frozenset[str]) -> dict[str, set[str]]:
    """For each type the types that may follow it, for TSD, MIDILike and REMI, with or without pedals."""
    time = {"TimeShift", "Bar", "Position"} & types
    moment = set(EVENTS) & types
    ends = {"EOS"}
    after_note = {"Pitch", "NoteOn", "TimeShift", "Bar", "Position"} & types
    table: dict[str, set[str]] = {
        "Pitch": {"Velocity"},
        "NoteOn": {"Velocity"},
        "Velocity": {"Duration"} if "Pitch" in types else after_note,
        "Duration": after_note | ends,
        # Offs are written before anything else at a moment, so no note ends in the tick in which it began.
        "NoteOff": {"NoteOff"} | moment | time | ends,
        "TimeShift": moment | ({"NoteOff"} & types) | {"TimeShift"},
        "Pedal": moment | time | ends,
        "PedalOff": moment | time | ends,
        "Bar": {"Bar", "Position"},
        "Position": moment,
        # A REMI piece begins with its first bar; elsewhere it may begin at once or after a pause.
        "BOS": {"Bar"} if "Bar" in types else moment | time,
        "PAD": set(),
        "EOS": set(),
    }
    return {kind: after & types for kind, after in table.items() if kind in types}


def successor_matrix(type_names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
    """A boolean for each pair of types: may the second follow the first? `ValueError` for a type without a rule."""
    table = _successors(frozenset(type_names))
    unknown = [name for name in type_names if name not in table]
    if unknown:
        raise ValueError(f"no grammar is known for tokens of type {', '.join(unknown)}")
    return np.array([[after in table[name] for after in type_names] for name in type_names])


class Words(Protocol):
    """What a grammar needs to know of a vocabulary (`dsmr.music.vocabulary.Vocabulary`, which knows its grammar)."""

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def type_names(self) -> tuple[str, ...]: ...

    @property
    def types(self) -> npt.NDArray[np.int64]: ...

    @property
    def pitch(self) -> npt.NDArray[np.int64]: ...

    @property
    def ticks(self) -> npt.NDArray[np.int64]: ...

    def of_type(self, *names: str) -> npt.NDArray[np.bool_]: ...

    def allowed_after(self, previous: int) -> npt.NDArray[np.bool_]: ...


class Grammar:
    """The exact grammar of one piece, followed token by token.

    Beyond `Vocabulary.allowed_after` it lets a note end only where one sounds and a piece only when all notes have
    ended (MIDILike), a pedal rise only after it was pressed, and REMI's positions only move forward. `allowed()` is
    never empty before EOS, and every piece that `encode_score` makes keeps to it.
    """

    def __init__(self, vocabulary: Words) -> None:
        self._vocabulary = vocabulary
        self._kind = [vocabulary.type_names[i] for i in vocabulary.types]
        self._masks = {name: vocabulary.of_type(name) for name in ("NoteOff", "Position", "Pedal", "PedalOff")}
        self._explicit_offs = bool(self._masks["NoteOff"].any())
        self.reset()

    def reset(self) -> None:
        """Back to before the first token (which is BOS)."""
        self.previous = self._vocabulary.bos_id
        self.sounding: Counter[int] = Counter()
        self._pedal_down = False
        self._position = -1

    def push(self, token: int) -> None:
        """Take the next token, whether or not it was allowed (a prompt may be sloppy)."""
        kind, value = self._kind[token], int(self._vocabulary.pitch[token])
        if kind == "BOS":
            self.reset()
        elif kind == "NoteOn" and self._explicit_offs:
            self.sounding[value] += 1
        elif kind == "NoteOff":
            self.sounding[value] -= 1
            if self.sounding[value] <= 0:
                del self.sounding[value]
        elif kind in ("Pedal", "PedalOff"):
            self._pedal_down = kind == "Pedal"
        elif kind == "Bar":
            self._position = -1
        elif kind == "Position":
            self._position = int(self._vocabulary.ticks[token])
        self.previous = token

    def extend(self, tokens: Iterable[int]) -> None:
        """Push several tokens."""
        for token in tokens:
            self.push(token)

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come now: a new boolean array, one entry per id."""
        words = self._vocabulary
        mask = words.allowed_after(self.previous).copy()
        if self._explicit_offs:
            sounds = np.isin(words.pitch, list(self.sounding))
            mask &= ~self._masks["NoteOff"] | sounds
            mask[words.eos_id] &= not self.sounding
        if self._masks["Position"].any():
            mask &= ~self._masks["Position"] | (words.ticks > self._position)
        mask &= ~self._masks["PedalOff"] if not self._pedal_down else ~self._masks["Pedal"]
        return mask
