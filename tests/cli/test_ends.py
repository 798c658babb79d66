"""How the programs end: the code of a signal is the same in every verb, and no reader of the output loses the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from silent_port import SilentPort
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.stopping import Interruption, graceful_stop, raise_when_signalled
from dsmr.console.terminal import command

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model's run directory."""
    pytest.importorskip("miditok")
    from dsmr.model.config import DSMRConfig
    from dsmr.model.transformer import DSMRModel
    from dsmr.music.tokenizer import vocabulary_of

    vocabulary, folder = vocabulary_of("tsd"), tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    DSMRModel(DSMRConfig(vocabulary.size, "uniform(layers=1, horizon=8)", d_model=16, n_heads=2)).save_pretrained(
        folder
    )
    vocabulary.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    from small_scores import score_of

    from dsmr.music.tokenizer import write_midi

    path = tmp_path_factory.mktemp("piece") / "piece.mid"
    write_midi(path, score_of([(0.25 * place, 0.2, 60 + place % 12) for place in range(24)]))
    return path


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("verb", ["generate", "play"])
def test_a_signal_has_the_same_code_in_every_verb(verb, number, run, piece, tmp_path, monkeypatch):
    from dsmr.generation.stepping import Step

    honest, calls = Step.__call__, []

    def step(self, tokens):
        calls.append(tokens)
        if len(calls) == 30:
            os.kill(os.getpid(), number)
        return honest(self, tokens)

    monkeypatch.setattr(Step, "__call__", step)
    monkeypatch.setattr("dsmr.live.performance.OutputPort", lambda *given: SilentPort())
    out = tmp_path / "on.mid"
    arguments = [verb, run, "--prompt", piece, "--tokens", 400, "--out", out, "--seed", 4, "--device", "cpu"]
    arguments += ["--look-ahead", 1000] if verb == "play" else []  # else it would wait for the music to sound
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 128 + number, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("dsmr: interrupted; ")
    assert out.is_file()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_outside_the_steps_of_a_job_is_raised_and_has_its_code(number, capsys):
    @command
    def work() -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    former = {one: signal.getsignal(one) for one in NUMBERS}
    try:
        raise_when_signalled()
        with pytest.raises(SystemExit) as left:
            work()
        with graceful_stop() as stop:
            os.kill(os.getpid(), number)
            assert stop.signal == number
            with pytest.raises(KeyboardInterrupt) as second:
                signal.raise_signal(number)
    finally:
        for one, handler in former.items():
            signal.signal(one, handler)
    assert left.value.code == 128 + number
    assert capsys.readouterr().err == "dsmr: interrupted\n"
    assert number == signal.SIGINT or isinstance(second.value, Interruption)


def program(line: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A line of the shell in which `dsmr` is the program."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    line = f'set -o pipefail; dsmr() {{ "{sys.executable}" -m dsmr "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment, timeout=120, check=False, **options
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("dsmr experiments list >&-", 0, ""),
        ("dsmr experiments list >&- 2>&- <&-", 0, ""),
        ("dsmr experiments list | true", 141, ""),
        ("dsmr experiments list > /dev/full", 1, "dsmr: cannot write the output: no space left on device\n"),
        ("dsmr budget --schedule nothing 2>&-", 1, ""),
        ("dsmr budget --schedule nothing 2> /dev/full", 1, ""),
        ("PYTHONUTF8=0 PYTHONIOENCODING=ascii dsmr experiments list > /dev/null", 0, ""),
    ],
)
def test_whoever_reads_the_output_the_code_is_the_same(line, code, said):
    done = program(line)
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code"),
    [("--stream | head -1", 141), ("--stream > /dev/full", 1), ("2>&1 >/dev/null | true", 0), (">&- 2>&-", 0)],
)
def test_music_is_whole_whoever_reads_what_is_printed(shell, code, run, piece, tmp_path):
    """A closed pipe or a full disk behind stdout ends the printing, not the playing."""
    out, kept = tmp_path / "on.mid", tmp_path / "kept"
    line = f"dsmr generate {run} --prompt {piece} --tokens 300 --out {out} --save-state {kept} --device cpu --seed 4"
    done = program(f"{line} {shell}", env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
    from dsmr.music.tokenizer import read_midi

    assert sum(len(track.notes) for track in read_midi(out).tracks) > 60
    assert kept.is_file()
    assert out.with_suffix(".png").is_file()


@pytest.mark.slow
def test_a_terminated_program_leaves_no_file_half_written(tmp_path):
    pytest.importorskip("miditok")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["prepare", "composed", "--pieces", "400", "--jobs", "1", "--out", tmp_path / "made"]
    process = subprocess.Popen([sys.executable, "-m", "dsmr", *map(str, arguments)], env=environment, stderr=-1)
    with process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        said = process.stderr.read().decode()
    assert process.returncode == 143
    assert said.strip().splitlines()[-1] == "dsmr: interrupted"
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".part")]
