"""What sounds when: tokens into MIDI events, one token at a time, as a stream of music is made.

`dsmr.music.tokenizer.decode` says the same of a finished piece, by way of MidiTok; here nothing is needed but the
vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dsmr.music.vocabulary import StreamClock, Vocabulary

OFF, PEDAL, ON = 0, 1, 2  # of one moment, ends come first
SUSTAIN = 64  # the controller of the sustain pedal


@dataclass(frozen=True, order=True)
class Event:
    """A note begins (ON) or ends (OFF), or the pedal moves (PEDAL), `at` seconds of the piece.

    `velocity` is the pedal's position for PEDAL. `seconds` is how long a note will sound, where that is known.
    """

    at: float
    kind: int
    pitch: int = 0
    velocity: int = 0
    seconds: float | None = field(default=None, compare=False)


class Sounding:
    """Turns a piece's tokens into events, from its first token (BOS) on."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.clock = StreamClock(vocabulary)
        self.open: Counter[int] = Counter()  # notes that only a NoteOff will end
        self._vocabulary = vocabulary
        self._kind = [vocabulary.type_names[i] for i in vocabulary.types]
        self._pitch, self._velocity, self._onset = 0, 0, 0.0

    def push(self, token: int) -> list[Event]:
        """The events that `token` settles. Ends of notes may lie ahead of events that come later."""
        now, kind = self.clock.push(token), self._kind[token]
        if kind in ("Pitch", "NoteOn"):
            self._pitch, self._onset = int(self._vocabulary.pitch[token]), now
        elif kind == "Velocity":
            self._velocity = int(self._vocabulary.tokens[token].split("_", 1)[1])
            if "NoteOff" in self._vocabulary.type_names:
                self.open[self._pitch] += 1
                return [Event(now, ON, self._pitch, self._velocity)]
        elif kind == "Duration":
            lasts = int(self._vocabulary.ticks[token]) / self._vocabulary.ticks_per_second
            return [
                Event(self._onset, ON, self._pitch, self._velocity, lasts),
                Event(self._onset + lasts, OFF, self._pitch),
            ]
        elif kind == "NoteOff":
            pitch = int(self._vocabulary.pitch[token])
            if self.open[pitch]:
                self.open[pitch] -= 1
                return [Event(now, OFF, pitch)]
        elif kind in ("Pedal", "PedalOff"):
            return [Event(now, PEDAL, SUSTAIN, 127 if kind == "Pedal" else 0)]
        return []

    def release(self, at: float) -> list[Event]:
        """The ends of the notes that no token has ended."""
        ends = [Event(at, OFF, pitch) for pitch, count in sorted(self.open.items()) for _ in range(count)]
        self.open.clear()
        return ends
