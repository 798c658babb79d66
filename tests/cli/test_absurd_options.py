"""No number that an option takes ends in a traceback: every numeric option of every verb, with absurd values.

Takes minutes in all, because what is no error is let compute for `ENOUGH` seconds.
"""

import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from bounded import bounded
from known_ceilings import KNOWN
from silent_port import SilentPort
from soak import FULL
from typer.main import get_command
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.stopping import Interruption
from dsmr.demo.run import DemoSize

VALUES = ["-1", "0", "-0.0", "1e-320", "2147483648", "9223372036854775808", "1e29", "nan", "inf", "9" * 5000]
THREADS = ["20000", "100000"]  # few enough for an int: they ended the process, not the verb
ENOUGH = 3.0 if FULL else 1.0  # seconds: what still computes then was no error, and is ended as SIGTERM ends it
ROOM = 3 << 30  # bytes beyond what the process has: what takes more must have been refused before
SCHEDULE = "uniform(layers=1, horizon=16)"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus, a run and a prompt."""
    pytest.importorskip("miditok")
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # now: what is interrupted while it is imported stays half a module  # noqa: F401
    from small_scores import score_of
    from small_soundfont import write_soundfont
    from tiny_corpus import tiny_corpus

    from dsmr.model.config import DSMRConfig
    from dsmr.model.transformer import DSMRModel
    from dsmr.music.tokenizer import write_midi

    folder = tmp_path_factory.mktemp("absurd")
    vocabulary = tiny_corpus(folder / "corpus").vocabulary
    torch.manual_seed(0)
    DSMRModel(DSMRConfig(vocabulary.size, SCHEDULE, d_model=16, n_heads=1, segment_length=16)).save_pretrained(
        folder / "run"
    )
    vocabulary.save(folder / "run" / "tokenizer.json")
    write_soundfont(folder / "sine.sf2")
    write_midi(folder / "p.mid", score_of([(0.25 * place, 0.2, 60 + place % 12) for place in range(24)]))
    return folder


def commands() -> dict[str, list[str]]:
    """Every verb, and its options that take a number."""

    def walk(group, name):
        for verb, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, f"{verb} ")
            else:
                yield name + verb, [option.opts[0] for option in command.params if _numeric(option)]

    return dict(walk(get_command(app), ""))


def _numeric(option) -> bool:
    if option.param_type_name != "option" or option.is_flag:
        return False
    written = str(option.type_descriptor.annotation)
    return "int" in written or "float" in written


SMALL = [
    *("--schedule", SCHEDULE, "--d-model", "16", "--n-heads", "1", "--segment-length", "16", "--batch-size", "1"),
    *("--steps", "2", "--device", "cpu", "--threads", "1"),
]
ARGUMENTS = {
    "train": ["--data", "{0}/corpus", "--out", "{0}/trained", "--overwrite", *SMALL],
    "eval": ["{0}/run", "--data", "{0}/corpus", "--device", "cpu"],
    "generate": ["{0}/run", "--prompt", "{0}/p.mid", "--out", "{0}/o.mid", "--tokens", "3", "--device", "cpu"],
    "play": ["{0}/run", "--prompt", "{0}/p.mid", "--tokens", "3", "--device", "cpu"],
    "render": ["{0}/p.mid", "--out", "{0}/p.wav", "--soundfont", "{0}/sine.sf2"],
    "budget": ["--schedule", SCHEDULE],
    "profile": ["--schedule", SCHEDULE, "--out", "{0}/profile", "--device", "cpu", "--budget", "64MiB"],
    "demo": ["--out", "{0}/demo"],
    "export": ["{0}/run", "--out", "{0}/exported"],
    "prepare composed": ["--out", "{0}/composed", "--overwrite", "--pieces", "3", "--jobs", "1"],
    "prepare midi": ["{0}", "--out", "{0}/midi", "--overwrite"],
    "prepare maestro": ["{0}/nothing.zip", "--out", "{0}/maestro"],
    "experiments list": [],
    "experiments search": ["{0}/run", "--data", "{0}/corpus", "--out", "{0}/search", "--device", "cpu"],
    "experiments run": ["{0}/nothing.toml", "--out", "{0}/results"],
}


def a_short_demo(monkeypatch) -> None:
    """The demo with a tiny corpus and a speed that is known, up to where its two models would begin to train: what the
    numbers come to is worked out by then, and training's own are those of `train`."""

    def leave(*given):
        raise Interruption(signal.SIGTERM)

    monkeypatch.setattr("dsmr.demo.run.DemoSize", lambda: DemoSize(pieces=6, piece_minutes=0.2))
    monkeypatch.setattr("dsmr.demo.run.steps_a_second", lambda *given: 7.0)
    monkeypatch.setattr("dsmr.demo.run.train_side_by_side", leave)


@pytest.mark.soak
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds memory as Linux does")
@pytest.mark.parametrize(("verb", "option"), [(verb, option) for verb, each in commands().items() for option in each])
def test_no_number_ends_in_a_traceback(verb, option, place, monkeypatch):
    monkeypatch.setattr("dsmr.live.performance.OutputPort", lambda *given: SilentPort())
    monkeypatch.setattr("dsmr.live.performance.listen", lambda *given: [])
    monkeypatch.setattr("dsmr_kernels.costing.ceilings.ceilings_of", lambda *given, **options: KNOWN)
    monkeypatch.setattr("dsmr.profiling.profile.measured_row", lambda job: {"error": "not measured"})
    a_short_demo(monkeypatch)
    base = [argument.format(place) for argument in ARGUMENTS[verb]]
    if option in base:
        at = base.index(option)
        del base[at : at + 2]
    threads = torch.get_num_threads()
    for value in VALUES + THREADS * (option == "--threads"):
        try:
            with bounded(ROOM, ENOUGH, Interruption(signal.SIGTERM)):
                result = CliRunner().invoke(app, [*verb.split(), *base, option, value])
        except Interruption:  # as the runner of the test began or ended: the program has nothing to say of it
            continue
        finally:
            torch.set_num_threads(threads)
        said = result.stderr.strip().splitlines()
        trace = "" if result.exception is None else "".join(traceback.format_exception(result.exception)[-4:])
        ends = (0, 1, 2, 130, 143)  # 130: the time was up before the verb began, on a machine that stood still
        assert result.exit_code in ends, f"{verb} {option} {value[:40]}: {result.exit_code} {trace}"
        assert isinstance(result.exception, SystemExit | None), f"{verb} {option} {value[:40]}: {trace}"
        if result.exit_code == 1:
            assert said[-1].startswith("dsmr: "), f"{verb} {option} {value[:40]}: {said[-1]}"
            assert len(said[-1]) < 1000, f"{verb} {option} {value[:40]}: {said[-1][:200]}"
