"""A score made audible: a piano of a SoundFont, written as a WAV file a second at a time, in bounded memory.

TinySoundFont (the package tinysoundfont, extra `audio`) makes the sound; it needs neither a sound card nor a system
library. The file is whole or not there at all. What would be too loud for the file's numbers is turned down and played
again, never clipped.
"""

import os
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, describe
from dsmr.music.midi_file import require

PLACES = (
    "/usr/share/sounds/sf2/default-GM.sf2",
    "/usr/share/sounds/sf3/default-GM.sf3",
    "/usr/share/soundfonts/default.sf2",
    "/usr/share/sounds/sf2/FluidR3_GM.sf2",
    "/usr/share/sounds/sf2/TimGM6mb.sf2",
)
"""Where Linux distributions keep a SoundFont for everybody."""
LOUDEST = 0.98  # of what a 16-bit number holds
QUIET = 1e-4  # the sound has died away below this
LONGEST_TAIL = 12.0  # seconds
MOST_BYTES = 2**32 - 64  # of samples: a WAV file counts its bytes, header included, in 32 bits
OFF, PEDAL, ON = 0, 1, 2  # at one moment keys come up, then the pedal moves, then keys go down
UP, DOWN = 0, 1  # a pedal that is changed comes up before it goes down


@dataclass(frozen=True)
class Rendered:
    """What was written: seconds of sound, and by how many decibels it was turned down (0 or less)."""

    path: Path
    soundfont: Path
    seconds: float
    gain: float

    @property
    def sentence(self) -> str:
        """What a command prints."""
        quieter = f", turned down by {-self.gain:.1f} dB so that nothing is clipped" if self.gain else ""
        return f"{self.path}: {self.seconds:.1f} s of sound, {self.soundfont.name}{quieter}"


def find_soundfont(path: str | os.PathLike[str] | None = None) -> Path:
    """The SoundFont `path`, else that of DSMR_SOUNDFONT, else one of the system's; `UserError` where there is none."""
    named = path or os.environ.get("DSMR_SOUNDFONT")
    if named:
        found = Path(named)
        if not found.is_file():
            raise UserError(f"there is no SoundFont {found}")
        return found
    for place in map(Path, PLACES):
        if place.is_file():
            return place
    raise UserError(
        "sound needs a SoundFont: name one with --soundfont or DSMR_SOUNDFONT, or install one for everybody (Debian "
        "and Ubuntu: apt install timgm6mb-soundfont, 6 MB, or fluid-soundfont-gm, 140 MB)"
    )


def render(
    score: Any,
    path: str | os.PathLike[str],
    soundfont: str | os.PathLike[str] | None = None,
    *,
    rate: int = 44100,
    program: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Rendered:
    """Write the notes and pedals of `score` (a symusic score in ticks at 120 quarters a minute, as `load_midi` gives)
    as a stereo WAV file of 16 bits.

    Args:
        soundfont: an .sf2 or .sf3 file; None = see `find_soundfont`.
        rate: samples a second, 8,000 to 192,000.
        program: of General MIDI, 0 = the grand piano.
        progress: told seconds written, of how many.

    Raises:
        UserError: where there is no SoundFont or it cannot be read, the synthesiser is not installed, the sound is
            longer than a WAV file holds, or the file cannot be written.
    """
    if not 8000 <= rate <= 192_000:
        raise UserError(f"the sampling rate must lie between 8,000 and 192,000, but it is {rate:,}")
    font = find_soundfont(soundfont)
    tinysoundfont = require_synthesiser()
    moments = list(_moments(score))
    last = moments[-1][0] if moments else 0.0
    longest = MOST_BYTES / (4 * rate) - LONGEST_TAIL
    if last > longest:
        raise UserError(
            f"the music is {last:,.0f} seconds long, and a WAV file of {rate:,} samples a second holds {longest:,.0f}: "
            "render a shorter file" + (", or at a lower rate" if last <= MOST_BYTES / (4 * 8000) - LONGEST_TAIL else "")
        )
    gain = 0.0
    with atomic_path(path) as temporary:
        while True:
            synth = _synthesiser(tinysoundfont, font, rate, program, gain)
            peak, seconds = _write(synth, moments, last, temporary, rate, progress)
            if peak <= LOUDEST:
                return Rendered(Path(path), font, seconds, gain)
            gain -= 20 * float(np.log10(peak / LOUDEST)) + 0.01


def require_synthesiser() -> Any:
    """The module tinysoundfont; `UserError` that says how to install it."""
    try:
        return require("tinysoundfont")
    except UserError as error:
        raise UserError("sound needs the package tinysoundfont: pip install --no-deps tinysoundfont") from error


def _synthesiser(tinysoundfont: Any, font: Path, rate: int, program: int, gain: float) -> Any:
    synth = tinysoundfont.Synth(samplerate=rate, gain=gain)
    try:
        number = synth.sfload(font.read_bytes(), max_voices=512)
        synth.program_select(0, number, 0, program)
    except OSError as error:
        raise UserError(f"cannot read the SoundFont {font}: {describe(error)}") from error
    except Exception as error:  # its own kinds, and RuntimeError
        raise UserError(f"{font} is no SoundFont with an instrument {program}: {error}") from error
    return synth


def _moments(score: Any) -> Iterator[tuple[float, int, int, int]]:
    """(second, ON or OFF, pitch, velocity), in the order in which they are played.

    A string that is struck while it sounds is damped first. While the pedal is down nothing is: what the hands let go
    ends when the pedal comes up (the synthesiser knows no pedal).
    """
    a_second = score.ticks_per_quarter * 2
    events: list[tuple[int, int, int, int]] = []
    for track in score.tracks:
        notes, pedals = track.notes.numpy(), track.pedals.numpy()
        columns = (notes[name].tolist() for name in ("time", "duration", "pitch", "velocity"))
        for begin, length, pitch, velocity in zip(*columns, strict=True):
            events += [(begin, ON, pitch, velocity), (begin + max(length, 1), OFF, pitch, 0)]
        for begin, length in zip(pedals["time"].tolist(), pedals["duration"].tolist(), strict=True):
            events += [(begin, PEDAL, DOWN, 0), (begin + max(length, 1), PEDAL, UP, 0)]
    keys: dict[int, int] = {}  # pitch -> how often it is held down
    sounding: set[int] = set()
    feet = 0  # pedals that are down: tracks may overlap
    for tick, kind, pitch, velocity in sorted(events):
        if kind == PEDAL:
            feet += 1 if pitch == DOWN else -1
            ended = sorted(key for key in sounding if not keys.get(key)) if not feet else []
        elif kind == OFF:
            keys[pitch] -= 1
            ended = [pitch] if not keys[pitch] and not feet else []
        else:
            keys[pitch] = keys.get(pitch, 0) + 1
            ended = [pitch] if pitch in sounding else []
        for key in ended:
            sounding.discard(key)
            yield tick / a_second, OFF, key, 0
        if kind == ON:
            sounding.add(pitch)
            yield tick / a_second, ON, pitch, velocity


def _write(
    synth: Any,
    moments: list[tuple[float, int, int, int]],
    last: float,
    path: Path,
    rate: int,
    progress: Callable[[float, float], None] | None,
) -> tuple[float, float]:
    """Play and write; returns the largest sample, 1 being what the file can hold, and the seconds."""
    peak, written = 0.0, 0
    with open(path, "wb") as file, wave.open(file, "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(rate)

        def play(until: int) -> float:
            nonlocal peak, written
            loudest = 0.0
            while written < until:
                count = min(rate, until - written)
                samples: npt.NDArray[np.float32] = np.frombuffer(bytes(synth.generate(count)), dtype=np.float32)
                loudest = max(loudest, float(np.abs(samples).max(initial=0.0)))
                out.writeframesraw(np.clip(np.round(samples * 32767), -32768, 32767).astype("<i2").tobytes())
                written += count
                if progress is not None:
                    progress(written / rate, last)
            peak = max(peak, loudest)
            return loudest

        for second, kind, pitch, velocity in moments:
            play(round(second * rate))
            if kind == ON:
                synth.noteon(0, pitch, velocity)
            else:
                synth.noteoff(0, pitch)
        end = written + round(LONGEST_TAIL * rate)
        while written < end and play(min(written + rate // 4, end)) > QUIET:
            pass
    return peak, written / rate
