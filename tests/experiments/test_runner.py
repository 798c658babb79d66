"""Runs of tables end with the same rows however often they are killed, and two runners never share a folder."""

import json
import os
import signal
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from made_up_rows import made_up
from rich.console import Console
from several_ranks import in_threads, start_ranks
from small_table import small_corpus, small_table, toml
from soak import BY_HAND, FULL
from tiny_corpus import tiny_corpus
from typer.testing import CliRunner
from warm_start import WarmStart

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.console.files import read_json
from dsmr.console.locks import locked
from dsmr.console.ranks import Ranks
from dsmr.experiments import runner
from dsmr.experiments.cell import CellFolder, measured_pieces, run_cell
from dsmr.experiments.runner import run_table
from dsmr.experiments.table import Measure, Table
from dsmr.training import loop
from dsmr.training.side_by_side import last_record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus"
    small_corpus(path)
    return path


def quiet() -> Console:
    return Console(file=StringIO())


def row_of(table: Table, out: Path, place: int = 0) -> dict[str, Any]:
    """The row of a cell, run in this process."""
    cell = table.cells[place]
    folder = CellFolder(out, cell.key)
    assert run_cell(table, cell, str(table.data), folder, quiet()) == 0
    return json.loads(folder.row.read_text())


def same(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row does not depend on the machine."""
    return {name: value for name, value in row.items() if name not in ("measured", "seal")}


@pytest.mark.slow
def test_a_cell_becomes_a_row_of_all_that_was_measured(data: Path, tmp_path: Path) -> None:
    table = Table.parse(small_table(data))
    row = row_of(table, tmp_path / "out")
    assert (row["table"], row["model"], row["seed"], row["steps"]) == ("small", "two_scale", 0, 24)
    assert row["trained_tokens"] == 24 * 3 * 8
    assert row["train"] == table.train
    assert row["kv_bytes"] == 2 * 2 * 8 * 2 * (64 + 8)
    assert row["nats_per_note"] > 0
    assert row["krcu"]["pieces"] + row["krcu"]["too_short"] == row["pieces"] == 4
    assert [kept["k"] for kept in row["retain"]] == [16, 32]
    assert [tokens for tokens, _ in row["learning"]] == [240, 480, 576]
    assert row["measured"]["tokens_per_second"] > 0
    assert row["measured"]["device_type"] == "cpu"
    assert row["measured"]["peak_bytes"] >= 0
    again = row_of(table, tmp_path / "out")  # all is done: nothing but the row is made anew
    assert same(again) == same(row)
    assert same(row_of(table, tmp_path / "other")) == same(row)


@pytest.mark.slow
def test_bins_beyond_the_longest_piece_do_not_lose_the_row(data: Path, tmp_path: Path) -> None:
    """Pieces that are long enough for the reset may all end within the first bin, after an hour of training."""
    table = Table.parse(small_table(data, measure={"krcu": {"reset": 8, "width": 100_000, "count": 3}}))
    found = row_of(table, tmp_path)["krcu"]
    assert found["tail"]["mean"] is None
    assert found["auc"] == found["reset_bin"]
    assert [one["delta"]["mean"] is None for one in found["bins"]] == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retain_uniform", "retain_random"])
def test_a_retained_cell_is_the_same_row_after_a_stop(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the several segments of a call is read by itself; stopped after 13 steps, it goes on from the tenth."""
    settings = {**small_table()["train"], "segments_per_step": 3}
    table = Table.parse(small_table(data, cells={name: [0]}, train=settings))
    row = row_of(table, tmp_path / "whole")
    assert row["schedule"] == f"uniform(layers=2, horizon=36, retention={name.removeprefix('retain_')!r})"
    assert row["kv_bytes"] == 2 * 2 * 8 * 2 * 72
    assert all(kept["delta"]["mean"] is not None for kept in row["retain"])
    step = loop._Training._train_step

    def broken(training: Any) -> None:
        if training.pace.step == 13:
            raise KeyboardInterrupt
        step(training)

    monkeypatch.setattr(loop._Training, "_train_step", broken)
    with pytest.raises(KeyboardInterrupt):
        row_of(table, tmp_path / "stopped")
    monkeypatch.undo()
    assert same(row_of(table, tmp_path / "stopped")) == same(row)


def test_pieces_to_measure_on_are_the_same_for_all(data: Path) -> None:
    from dsmr.corpus.store import Corpus

    corpus = Corpus.open(data)
    some = measured_pieces(corpus, Measure(tokens=700))
    assert 0 < len(some) < len(measured_pieces(corpus, Measure())) == 4
    assert (some == measured_pieces(corpus, Measure(tokens=700))).all()
    assert len(measured_pieces(corpus, Measure(tokens=1))) == 1


def test_what_the_corpus_cannot_serve_is_said_before_any_work(data: Path, tmp_path: Path) -> None:
    def refused(sentence: str, out: str = "out", **more: Any) -> None:
        with pytest.raises(UserError, match=sentence):
            run_table(Table.parse({**small_table(data), **more}), tmp_path / out, console=quiet())

    refused("too short for a reset at token 8,192", measure={"krcu": {}})
    refused("middle of a segment of 8 tokens", measure={"krcu": {"reset": 12}})
    long = {"long": {"preset": "none", "segment_length": 48}}
    both = {"models": long, "cells": {"none": [0], "long": [0]}}
    refused("long cannot be measured: the reset at token 64 lies in the middle of a segment of 48 tokens", **both)
    refused("unknown dtype 'float23'", measure={"dtype": "float23"})
    refused("long enough for a return after 10,000", measure={"returns": {"nearest": 10000}})
    refused("there is no corpus at", data={"path": str(tmp_path / "nowhere")})
    assert not (tmp_path / "out" / "cells").exists()
    (tmp_path / "file").write_text("mine")
    refused("it is a file", out="file")


def test_a_folder_of_another_table_or_corpus_is_left_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner._Runner, "run", lambda self: None)  # the folder is what matters, not its cells
    run_table(Table.parse(small_table(data)), tmp_path / "out", console=quiet())
    changed = {**small_table()["train"], "lr": 0.5}
    with pytest.raises(UserError, match=r"another table: its train lr is 0\.01, but 0\.5 was asked for"):
        run_table(Table.parse(small_table(data, train=changed)), tmp_path / "out", console=quiet())
    tiny_corpus(tmp_path / "tiny", beat_res=12)
    plain = {"retain": [16]}
    out = tmp_path / "plain"
    run_table(Table.parse(small_table(data, measure=plain)), out, console=quiet())
    table = Table.parse(small_table(data, measure=plain))
    with pytest.raises(UserError, match="its corpus name is small, but tiny was asked for"):
        run_table(table, out, data=tmp_path / "tiny", console=quiet())


def test_two_runners_do_not_share_a_folder(data: Path, tmp_path: Path) -> None:
    table = Table.parse(small_table(data))
    with locked(tmp_path / ".lock", wait=False) as alone:
        assert alone
        with pytest.raises(UserError, match=rf"another runner works in .* \(process {os.getpid()}\)"):
            run_table(table, tmp_path, console=quiet())
    with locked(tmp_path / ".lock", wait=False) as free:
        assert free


@pytest.mark.slow
def test_a_checkpoint_of_another_tokeniser_is_a_sentence(data: Path, tmp_path: Path) -> None:
    table = Table.parse(small_table(data, measure={}))
    row_of(table, tmp_path / "out")
    folder = CellFolder(tmp_path / "out", table.cells[0].key)
    tiny_corpus(tmp_path / "tiny", beat_res=12)
    with pytest.raises(UserError, match="it was trained with tokeniser"):
        run_cell(table, table.cells[0], str(tmp_path / "tiny"), folder, quiet())


DEADLY = """
import json, os, signal, sys
from pathlib import Path
from dsmr.experiments.cell import work

name, count = sys.argv[4].split(":")
replace, seen = os.replace, []
def deadly(source, target):
    seen.append(Path(target).name)
    if seen.count(name) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = deadly
if __name__ == "__main__":
    work(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[5]))
"""


@pytest.mark.soak
def test_a_cell_killed_anywhere_ends_with_the_same_row(data: Path, tmp_path: Path, warm_start: WarmStart) -> None:
    """Slow for its processes: killed while each kind of file is written, before it is in its place."""
    written = small_table(data)
    table = Table.parse(written)
    expected = same(row_of(table, tmp_path / "whole"))
    out, key = tmp_path / "out", table.cells[0].key

    def attempt(die_at: str) -> int:
        arguments = [json.dumps(written), key, str(data), die_at, str(out)]
        return warm_start.run(arguments, code=DEADLY).returncode

    for die_at in ("train.json:1", "last.pt:2", "memory.json:1", "row.json:1"):
        assert attempt(die_at) == -signal.SIGKILL
        assert not CellFolder(out, key).row.exists()
    assert attempt("nothing:1") == 0
    assert same(json.loads(CellFolder(out, key).row.read_text())) == expected
    assert attempt("row.json:1") == 0  # a row is final


def trained(out: Path) -> int:
    """Steps that all cells have done together, as their metrics tell."""
    records = (last_record(path, "train") for path in out.glob("cells/*/run/metrics.jsonl"))
    return sum(record["step"] for record in records if record is not None)


@pytest.mark.soak
def test_a_run_killed_several_times_ends_with_the_same_rows(data: Path, tmp_path: Path, warm_start: WarmStart) -> None:
    """Slow for its processes: the runner is killed, its cells save and end by themselves, and it is begun again.

    Killed while a cell trains, and asked to stop; with DSMR_SOAK=full twenty times, all along the run.
    """
    kills = 20 if FULL else 2
    longer = {**small_table()["train"], "steps": 20 * kills, "eval_every": 25}
    written = small_table(data, cells={"two_scale": [0], "none": [3]}, train=longer)
    (tmp_path / "small.toml").write_text(toml(written))
    table = Table.parse(written)
    expected = [same(row_of(table, tmp_path / "whole", place)) for place in range(2)]
    out = tmp_path / "out"
    command = ["experiments", "run", str(tmp_path / "small.toml"), "--out", str(out)]
    for number in range(kills):
        before, runner = trained(out), warm_start.start(command)
        until = time.monotonic() + 120
        while trained(out) <= before + 4 and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(runner.pid, signal.SIGINT if number % 2 else signal.SIGKILL)
        assert runner.wait().returncode == (130 if number % 2 else -signal.SIGKILL)
    done = warm_start.run([*command, "--jobs", "2"])
    assert done.returncode == 0, done.stderr
    assert "2 of 2 cells are finished" in done.stderr
    for cell, row in zip(table.cells, expected, strict=True):
        assert same(json.loads(CellFolder(out, cell.key).row.read_text())) == row
    began = time.monotonic()
    assert run_table(table, out, console=quiet()).finished == ["two_scale-s0", "none-s3"]
    assert time.monotonic() - began < 2  # nothing is done twice
    report = CliRunner().invoke(app, ["experiments", "report", str(out), "--rows", str(tmp_path / "rows.json")])
    assert report.exit_code == 0
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2


@pytest.mark.soak
def test_a_cell_that_fails_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    models = {"wild": {"preset": "none", "lr": 1e30, "warmup": 0}}
    table = Table.parse(small_table(data, models=models, cells={"wild": [0], "none": [0]}))
    result = run_table(table, tmp_path / "out", jobs=2, console=quiet())
    assert result.finished == ["none-s0"]
    assert list(result.failed) == ["wild-s0"]
    assert "at step" in result.failed["wild-s0"]
    assert result.exit_code == 1


class Done:
    """A process that ends at once, and leaves the row of its cell, or none."""

    exitcode = 1

    def __init__(self, target: Any, args: tuple[Any, ...]) -> None:
        self.key, self.out = args[1], args[3]

    def start(self) -> None:
        began.append((self.key, os.environ.get("CUDA_VISIBLE_DEVICES"), "RANK" in os.environ))
        folder = CellFolder(self.out, self.key)
        folder.path.mkdir(parents=True)
        if not self.key.startswith("wild"):
            folder.row.write_text('{"nats_per_note": 1.0}')

    def is_alive(self) -> bool:
        return False

    def join(self) -> None: ...

    terminate = join


began: list[tuple[str, str | None, bool]] = []


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells that take no time, on a machine of three GPUs of which two may be seen."""
    began.clear()
    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Done)
    monkeypatch.setattr("dsmr.experiments.runner.TURN", 0.0)
    monkeypatch.setattr("dsmr.experiments.runner.read_row", read_json)  # rows that say nothing
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    monkeypatch.setenv("RANK", "0")


def eight_cells(data: Path, device: str = "auto") -> Table:
    train = {**small_table()["train"], "device": device}
    models = {"wild": {"preset": "none"}}
    return Table.parse(small_table(data, train=train, models=models, cells={"wild": [0], "none": list(range(7))}))


def test_cells_at_once_are_spread_over_the_gpus(data: Path, tmp_path: Path, no_work: None) -> None:
    result = run_table(eight_cells(data), tmp_path / "out", jobs=4, console=quiet())
    assert [gpu for _, gpu, _ in began] == ["2", "0", "2", "0"] * 2
    assert not any(torchrun for _, _, torchrun in began)  # each trains by itself
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["RANK"]) == ("2,0", "0")
    assert (len(result.finished), list(result.failed), result.left) == (7, ["wild-s0"], [])
    began.clear()
    run_table(eight_cells(data, "cpu"), tmp_path / "cpu", jobs=8, console=quiet())
    assert {gpu for _, gpu, _ in began} == {"2,0"}


def test_the_program_runs_the_cells_that_it_is_asked_for(data: Path, tmp_path: Path, no_work: None) -> None:
    table, out = tmp_path / "small.toml", str(tmp_path / "out")
    table.write_text(toml(small_table(data, cells={"full": [0], "none": [0, 1, 2]})))
    rows = [made_up("none", 0, 1.0, table="small", settings={}, schedule="none(layers=2)", kv_bytes=0, steps=24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def asked(*more: str, code: int = 0) -> str:
        began.clear()
        result = CliRunner().invoke(app, ["experiments", "run", str(table), "--out", out, *more])
        assert result.exit_code == code, result.output
        return result.stderr if code else result.stdout

    asked("--only", "none-s2, full")
    assert [key for key, _, _ in began] == ["full-s0", "none-s2"]
    asked("--finished", str(tmp_path / "rows.json"))
    assert [key for key, _, _ in began] == ["none-s1"]
    assert "nothing is left to run" in asked("--only", "none-s0", "--finished", str(tmp_path / "rows.json"))
    assert "no cell and no model 'nine'" in asked("--only", "nine", code=1)
    rows[0]["steps"] = 25
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "rows.json: the row of none-s0 has the steps 25" in asked("--finished", str(tmp_path / "rows.json"), code=1)
    assert not began


def test_ranks_deal_the_cells_and_all_know_how_they_ended(
    data: Path, tmp_path: Path, no_work: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lock, of the first rank; what was finished stays so, and no cell is begun twice."""
    table, out = eight_cells(data, "cpu"), tmp_path / "out"
    folder = CellFolder(out, "none-s3")
    folder.path.mkdir(parents=True)
    folder.row.write_text("{}")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def work(ranks: Ranks) -> runner.RunResult:
        return run_table(table, out, console=quiet(), ranks=ranks)

    results = in_threads(3, work)
    assert results[0] == results[1] == results[2]
    assert sorted(results[0].finished) == [f"none-s{seed}" for seed in range(7)]
    assert (list(results[0].failed), results[0].left, results[0].exit_code) == (["wild-s0"], [], 1)
    assert sorted(key for key, _, _ in began) == sorted({cell.key for cell in table.cells} - {"none-s3"})
    assert not (out / ".lock").exists()


@pytest.mark.soak
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=BY_HAND)])
def test_ranks_end_with_the_rows_of_one_process(
    data: Path, tmp_path: Path, warm_start: WarmStart, killed: bool
) -> None:
    """Two processes, each with a cell, which is a process too. If the second is killed, the same command goes on."""
    longer = {**small_table()["train"], "steps": 60}
    written = small_table(data, cells={"two_scale": [0], "none": [3]}, train=longer)
    (tmp_path / "small.toml").write_text(toml(written))
    table = Table.parse(written)
    expected = [same(row_of(table, tmp_path / "whole", place)) for place in range(2)]
    out = tmp_path / "out"
    command = ["experiments", "run", str(tmp_path / "small.toml"), "--out", str(out)]
    if killed:
        first, second = start_ranks(warm_start, command)
        until = time.monotonic() + 60
        while time.monotonic() < until and not CellFolder(out, "none-s3").run.exists():
            time.sleep(0.1)
        second.send(signal.SIGKILL)
        ended = first.wait()
        assert ended.returncode == 1
        assert "rank 0 of 2 ends because another one did" in ended.stderr
    first, second = (process.wait() for process in start_ranks(warm_start, command))
    assert "2 of 2 cells are finished" in first.stderr
    assert (second.stdout, second.stderr) == ("", "")
    for cell, row in zip(table.cells, expected, strict=True):
        assert same(json.loads(CellFolder(out, cell.key).row.read_text())) == row
