"""Options that several commands share, and how their texts become what the program works with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsmr.console.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dsmr.generation.drawing import Sampling
    from dsmr.model.schedule import MemorySchedule

HELP = {"help_option_names": ["-h", "--help"]}

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.", show_default=False)]
Tokenizer = Annotated[
    str, typer.Option(help="tsd (10 ms grid, the default), midilike, remi, or tsd_pedal (with the sustain pedal).")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one for each core")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a former corpus or export in --out.")]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, or cuda:N.")]
Schedule = Annotated[
    str,
    typer.Option(
        help="Memory of every layer, in tokens, such as 'two_scale(layers=8, long=4096, short=512, n_long=2)'.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]

# --- of generate and play ---------------------------------------------------------------------------------------------

Run = Annotated[
    Path, typer.Argument(help="A run directory written by `train`, or a folder of `export`.", show_default=False)
]
Engine = Annotated[
    str, typer.Option(help="torch (plays a run), onnx (plays an export), or auto: whichever the folder holds.")
]
Prompt = Annotated[Path | None, typer.Option(help="The MIDI file to continue.", show_default=False)]
PromptSeconds = Annotated[
    float | None,
    typer.Option(
        help="Continue from here, in seconds, also within a rest (remi: from a note or bar before it).",
        show_default="the last note's beginning",
    ),
]
Notes = Annotated[int | None, typer.Option(help="Length in notes.", show_default="no limit")]
Tokens = Annotated[int | None, typer.Option(help="Length in tokens.", show_default="no limit")]
Temperature = Annotated[
    float | None, typer.Option(help="Below 1 safer, above 1 wilder; 0 always the likeliest.", show_default="1.0")
]
TopK = Annotated[int | None, typer.Option(help="Draw among the k likeliest.", show_default="all")]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw among the fewest that reach this probability; 1 is all.", show_default="0.98"),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop what is so many times less likely than the likeliest.", show_default="0.0"),
]
PlaySeed = Annotated[int | None, typer.Option(help="The same seed plays the same.", show_default="a new one")]
StopAtEnd = Annotated[bool, typer.Option("--stop-at-end", help="Let the model end the piece earlier.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the weights: float32, bfloat16, int8, or auto (int8 on a CPU where they outgrow its cache).",
        show_default="auto, or the saved stream's",
    ),
]
MemoryDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the memory: float32, bfloat16, or int8 (a quarter of the bytes); on x86 they save time as well.",
        show_default="float32, or the saved stream's",
    ),
]
Threads = Annotated[
    int,
    typer.Option(
        min=1,
        help="CPU threads, at most 64 or four a core. One is not disturbed by other programs; more may be faster.",
    ),
]
SaveState = Annotated[Path | None, typer.Option(help="Keep the stream in this file when it ends.", show_default="no")]
LoadState = Annotated[Path | None, typer.Option(help="Play on from this file instead of a prompt.", show_default=False)]

Wav = Annotated[bool, typer.Option("--wav", help="Also write it as sound, X.wav (see dsmr render).")]
SoundFont = Annotated[
    Path | None,
    typer.Option(help="For --wav: an .sf2 or .sf3 file.", show_default="DSMR_SOUNDFONT, else one that the system has"),
]


def check_sound(
    wav: bool, soundfont: Path | None, sounds: "Sequence[Path]", others: "Mapping[str, Path | None]"
) -> Path | None:
    """The SoundFont to write `sounds` with, or None without --wav; `UserError` before any work if they cannot be
    written, or one of them is another file of the job."""
    if not wav:
        if soundfont is not None:
            raise UserError("--soundfont is for --wav, which was not given")
        return None
    from dsmr.console.files import check_apart, check_writable
    from dsmr.music.sound import find_soundfont, require_synthesiser

    require_synthesiser()
    font = find_soundfont(soundfont)
    check_apart(sounds, {**others, "the SoundFont": font})
    for path in sounds:
        check_writable(path)
    return font


def parse_schedule(text: str) -> "MemorySchedule":
    """A `MemorySchedule` of its string; `UserError` in one sentence where it is unknown or malformed."""
    from dsmr.model.schedule import MemorySchedule

    try:
        return MemorySchedule.parse(text)
    except (ValueError, TypeError) as error:
        said = str(error)
        raise UserError(said if repr(text) in said else f"schedule {text!r}: {said}") from error


def sampling_of(given: dict[str, Any], resumed: bool) -> "Sampling | None":
    """The sampling asked for; None = the saved stream's own."""

    from dsmr.generation.drawing import Sampling

    asked = {name: value for name, value in given.items() if value is not None}
    if resumed and not asked:
        return None
    if resumed and "seed" in asked:
        raise UserError("--seed cannot be given with --load-state: the saved stream goes on with its own draws")
    return Sampling(**{"top_p": 0.98, **asked})
