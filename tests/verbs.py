"""Every verb of the program once, small: what each is told, in the order in which they follow from one another.

For the tests of what verbs write and of what a killed one leaves. `place` makes what a user would bring; in a folder so
made, `run` runs a verb in this process and returns its exit code.
"""

import contextlib
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from known_ceilings import KNOWN
from silent_port import SilentPort
from small_scores import score_of, write_folder
from small_soundfont import write_soundfont
from typer.main import get_command

from dsmr.cli.app import app

SCHEDULE = "two_scale(layers=2, long=64, short=8, n_long=1)"
SMALL = [
    *("--schedule", SCHEDULE, "--d-model", "16", "--n-heads", "2", "--segment-length", "16", "--batch-size", "2"),
    *("--steps", "6", "--eval-every", "3", "--no-augment", "--device", "cpu", "--dtype", "float32", "--threads", "1"),
]
PLAY = ["run", "--prompt", "p.mid", "--tokens", "60", "--seed", "1", "--device", "cpu"]
VERBS: dict[str, list[str]] = {
    "prepare composed": ["--out", "composed", "--pieces", "3", "--jobs", "1"],
    "prepare midi": ["midi", "--out", "corpus", "--jobs", "1"],
    "prepare maestro": ["maestro.zip", "--out", "maestro", "--jobs", "1"],
    "pack": ["composed", "composed.dsmr"],
    "train": ["--data", "corpus", "--out", "run", *SMALL],
    "eval": ["run", "--device", "cpu", "--krcu", "--reset", "32", "--bin", "16", "--bins", "2", "--retain", "8"],
    "generate": [*PLAY, "--out", "on.mid", "--stream", "--save-state", "kept"],
    "play": [*PLAY, "--out", "played.mid", "--save-state", "kept-live", "--seconds", "0.5"],
    "render": ["p.mid", "--out", "p.wav", "--soundfont", "sine.sf2"],
    "export": ["run", "--out", "export"],
    "budget": ["--schedule", SCHEDULE, "--json", "budget.json"],
    "profile": ["--schedule", SCHEDULE, "--out", "profile", "--device", "cpu", "--budget", "64MiB"],
    "experiments list": ["--json", "presets.json"],
    "experiments run": ["table.toml", "--out", "results"],
    "experiments report": ["results", "--rows", "rows.json"],
    "experiments search": ["run", "--out", "search", "--device", "cpu", "--tokens", "2000"],
    "demo": ["--out", "demo", "--minutes", "0.1"],
}
"""What each verb is told, in a folder that `place` made."""
CODES = {"profile": 1}
"""Exit codes other than 0: here nothing can be measured (see `stand_in`)."""
SPAWNING = ("experiments run", "demo")
"""Verbs that start processes of their own, which takes many seconds."""
RESUMED = {"train": ["--out", "run", "--resume"]}
"""What a verb is told the second time, where that is not the same again."""


def names() -> list[str]:
    """Every verb that the program has."""

    def walk(group: Any, name: str) -> Iterator[str]:
        for verb, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, f"{name}{verb} ")
            else:
                yield name + verb

    return list(walk(get_command(app), ""))


def place(folder: Path) -> Path:
    """MIDI files, an archive of MAESTRO's form, a prompt, a SoundFont, a table of experiments."""
    from small_table import small_corpus, small_table, toml

    from dsmr.music.tokenizer import write_midi

    folder.mkdir(parents=True, exist_ok=True)
    midi = write_folder(folder / "midi", 12, 60)
    with zipfile.ZipFile(folder / "maestro.zip", "w") as archive:
        listing = "midi_filename,split\n"
        for number, path in enumerate(sorted(midi.rglob("*.mid*"))):
            archive.write(path, f"maestro/{number}.mid")
            listing += f"{number}.mid,{('train', 'validation', 'test')[min(number, 2)]}\n"
        archive.writestr("maestro/maestro-v3.0.0.csv", listing)
    write_midi(folder / "p.mid", score_of([(0.25 * beat, 0.2, 60 + beat % 12) for beat in range(24)]))
    write_soundfont(folder / "sine.sf2")
    small_corpus(folder / "small")
    table = small_table("small")
    table["train"] |= {"steps": 6, "eval_every": 3, "save_every": 3}
    (folder / "table.toml").write_text(toml(table))
    return folder


def stand_in() -> None:
    """Have this process's verbs need no MIDI port, no minutes of measuring and no large demo."""
    import dsmr.demo.run as demo
    import dsmr.live.performance as live
    import dsmr.profiling.profile as profile
    from dsmr_kernels.costing import ceilings

    live.OutputPort = lambda *given: SilentPort()
    ceilings.ceilings_of = lambda *given, **options: KNOWN
    profile.measured_row = lambda job: {"error": "not measured"}
    small = {"pieces": 6, "piece_minutes": 1.0, "long": 512, "short": 64, "d_model": 32, "prompt_seconds": 5.0}
    fields = demo.DemoSize.__init__.__defaults__
    named = dict(zip(list(demo.DemoSize.__dataclass_fields__), fields, strict=True)) | small | {"seconds": 3.0}
    demo.DemoSize.__init__.__defaults__ = tuple(named.values())


def run(verb: str, folder: Path, again: bool = False, more: Sequence[str] = ()) -> int:
    """Run a verb in `folder`, in this process, as the console script does; returns its exit code."""
    told = [*(RESUMED.get(verb, VERBS[verb]) if again else VERBS[verb]), *more]
    before, arguments = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["dsmr", *verb.split(), *told]
    try:
        app(sys.argv[1:], standalone_mode=True)
    except SystemExit as left:
        return int(left.code or 0) if not isinstance(left.code, str) else 1
    finally:
        os.chdir(before)
        sys.argv = arguments
    return 0


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What is printed goes nowhere, also what libraries and children print."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)
