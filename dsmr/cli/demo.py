"""`dsmr demo`: everything once, in minutes."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import Seed, SoundFont, Wav, check_sound
from dsmr.console.shown import shown
from dsmr.console.terminal import command, console


@command
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that the demo makes.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes of computing, about.")] = 3.5,
    seed: Seed = 0,
    wav: Wav = False,
    soundfont: SoundFont = None,
) -> None:
    """Compose a corpus, train with and without long memory, compare on refrain returns, continue a piece, draw."""
    from dsmr.demo.run import run_demo

    sound = out / "continued.wav"
    font = check_sound(wav, soundfont, [], {})  # the demo looks after its folder
    done = run_demo(out, minutes=minutes, seed=seed, console=console())
    if font is not None:
        from dsmr.music.sound import render
        from dsmr.music.tokenizer import load_midi

        made = render(load_midi(done.files["whole"]), sound, font)
        console().print(shown(made.sentence), soft_wrap=True, markup=False)
