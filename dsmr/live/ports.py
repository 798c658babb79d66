"""MIDI ports, by mido: their names, one to send to, and what is played on one as a prompt.

mido and its driver (python-rtmidi) are the extra `play`; they are imported only here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.music.sounding import OFF, ON, Event
from dsmr.music.tokenizer import encode_score, rebuild
from dsmr.music.vocabulary import Vocabulary

VIRTUAL = "dsmr"
TICKS_A_SECOND = 1000


def _mido() -> Any:
    try:
        import mido
    except ImportError as error:
        raise _not_installed(error) from error
    return mido


def _not_installed(error: ImportError) -> UserError:
    return UserError(f"playing needs mido and python-rtmidi, pip install 'dsmr[play]': {error}")


def port_names() -> tuple[list[str], list[str]]:
    """The names of the ports that can be sent to and of those that can be listened to."""
    mido = _mido()
    try:
        return list(mido.get_output_names()), list(mido.get_input_names())
    except ImportError as error:  # mido takes in its driver when it is asked for a port
        raise _not_installed(error) from error
    except Exception as error:  # drivers raise what they like
        raise UserError(f"there are no MIDI ports to be had here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _choose(kind: str, names: list[str], wanted: str | None) -> str:
    """The port that `wanted` names, wholly or in part; the first one if nothing is wanted."""
    if not names:
        raise UserError(f"there is no MIDI {kind} port: start a synthesiser, or open one of our own with --virtual")
    found = [name for name in names if wanted is None or name == wanted] or [n for n in names if str(wanted) in n]
    if not found:
        raise UserError(f"there is no MIDI {kind} port called '{wanted}': there are {', '.join(map(repr, names))}")
    return found[0]


class OutputPort:
    """A MIDI port to send to: the first one, the one named, or with `virtual` a new one that others may connect to."""

    def __init__(self, name: str | None = None, virtual: bool = False) -> None:
        self._mido = _mido()
        self.name = (name or VIRTUAL) if virtual else _choose("output", port_names()[0], name)
        try:
            self._port = self._mido.open_output(self.name, **({"virtual": True} if virtual else {}))
        except ImportError as error:  # --virtual, which asks for no port's name before
            raise _not_installed(error) from error
        except Exception as error:
            raise UserError(f"the MIDI port '{self.name}' cannot be opened: {_reason(error)}") from error

    def send(self, event: Event) -> None:
        """Send at once; `UserError` if the port is closed or gone."""
        if event.kind in (ON, OFF):
            kind = "note_on" if event.kind == ON else "note_off"
            message = self._mido.Message(kind, note=event.pitch, velocity=event.velocity)
        else:
            message = self._mido.Message("control_change", control=event.pitch, value=event.velocity)
        try:
            self._port.send(message)
        except Exception as error:
            raise UserError(f"the MIDI port '{self.name}' took no more notes: {_reason(error)}") from error

    def close(self) -> None:
        self._port.close()


def listen(
    name: str | None,
    seconds: float,
    *,
    pause: float = 2.0,
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[float, float, int, int]]:
    """What is played on an input port: (onset, duration, pitch, velocity) of each note, seconds from the first one on.

    Ends `seconds` after it began, whether or not anything was played, or when nothing has sounded for `pause` seconds
    after the first note. `UserError` if there is no such port or nothing was played.
    """
    mido = _mido()
    chosen = _choose("input", port_names()[1], name)
    try:
        port = mido.open_input(chosen)
    except Exception as error:
        raise UserError(f"the MIDI port '{chosen}' cannot be opened: {_reason(error)}") from error
    notes: list[tuple[float, float, int, int]] = []
    held: dict[int, tuple[float, int]] = {}
    first = last = None
    began = clock()
    try:
        while not stopped():
            now = clock()
            if now - began >= seconds or (last is not None and not held and now - last >= pause):
                break
            for message in port.iter_pending():
                if message.type not in ("note_on", "note_off"):
                    continue
                first = last = now if first is None else first
                last = now
                if message.note in held:
                    onset, velocity = held.pop(message.note)
                    notes.append((onset, now - first - onset, message.note, velocity))
                if message.type == "note_on" and message.velocity > 0:
                    held[message.note] = (now - first, message.velocity)
            time.sleep(0.001)
    finally:
        port.close()
    end = clock()
    notes += [(onset, end - (first or end) - onset, pitch, velocity) for pitch, (onset, velocity) in held.items()]
    if not notes:
        raise UserError(f"nothing was played on the MIDI port '{chosen}' in {end - began:.0f} s")
    return sorted(notes)


def prompt_of(notes: list[tuple[float, float, int, int]], vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of notes that were listened to, BOS first."""
    import symusic

    score: Any = symusic.Score(TICKS_A_SECOND // 2)  # at 120 quarter notes a minute
    track: Any = symusic.Track(program=0, is_drum=False, name="Piano")
    for onset, duration, pitch, velocity in notes:
        time_and_length = (round(onset * TICKS_A_SECOND), max(1, round(duration * TICKS_A_SECOND)))
        track.notes.append(symusic.Note(*time_and_length, pitch, velocity))
    score.tracks.append(track)
    try:
        tokens, _ = encode_score(score, rebuild(vocabulary))
    except ValueError as error:
        raise UserError(f"what was played cannot be a prompt: {error}") from error
    return np.concatenate([[vocabulary.bos_id], np.asarray(tokens, dtype=np.int64)])
