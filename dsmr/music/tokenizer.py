"""Between MIDI files and token ids, by way of MidiTok: reading, encoding, decoding, with nothing lost in silence.

Four tokenisers are offered, all on a grid of 10 ms with 32 velocities. Every file is first rewritten to 120 quarter
notes a minute with the seconds of its notes kept, because MidiTok without tempo tokens ignores the tempo map and would
get every duration wrong. MidiTok and symusic are imported only inside the functions that need them.
"""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path
from dsmr.music.midi_file import MidiFile, read_file, require
from dsmr.music.vocabulary import BEATS_PER_SECOND, Vocabulary

QUARTERS_PER_MINUTE = 60 * BEATS_PER_SECOND
FINE_TICKS_PER_QUARTER = 5000  # 0.1 ms at 120 qpm, so that rounding to the tokeniser's 10 ms happens once
LONGEST_PIECE = 24 * 3600  # seconds; a damaged file may claim years
LOWEST, HIGHEST = 21, 108  # the keys of a piano
SCHEMES = {"tsd": "TSD", "midilike": "MIDILike", "remi": "REMI", "tsd_pedal": "TSD"}


@dataclass(frozen=True)
class ScoreReport:
    """What became of one score: what it held, and what the tokens hold of it.

    The numbers add up: of `n_begun` note-ons (of a file, counted in its bytes) `n_notes` are in the tokens, and the
    others are in `dropped`.
    """

    n_notes: int  # notes of the score that are in the tokens
    seconds: float  # until the last note ends
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of notes that are not in the tokens
    changed: dict[str, int] = field(default_factory=dict)  # what tokenisation altered -> number of notes
    n_begun: int = 0
    n_pedals: int = 0  # times that the pedal is held and the tokens say nothing of it

    def lines(self) -> list[str]:
        """What is not in the tokens as it was, a sentence each."""
        lines = [f"{count:,} notes left out: {why}." for why, count in self.dropped.items()]
        lines += [f"{count:,} notes changed: {what}." for what, count in self.changed.items()]
        return lines + ([pedals_left_out(self.n_pedals)] if self.n_pedals else [])


def pedals_left_out(count: int) -> str:
    """The sentence that says so."""
    return f"{count:,} pedals left out: the tokeniser has none (tsd_pedal does)."


class EmptyScoreError(ValueError):
    """A score without a single note that a piano model can read."""


def build_tokenizer(name: str = "tsd") -> Any:
    """A fresh MidiTok tokeniser: "tsd" (the default), "midilike", "remi" or "tsd_pedal"."""
    if name not in SCHEMES:
        raise UserError(f"unknown tokeniser {name!r}: choose one of {', '.join(SCHEMES)}")
    miditok = require("miditok")
    # MIDILike would lose notes that generation leaves open; with this they end after 60 beats, which is 30 s.
    extra = {"max_duration": [60, 0, 10]} if name == "midilike" else {}
    config = miditok.TokenizerConfig(
        pitch_range=(LOWEST, HIGHEST),
        beat_res={(0, 2): 50, (2, 20): 10},
        num_velocities=32,
        special_tokens=["PAD", "BOS", "EOS"],
        use_tempos=False,
        use_time_signatures=False,
        use_programs=False,
        programs=[0],
        use_note_duration_programs=[0],
        use_pitchdrum_tokens=False,
        use_sustain_pedals=name == "tsd_pedal",
        sustain_pedal_duration=False,
        remove_duplicated_notes=False,
        **extra,
    )
    return getattr(miditok, SCHEMES[name])(config)


@lru_cache
def vocabulary_of(name: str = "tsd") -> Vocabulary:
    """The vocabulary of `build_tokenizer(name)`."""
    return Vocabulary.from_miditok(build_tokenizer(name))


@lru_cache(maxsize=8)
def rebuild(vocabulary: Vocabulary) -> Any:
    """The MidiTok tokeniser that `vocabulary` was made of; no network, no other file than the vocabulary.

    Raises `UserError` if the installed MidiTok makes other tokens from the same parameters.
    """
    miditok = require("miditok")
    params = vocabulary.tokenizer_params
    kind = getattr(miditok, str(params.get("tokenization")), None)
    if kind is None:
        raise UserError(f"the installed MidiTok has no tokeniser {params.get('tokenization')!r}")
    with tempfile.TemporaryDirectory() as folder:
        # A file that exists, given as `params`: by any other way MidiTok may ask the network first, with retries.
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps({"tokenization": params["tokenization"], "config": params["config"]}))
        tokenizer = kind(params=path)
    if Vocabulary.from_miditok(tokenizer) != vocabulary:
        raise UserError(
            f"MidiTok {importlib.metadata.version('miditok')} makes other tokens than the "
            f"version that this vocabulary (hash {vocabulary.hash[:16]}) comes from; install miditok 3.1.0"
        )
    return tokenizer


def load_midi(path: str | os.PathLike[str]) -> Any:
    """A MIDI file as it is (see `dsmr.music.midi_file`); `UserError` naming the file and the reason if it cannot be."""
    return read_file(path).score


def read_midi(path: str | os.PathLike[str]) -> Any:
    """A MIDI file as one piano track at 120 qpm, all notes and pedals at their seconds; drum tracks are left out."""
    return rewrite(load_midi(path))[0]


def rewrite(score: Any, ticks_per_quarter: int = FINE_TICKS_PER_QUARTER) -> tuple[Any, dict[str, int]]:
    """`score` as one piano track at 120 qpm with its seconds kept, and the number of notes left out, by reason.

    Notes are sorted by their (rounded) onset, then pitch: the order in which the notes of one moment are written must
    not depend on less than a tick. Durations are at least one tick.
    """
    symusic = require("symusic")
    rate = ticks_per_quarter * BEATS_PER_SECOND
    seconds_at = _tempo_map(score)
    notes: list[npt.NDArray[np.int64]] = []  # per track (4, n): onset, duration, pitch, velocity
    pedals: list[npt.NDArray[np.int64]] = []
    dropped: dict[str, int] = {}
    for track in score.tracks:
        if track.is_drum:
            if len(track.notes):
                dropped["on a drum track"] = dropped.get("on a drum track", 0) + len(track.notes)
            continue
        for events, found in ((track.notes, notes), (track.pedals, pedals)):
            if len(events) == 0:
                continue
            columns = events.numpy()
            start = seconds_at(columns["time"])
            end = seconds_at(columns["time"].astype(np.int64) + columns["duration"])
            if end.max() > LONGEST_PIECE:
                raise ValueError(f"it lasts {end.max() / 3600:.1f} hours, more than {LONGEST_PIECE // 3600}")
            onset = np.rint(start * rate).astype(np.int64)
            length = np.maximum(np.rint((end - start) * rate).astype(np.int64), 1)
            rest = [columns[key].astype(np.int64) for key in ("pitch", "velocity") if key in columns]
            found.append(np.stack([onset, length, *rest]))
    out = symusic.Score(ticks_per_quarter)
    out.tempos.append(symusic.Tempo(0, QUARTERS_PER_MINUTE))
    piano = symusic.Track(program=0, is_drum=False, name="Piano")
    if notes:
        table = np.concatenate(notes, axis=1)
        onset, length, pitch, velocity = table[:, np.lexsort((table[3], table[1], table[2], table[0]))]
        piano.notes = symusic.Note.from_numpy(
            time=onset.astype(np.int32),
            duration=length.astype(np.int32),
            pitch=pitch.astype(np.int8),
            velocity=velocity.astype(np.int8),
        )
    if pedals:
        table = np.concatenate(pedals, axis=1)
        onset, length = table[:, np.lexsort((table[1], table[0]))]
        piano.pedals = symusic.Pedal.from_numpy(time=onset.astype(np.int32), duration=length.astype(np.int32))
        # symusic writes pedals to a file only as controller messages.
        for number, value in zip(onset.tolist(), length.tolist(), strict=True):
            piano.controls.append(symusic.ControlChange(number, 64, 127))
            piano.controls.append(symusic.ControlChange(number + value, 64, 0))
        piano.controls.sort(key=lambda control: control.time)
    out.tracks.append(piano)
    return out, dropped


def _tempo_map(score: Any) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.float64]]:
    """A function from ticks of `score` to seconds, in double precision (symusic's own seconds are single)."""
    changes = score.tempos.numpy()
    # MIDI's default of 120 qpm comes first. Of several changes at one tick each but the last lasts no time.
    times, mspq = np.append(np.int64(0), changes["time"]), np.append(500_000.0, changes["mspq"])
    order = np.argsort(times, kind="stable")
    times, mspq = times[order], mspq[order]
    per_tick = mspq / 1e6 / score.ticks_per_quarter
    starts = np.concatenate([[0.0], np.cumsum(np.diff(times) * per_tick[:-1])])

    def seconds_at(ticks: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        section = np.searchsorted(times, ticks, side="right") - 1  # the first begins at 0
        return starts[section] + (ticks - times[section]) * per_tick[section]

    return seconds_at


def encode_score(source: Any, tokenizer: Any) -> tuple[npt.NDArray[np.uint16], ScoreReport]:
    """The tokens of a score (symusic, or the path of a MIDI file), without BOS and EOS, and what became of its notes.

    Any tempo map and any tracks will do: `rewrite` is applied here. Raises `EmptyScoreError` if there is no note to
    encode, `UserError` if a file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        file = read_file(source)
    else:
        file = MidiFile(source, sum(len(track.notes) for track in source.tracks))
    score, on_the_way = rewrite(file.score, tokenizer.time_division)
    dropped = {**file.dropped, **on_the_way}
    notes = score.tracks[0].notes.numpy()
    pitch = notes["pitch"].astype(np.int64)
    low, high = tokenizer.config.pitch_range
    outside = (pitch < low) | (pitch > high)
    if outside.any():
        dropped[f"pitch outside {low} to {high}"] = int(outside.sum())
    if outside.all():
        reason = "; ".join(f"{count} {why}" for why, count in dropped.items())
        raise EmptyScoreError(f"no notes ({reason} left out)" if reason else "no notes")
    (sequence,) = tokenizer.encode(score)  # without programs MidiTok returns one sequence for each track
    tokens = np.array(sequence.ids, dtype=np.uint16)

    vocab = tokenizer.vocab
    note_ids = [vocab[name] for name in vocab if name.startswith(("Pitch_", "NoteOn_"))]
    written = int(np.isin(tokens, note_ids).sum())
    expected = int((~outside).sum())
    if written != expected:
        dropped["lost by the tokeniser"] = expected - written
    end = (notes["time"].astype(np.int64) + notes["duration"])[~outside].max()
    seconds = float(end) / (tokenizer.time_division * BEATS_PER_SECOND)
    if written + sum(dropped.values()) != file.n_begun:
        raise ValueError(f"of its {file.n_begun:,} notes {written:,} are in the tokens and {dropped} were left out")
    changed = {**file.changed, **_changes(notes, ~outside, tokenizer)}
    pedals = 0 if tokenizer.config.use_sustain_pedals else len(score.tracks[0].pedals)
    return tokens, ScoreReport(written, seconds, dropped, changed, file.n_begun, pedals)


def _changes(notes: dict[str, npt.NDArray[Any]], kept: npt.NDArray[np.bool_], tokenizer: Any) -> dict[str, int]:
    """How many of the kept notes the tokens tell otherwise than to the nearest step."""
    onset, length, pitch = (notes[key][kept].astype(np.int64) for key in ("time", "duration", "pitch"))
    if type(tokenizer).__name__ == "MIDILike":
        # Notes of one pitch that overlap: the first NoteOff ends the first of them, so their ends may be swapped.
        order = np.lexsort((onset, pitch))
        onset, length, pitch = onset[order], length[order], pitch[order]
        swapped = (pitch[1:] == pitch[:-1]) & (onset[1:] + length[1:] < onset[:-1] + length[:-1])
        found = {"inside another note of its pitch (ends swapped)": int(swapped.sum())}
    else:
        beats, position, resolution = tokenizer.durations[-1]
        longest = (beats * resolution + position) * tokenizer.time_division // resolution
        limit = longest / (tokenizer.time_division * BEATS_PER_SECOND)
        found = {f"longer than {limit:g} s (cut to it)": int((length > longest).sum())}
    return {what: count for what, count in found.items() if count}


def encode_midi(path: str | os.PathLike[str], vocabulary: Vocabulary) -> tuple[npt.NDArray[np.uint16], ScoreReport]:
    """The tokens of a MIDI file for a model of this vocabulary, without BOS and EOS: a prompt; and what was left out.

    `UserError` naming the file if it cannot be read, or if it has no notes.
    """
    try:
        return encode_score(path, rebuild(vocabulary))
    except EmptyScoreError as error:
        raise UserError(f"{path} has {error}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why a file could not be encoded, as words behind its name, whatever went wrong in whichever library."""
    if isinstance(error, UserError | ValueError) and str(error):
        return str(error)
    if isinstance(error, MemoryError):
        return "reading it takes more memory than there is"
    return " ".join(f"reading it fails ({type(error).__name__}: {error})".split())


def write_midi(path: str | os.PathLike[str], score: Any) -> None:
    """Write a `symusic.Score` as a MIDI file, whole or not at all; `UserError` if it cannot be written.

    Not by symusic's own `dump_midi`, which cuts the file short on a full disk and says nothing.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(score.dumps_midi())


def decode(tokens: npt.ArrayLike, vocabulary: Vocabulary) -> Any:
    """A `symusic.Score` at 120 qpm with one piano track; PAD, BOS and EOS are passed over, an unfinished note is lost.
    A pedal that nothing lets up is held to the end of the last note.

    Needs nothing but the vocabulary (and MidiTok). `ValueError` if a token is not of the vocabulary.
    """
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocabulary.size):
        raise ValueError(f"tokens must be in [0, {vocabulary.size}), got {ids.min()} to {ids.max()}")
    special = np.isin(ids, [vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id])
    # A list of one sequence: a bare list of ids would be taken for one sequence per id.
    score = rebuild(vocabulary).decode([ids[~special].tolist()])
    if len(score.tracks) == 0:
        symusic = require("symusic")
        score.tracks.append(symusic.Track(program=0, is_drum=False, name="Piano"))
    score.tracks[0].name = "Piano"
    _hold_on(score, ids, vocabulary)
    return score


def _hold_on(score: Any, ids: npt.NDArray[np.int64], vocabulary: Vocabulary) -> None:
    """A pedal that is still down at the end of the tokens is held as long as anything sounds; MidiTok forgets it."""
    down, up = (vocabulary.ids.get(name) for name in ("Pedal_0", "PedalOff_0"))
    moves = np.flatnonzero(np.isin(ids, [token for token in (down, up) if token is not None]))
    if not len(moves) or ids[moves[-1]] != down:
        return
    first = len(moves) - 1
    while first and ids[moves[first - 1]] == down:  # to push what is down changes nothing
        first -= 1
    track = score.tracks[0]
    tick = round(float(vocabulary.clock(ids)[moves[first]]) * score.ticks_per_quarter * 2)
    end = max([note.time + note.duration for note in track.notes], default=tick)
    if end > tick:
        track.pedals.append(require("symusic").Pedal(tick, end - tick))
