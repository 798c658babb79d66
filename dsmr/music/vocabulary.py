"""What every token means: all that training, evaluation, generation and augmentation need to know of a tokeniser.

A `Vocabulary` is a frozen, readable copy of a MidiTok tokeniser in plain Python and numpy: a machine without MidiTok
can train and measure with it, and `dsmr.music.tokenizer.rebuild` makes the very same tokeniser from it again.
It lies as `tokenizer.json` in every corpus and in every run directory.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.console.schema import Natural, check
from dsmr.music import grammar

FORMAT = 1
SHAPE = {"format": int, "scheme": str, "tokens": [str], "ticks_per_second": Natural, "tokenizer_params": dict}
"""What a `tokenizer.json` holds (see `dsmr.console.schema`)."""
TICK_TYPES = ("TimeShift", "Duration", "Position")
TIME_TYPES = ("TimeShift", "Bar", "Position")  # what moves time on
NOTE_TYPES = ("Pitch", "NoteOn")
PITCH_TYPES = ("Pitch", "NoteOn", "NoteOff")
BEATS_PER_BAR = 4
BEATS_PER_SECOND = 2  # every file is rewritten to 120 quarter notes a minute before it is tokenised


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one tokeniser, with their pitches, times and grammar.

    Args:
        scheme: name of the MidiTok class, such as "TSD", "MIDILike" or "REMI".
        tokens: the tokens as MidiTok writes them ("Pitch_60", "TimeShift_1.2.50"); a token's id is its index.
        ticks_per_second: the finest time step is the inverse of it (at 120 qpm).
        tokenizer_params: MidiTok's own parameters, enough to rebuild the tokeniser.
    """

    scheme: str
    tokens: tuple[str, ...]
    ticks_per_second: int
    tokenizer_params: dict[str, Any]

    def __post_init__(self) -> None:
        if self.tokens[:1] != ("PAD_None",) or "BOS_None" not in self.tokens or "EOS_None" not in self.tokens:
            raise ValueError(
                f"a vocabulary starts with PAD_None and holds BOS_None and EOS_None, got {self.tokens[:4]}"
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("a vocabulary names every token once")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    def __repr__(self) -> str:
        return f"Vocabulary({self.scheme}, {self.size} tokens, hash {self.hash[:16]})"

    @property
    def size(self) -> int:
        return len(self.tokens)

    @property
    def pad_id(self) -> int:
        return 0

    @cached_property
    def bos_id(self) -> int:
        return self.ids["BOS_None"]

    @cached_property
    def eos_id(self) -> int:
        return self.ids["EOS_None"]

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}

    @cached_property
    def hash(self) -> str:
        """Sha256 over everything that decides what the ids mean; corpora and runs that share it fit together."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    # What each id means, as arrays of length `size`.

    @cached_property
    def type_names(self) -> tuple[str, ...]:
        """The types in order of appearance: ("PAD", "BOS", "EOS", "Pitch", ...)."""
        return tuple(dict.fromkeys(token.split("_", 1)[0] for token in self.tokens))

    @cached_property
    def types(self) -> npt.NDArray[np.int64]:
        """For each id the index of its type in `type_names`."""
        index = {name: i for i, name in enumerate(self.type_names)}
        return np.array([index[token.split("_", 1)[0]] for token in self.tokens])

    def of_type(self, *names: str) -> npt.NDArray[np.bool_]:
        """A boolean per id: is it of one of these types?"""
        return np.isin(self.types, [i for i, name in enumerate(self.type_names) if name in names])

    @cached_property
    def is_note(self) -> npt.NDArray[np.bool_]:
        """Per id: does it begin a note? Each note has exactly one such token."""
        return self.of_type(*NOTE_TYPES)

    @cached_property
    def pitch(self) -> npt.NDArray[np.int64]:
        """Per id the MIDI pitch, or -1 where the token has none."""
        has_pitch = self.of_type(*PITCH_TYPES)
        return np.array([int(t.split("_", 1)[1]) if has_pitch[i] else -1 for i, t in enumerate(self.tokens)])

    @cached_property
    def ticks(self) -> npt.NDArray[np.int64]:
        """Per id its time in ticks: a shift, a duration, a position in the bar, the length of a bar; else 0."""
        return np.array([self._ticks_of(token) for token in self.tokens], dtype=np.int64)

    def _ticks_of(self, token: str) -> int:
        kind, value = token.split("_", 1)
        per_beat = self.ticks_per_second // BEATS_PER_SECOND
        if kind == "Bar":
            return BEATS_PER_BAR * per_beat
        if kind not in TICK_TYPES:
            return 0
        if kind == "Position":
            return int(value) * (per_beat // int(self.tokenizer_params["positions_per_beat"]))
        beats, position, resolution = map(int, value.split("."))
        return (beats * resolution + position) * per_beat // resolution

    # Grammar.

    def allowed_after(self, previous: int) -> npt.NDArray[np.bool_]:
        """Which tokens may follow `previous`: a boolean per id, never PAD nor BOS, EOS where a piece may end.

        Every sequence sampled under it decodes, each of its note tokens becoming one note (a note cut off before its
        last token excepted). What depends on more than one token back it cannot express; `Grammar` does: a NoteOff
        of a pitch that is not sounding (decoders ignore it), an EOS while notes sound (they get the longest duration),
        a pedal that is released twice (ignored), REMI positions that go back within their bar.
        """
        if not 0 <= previous < self.size:
            raise ValueError(f"token id must be in [0, {self.size}), got {previous}")
        return self._allowed[previous]

    @cached_property
    def _allowed(self) -> npt.NDArray[np.bool_]:
        mask = grammar.successor_matrix(self.type_names)[np.ix_(self.types, self.types)]
        mask.flags.writeable = False
        return mask

    def grammar(self) -> "grammar.Grammar":
        """A stateful grammar at the start of a piece: stricter than `allowed_after`, token by token."""
        return grammar.Grammar(self)

    # Time and notes.

    def clock(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Seconds of piece time at each token, itself included: time tokens advance it, durations do not.

        `tokens` is one piece (or its beginning); a BOS in the middle sets the clock back to zero.
        """
        return self.tick_clock(tokens) / self.ticks_per_second

    def tick_clock(self, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """`clock` in ticks."""
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size == 0:
            return np.zeros(0, dtype=np.int64)
        starts = ids == self.bos_id
        advance = np.where(self.of_type("TimeShift")[ids], self.ticks[ids], 0)
        if "Bar" in self.type_names:
            # The first bar of a piece begins at zero, each later one a bar after the one before it.
            bars = _since(np.cumsum(self.of_type("Bar")[ids]), starts)
            bar_ticks = np.maximum(bars - 1, 0) * self.ticks[self.ids["Bar_None"]]
            is_position = self.of_type("Position")[ids]
            resets = is_position | self.of_type("Bar")[ids] | starts
            last = np.maximum.accumulate(np.where(resets, np.arange(ids.size), 0))
            return bar_ticks + np.where(is_position[last], self.ticks[ids[last]], 0)
        return _since(np.cumsum(advance), starts)

    def count_notes(self, tokens: npt.ArrayLike) -> int:
        return int(self.is_note[np.asarray(tokens, dtype=np.int64)].sum())

    # Files.

    def _content(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "scheme": self.scheme,
            "ticks_per_second": self.ticks_per_second,
            "tokenizer_params": self.tokenizer_params,
            "tokens": list(self.tokens),
        }

    def to_json(self) -> dict[str, Any]:
        return {**self._content(), "hash": self.hash}

    @classmethod
    def from_json(cls, value: Any) -> "Vocabulary":
        """The inverse of `to_json`; `UserError` if `value` is something else, or was changed since."""
        try:
            check(value, SHAPE, "the vocabulary")
            if value["format"] != FORMAT:
                raise UserError(f"this vocabulary has format {value['format']}, this version of dsmr reads {FORMAT}")
            found = cls(
                value["scheme"],
                tuple(value["tokens"]),
                int(value["ticks_per_second"]),
                dict(value["tokenizer_params"]),
            )
            _ = found.types, found.pitch, found.ticks  # what its tokens mean can be told
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"this is not a dsmr vocabulary: {type(error).__name__} {error}") from error
        if value.get("hash") != found.hash:
            raise UserError(f"the vocabulary was changed: its hash is {found.hash[:16]}, not the stated one")
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        """Read a `tokenizer.json`; `UserError` naming the file if it is missing or not a vocabulary."""
        value = read_json(path)
        try:
            return cls.from_json(value)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def from_miditok(cls, tokenizer: Any) -> "Vocabulary":
        """The vocabulary of an untrained (no byte pairs), single-stream MidiTok tokeniser without programs."""
        vocab = tokenizer.vocab
        if not isinstance(vocab, dict) or tokenizer.is_trained:
            raise ValueError(f"{type(tokenizer).__name__} has several vocabularies or byte pairs: not supported")
        config = tokenizer.config.to_dict(serialize=True)
        # Library versions would change the hash of a vocabulary whose tokens mean the same.
        params = {
            "tokenization": type(tokenizer).__name__,
            "positions_per_beat": tokenizer.config.max_num_pos_per_beat,
            "config": json.loads(json.dumps(config)),
        }
        tokens = tuple(sorted(vocab, key=vocab.__getitem__))
        return cls(type(tokenizer).__name__, tokens, tokenizer.time_division * BEATS_PER_SECOND, params)


class StreamClock:
    """`Vocabulary.clock` for a stream that arrives token by token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ticks = vocabulary.ticks
        self._rate = vocabulary.ticks_per_second
        self._kind = [vocabulary.type_names[i] for i in vocabulary.types]
        self.reset()

    def reset(self) -> None:
        """Back to the start of a piece."""
        self.ticks = 0
        self._bar = -1  # tick at which the current bar began; -1 before the first

    @property
    def seconds(self) -> float:
        return self.ticks / self._rate

    def push(self, token: int) -> float:
        """Take the next token; returns the seconds of piece time reached, this token included."""
        kind = self._kind[token]
        if kind == "TimeShift":
            self.ticks += int(self._ticks[token])
        elif kind == "Bar":
            self._bar = 0 if self._bar < 0 else self._bar + int(self._ticks[token])
            self.ticks = self._bar
        elif kind == "Position":
            self._bar = max(self._bar, 0)
            self.ticks = self._bar + int(self._ticks[token])
        elif kind == "BOS":
            self.reset()
        return self.seconds

    def extend(self, tokens: Iterable[int]) -> float:
        """Push several tokens; returns the seconds reached."""
        for token in tokens:
            self.push(token)
        return self.seconds


def _since(total: npt.NDArray[np.int64], starts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """A running total counted from the last start on (totals never decrease)."""
    return total - np.maximum.accumulate(np.where(starts, total, 0))
