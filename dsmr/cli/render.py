"""`dsmr render`: a MIDI file as sound."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.console.shown import shown
from dsmr.console.terminal import command, console


@command
def render(
    midi: Annotated[Path, typer.Argument(help="The MIDI file; its piano is played.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The WAV file.", show_default="the MIDI file's name with .wav")
    ] = None,
    soundfont: Annotated[
        Path | None,
        typer.Option(help="An .sf2 or .sf3 file.", show_default="DSMR_SOUNDFONT, else one that the system has"),
    ] = None,
    rate: Annotated[int, typer.Option(help="Samples a second.")] = 44100,
    program: Annotated[int, typer.Option(min=0, max=127, help="Instrument of General MIDI, 0 = grand piano.")] = 0,
) -> None:
    """Hear it: play a MIDI file with the piano of a SoundFont into a WAV file."""
    from dsmr.console.files import check_apart, check_writable
    from dsmr.console.progress import ProgressLine, duration
    from dsmr.music.sound import find_soundfont
    from dsmr.music.sound import render as play
    from dsmr.music.tokenizer import load_midi

    path = midi.with_suffix(".wav") if out is None else out
    check_writable(path)
    check_apart([path], {"the MIDI file": midi, "the SoundFont": soundfont})
    score = load_midi(midi)
    font = find_soundfont(soundfont)
    check_apart([path], {"the SoundFont": font})
    with ProgressLine() as line:

        def show(done: float, total: float) -> None:
            line.update(f"{duration(done)} of {duration(total)} written")

        done = play(score, path, font, rate=rate, program=program, progress=show)
    console().print(shown(done.sentence), soft_wrap=True, markup=False)
