"""The program: every command's help, what it prints, and bad input that ends in one sentence and exit code 1."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import pytest
from small_soundfont import write_soundfont
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.cli.train import TRAIN_DEFAULTS
from dsmr.console.devices import resolve_device
from dsmr.console.errors import UserError
from dsmr.console.terminal import command

ROOT = Path(__file__).resolve().parents[2]
TWO_SCALE = "two_scale(layers=2, long=64, short=16, n_long=1)"


def dsmr(*arguments: str | Path):
    """Run the program in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def says(result, *words: str) -> bool:
    """Whether `result` failed with exit code 1 and one line on stderr that has all the words."""
    lines = result.stderr.strip().splitlines()
    return result.exit_code == 1 and len(lines) == 1 and all(word in lines[0] for word in words)


COMMANDS = [
    "train",
    "eval",
    "generate",
    "play",
    "render",
    "export",
    "budget",
    "profile",
    "demo",
    "pack",
    "prepare midi",
    "prepare maestro",
    "prepare composed",
    "experiments list",
    "experiments run",
    "experiments report",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = dsmr(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_wrong_usage_is_exit_code_2():
    assert dsmr("nonsense").exit_code == 2
    assert dsmr("budget").exit_code == 2
    assert dsmr("budget", "--schedule", TWO_SCALE, "--heads", "many").exit_code == 2


def test_start_up_is_light():
    """Help must not wait for torch, and a machine without MidiTok must still get it."""
    heavy = ("torch", "miditok", "matplotlib", "numpy")
    code = f"import sys, dsmr.cli.app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_budget_prints_a_table_and_writes_json(tmp_path):
    result = dsmr("budget", "--schedule", TWO_SCALE, "--json", tmp_path / "budget.json")
    assert result.exit_code == 0
    assert "ratio" in result.stdout
    assert json.loads((tmp_path / "budget.json").read_text())["bytes"] == 2 * 64 * 2 * 8 * (64 + 16)


def test_a_result_replaces_no_file_of_another_kind(tmp_path):
    song = tmp_path / "song.mid"
    song.write_bytes(b"MThd")
    for arguments in (
        ("budget", "--schedule", TWO_SCALE, "--json", song),
        ("profile", "--schedule", TWO_SCALE, "--device", "cpu", "--out", tmp_path / "profile", "--trace", song),
        ("experiments", "list", "--json", song),
        ("experiments", "report", tmp_path, "--rows", song),
    ):
        assert says(dsmr(*arguments), "song.mid is there already and is not"), arguments
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"MThd"]
    for _ in range(2):  # its own result is
        assert dsmr("budget", "--schedule", TWO_SCALE, "--json", tmp_path / "budget.json").exit_code == 0


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("three_scale(layers=2)", ["three_scale", "unknown"]),
        ("two_scale(layers=2", ["cannot be read"]),
        ("two_scale(layers=2, long=64)", ["missing"]),
        ("uniform(layers=2, horizon=-1)", ["horizon", "-1"]),
    ],
)
def test_a_bad_schedule_is_a_sentence(schedule, words, tmp_path):
    assert says(dsmr("budget", "--schedule", schedule), *words)
    assert says(dsmr("train", "--data", tmp_path, "--schedule", schedule, "--out", tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_want_of_memory_and_devices_that_are_none_are_sentences(tmp_path, capsys):
    def starve():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate much")

    with pytest.raises(SystemExit):
        command(starve)()
    assert "not enough memory" in capsys.readouterr().err
    for device in ("meta", "abacus", "cuda:99"):
        with pytest.raises(UserError, match=device):
            resolve_device(device)


def test_paths_that_are_not_there_are_sentences(tmp_path):
    missing = tmp_path / "missing"
    assert says(dsmr("prepare", "midi", missing, "--out", tmp_path / "a"), "missing")
    assert says(dsmr("prepare", "midi", tmp_path, "--out", tmp_path / "a"), "no MIDI file")
    assert says(dsmr("prepare", "maestro", missing, "--out", tmp_path / "a"), "missing")
    assert says(dsmr("prepare", "maestro"), "--download")
    assert says(dsmr("train", "--data", missing, "--out", tmp_path / "b"), "missing")
    assert says(dsmr("train", "--out", tmp_path / "b"), "--data")
    assert says(dsmr("train", "--out", tmp_path / "b", "--resume"), "b")
    assert says(dsmr("eval", missing), "missing")
    assert says(dsmr("generate", missing, "--prompt", missing, "--out", tmp_path / "x.mid"), "missing")
    assert says(dsmr("pack", missing, tmp_path / "c.dsmr"), "missing")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0"], ["top_p"]),
        (["--seconds", "0"], ["seconds", "more than 0"]),
        (["--out", "song.wav"], ["song.wav", ".mid"]),
        (["--min-p", "2"], ["min_p", "2"]),
        (["--load-state", "s"], ["either", "--prompt", "--load-state"]),
        (["--load-state", "s", "--seed", "1"], ["--seed", "--load-state"]),
    ],
)
def test_bad_settings_of_generate_are_sentences(arguments, words, tmp_path):
    assert says(dsmr("generate", tmp_path, "--prompt", "p.mid", "--out", tmp_path / "a.mid", *arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["run directory"]),
        (["RUN", "--top-p", "0"], ["top_p"]),
        (["RUN", "--temperature", "-1"], ["temperature"]),
        (["RUN", "--seconds", "0"], ["seconds", "more than 0"]),
        (["RUN", "--out", "song.wav"], ["song.wav", ".mid"]),
        (["RUN", "--prompt", "a.mid", "--listen", "3"], ["--prompt", "--listen"]),
        (["RUN"], ["RUN", "run directory"]),
    ],
)
def test_bad_settings_of_play_are_sentences(arguments, words):
    assert says(dsmr("play", *arguments), *words)


def test_bad_choices_of_eval_are_sentences(tmp_path):
    assert says(dsmr("eval", tmp_path, "--split", "dev"), "dev", "validation")
    assert says(dsmr("eval", tmp_path, "--baseline", "oracle"), "oracle", "trigram")


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs a path nobody can write")
def test_an_unwritable_output_is_a_sentence():
    assert says(dsmr("budget", "--schedule", TWO_SCALE, "--json", "/proc/nowhere/budget.json"), "/proc/nowhere")


def test_ctrl_c_is_130_and_debug_shows_the_traceback(monkeypatch, capsys):
    @command
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        interrupted()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "dsmr: interrupted\n"
    monkeypatch.setenv("DSMR_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_the_defaults_shown_for_train_are_those_of_its_settings():
    from dataclasses import fields

    from dsmr.runs.settings import TrainConfig

    shown_in_words = {
        "d_ff",
        "augment",
        "steps",
        "epochs",
        "minutes",
        "warmup",
        "threads",
        "eval_every",
        "checkpoint_layers",
        "compile",
        "graph",
    }
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    assert set(TRAIN_DEFAULTS) <= set(defaults)
    for name, shown in TRAIN_DEFAULTS.items():
        if name not in shown_in_words:
            assert shown == str(defaults[name])


@pytest.mark.slow
def test_from_nothing_to_a_continued_piece(tmp_path):
    """The README's commands, one after another, on the smallest corpus and model there can be."""
    pytest.importorskip("miditok")
    from dsmr.composer.compose import compose

    corpus, run, piece = tmp_path / "corpus", tmp_path / "run", tmp_path / "midi" / "piece.mid"
    folder = piece.parent
    folder.mkdir()
    for seed in range(3):
        compose(seed, minutes=1.0).write_midi(folder / f"{'piece' if seed == 0 else seed}.mid")
    made = dsmr("prepare", "midi", folder, "--out", corpus, "--jobs", 1)
    assert made.exit_code == 0, made.output
    assert "notes" in made.stdout
    packed = dsmr("pack", corpus, tmp_path / "corpus.dsmr")
    assert packed.exit_code == 0, packed.output
    shape = ["--d-model", 16, "--n-heads", 2, "--segment-length", 32, "--batch-size", 2, "--threads", 1]
    trained = dsmr("train", "--data", corpus, "--schedule", TWO_SCALE, "--out", run, "--steps", 2, *shape)
    assert trained.exit_code == 0, trained.output
    assert says(dsmr("train", "--data", corpus, "--out", run), "already holds")
    resumed = dsmr("train", "--out", run, "--resume", "--steps", 3)
    assert resumed.exit_code == 0, resumed.output
    for data in ([], ["--data", tmp_path / "corpus.dsmr", "--baseline", "trigram"]):
        measured = dsmr("eval", run, *data)
        assert measured.exit_code == 0, measured.output
        assert "nats a note" in measured.stdout
    assert "than the trigram" in measured.stdout
    assert (run / "eval-validation.json").is_file()
    out = tmp_path / "continued.mid"
    played = dsmr(
        "generate",
        run,
        "--prompt",
        piece,
        "--prompt-seconds",
        5,
        "--notes",
        5,
        "--out",
        out,
        "--seed",
        1,
        "--top-k",
        50,
    )
    assert played.exit_code == 0, played.output
    assert "5 notes" in played.stdout
    assert out.is_file()
    kept = tmp_path / "kept.stream"
    streamed = dsmr(
        *("generate", run, "--prompt", piece, "--prompt-seconds", 5, "--tokens", 60, "--out", out, "--stream"),
        *("--seed", 1, "--save-state", kept, "--realtime"),
    )
    assert streamed.exit_code == 0, streamed.output
    assert "velocity" in streamed.stdout
    assert "× the music's own tempo" in streamed.stdout.replace("\n", " ")
    resumed = dsmr("generate", run, "--load-state", kept, "--tokens", 20, "--out", out)
    assert resumed.exit_code == 0, resumed.output
    several = dsmr("generate", run, "--prompt", piece, "--tokens", 9, "--out", out, "--variations", 2)
    assert several.exit_code == 0, several.output
    assert out.with_name("continued-2.mid").is_file()
    if importlib.util.find_spec("tinysoundfont") is not None:
        font = write_soundfont(tmp_path / "sine.sf2")
        loud = dsmr("generate", run, "--load-state", kept, "--tokens", 20, "--out", out, "--wav", "--soundfont", font)
        assert loud.exit_code == 0, loud.output
        with wave.open(str(out.with_suffix(".wav"))) as file:
            assert file.getnframes() > 1000
        assert says(dsmr("generate", run, "--load-state", kept, "--out", out, "--soundfont", font), "--wav")
    assert says(dsmr("generate", run, "--prompt", piece, "--out", out, "--dtype", "int4"), "int4", "int8")
    assert says(dsmr("generate", run, "--prompt", piece, "--out", out, "--memory-dtype", "int4"), "int4", "int8")
    assert says(dsmr("play", run, "--prompt", piece, "--memory-dtype", "int4"), "int4", "int8")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    del config["seal"]  # as who edits it by hand must
    (other / "config.json").write_text(json.dumps({**config, "rope_base": 500.0}))
    assert says(dsmr("generate", other, "--load-state", kept, "--out", out), "kept.stream", "another model")
    too_short = dsmr("generate", run, "--prompt", piece, "--prompt-seconds", 5000, "--out", out)
    assert says(too_short, "piece.mid", "shorter", "5000")
    (tmp_path / "noise.mid").write_bytes(b"MThd nonsense")
    assert says(dsmr("generate", run, "--prompt", tmp_path / "noise.mid", "--out", out), "noise.mid")
    remi = dsmr("prepare", "composed", "--pieces", 3, "--out", tmp_path / "remi", "--tokenizer", "remi", "--jobs", 1)
    assert remi.exit_code == 0, remi.output
    assert says(dsmr("eval", run, "--data", tmp_path / "remi"), "tokeniser")
