"""Tables are read and checked before any work: what cannot be is a sentence that names the nearest known word."""

import re
from pathlib import Path
from typing import Any

import pytest
from small_table import small_table, toml
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.experiments.presets import CONTROLS, PRESETS
from dsmr.experiments.table import DECIDED, Table
from dsmr.model.schedule import MemorySchedule

ROOT = Path(__file__).resolve().parents[2]


def test_a_table_becomes_training_settings_that_differ_in_schedule_and_seed_alone() -> None:
    table = Table.parse(small_table(cells={"full": [0, 2], "none": [5]}))
    assert [cell.key for cell in table.cells] == ["full-s0", "none-s5", "full-s2"]
    configs = [table.config(cell, "data", "out").to_dict() for cell in table.cells]
    for config in configs[1:]:
        assert {name for name in config if config[name] != configs[0][name]} <= {"schedule", "seed"}
    assert configs[0]["d_model"] == 16
    assert configs[0]["threads"] == 1
    assert MemorySchedule.parse(configs[2]["schedule"]).horizons == (64, 64)
    assert configs[1]["schedule"] == "none(layers=2)"


def test_own_models_change_what_they_say() -> None:
    models = {
        "two_scale-recall": {"preset": "two_scale", "recall": 3},
        "mine": {"schedule": "explicit(horizons=[32, 4])", "lr": 0.5},
    }
    table = Table.parse(small_table(models=models, cells={"two_scale-recall": [0], "mine": [0]}))
    recall, mine = (table.config(cell, "data", "out") for cell in table.cells)
    assert (recall.recall, recall.schedule) == (3, str(PRESETS["two_scale"].schedule(table.size)))
    assert (mine.lr, mine.recall) == (0.5, 0)
    assert table.cells[0].model.title == "two_scale-recall"
    assert Table.parse(table.written) == table


def section(name: str, **more: Any) -> dict[str, Any]:
    return small_table(**{name: {**small_table()[name], **more}})


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (small_table(cels={}), "unknown key 'cels': did you mean 'cells'"),
        (small_table(cells={"two_scales": [0]}), "unknown preset 'two_scales': did you mean 'two_scale'"),
        (small_table(cells={}), "names no cell"),
        (small_table(cells={"full": 0}), "needs a list of seeds"),
        (small_table(cells={"full": [1, 1]}), "names a seed twice"),
        (small_table(cells={"full": [-1]}), "needs a list of seeds"),
        (section("train", leaning_rate=1), r"\[train\] has the unknown key 'leaning_rate'"),
        (section("train", step=1), "did you mean 'steps'"),
        (section("train", schedule="none(layers=2)"), "unknown key 'schedule'"),
        (section("train", lr=-1.0), "lr must be above 0"),
        (section("train", lr="fast"), r"\[train\] lr must be a number, but it is 'fast'"),
        (section("train", min_lr="low"), r"\[train\] min_lr must be a number, but it is 'low'"),
        (section("train", betas=3), r"\[train\] betas must be two numbers, but it is 3"),
        (section("train", betas=[0.9, True]), r"\[train\] betas must be two numbers, but it is \[0.9, True\]"),
        (section("train", steps=2.5), r"\[train\] steps must be a whole number, but it is 2.5"),
        (section("train", augment=1), r"\[train\] augment must be true or false, but it is 1"),
        (section("train", position=[1]), r"\[train\] position must be a text, but it is \[1\]"),
        (section("size", layer=3), "did you mean 'layers'"),
        (section("size", layers="three"), "layers must be a whole number, but it is 'three'"),
        (section("size", n_heads=3, few_heads=2), "multiple of few_heads"),
        (section("size", length=1, short=0), "smaller than a token a layer"),
        (section("measure", split="valid"), "unknown split 'valid': did you mean 'validation'"),
        (section("measure", retain=[0]), "retain must be a list"),
        (section("measure", retain=[True]), r"retain must be a list of numbers of tokens, but it is \[True\]"),
        (section("measure", dtype="float23"), r"\[measure\] has the unknown dtype 'float23': did you mean 'float32'"),
        (section("measure", dtype=16), r"\[measure\] dtype must be a text, but it is 16"),
        (section("measure", krcu={"reste": 8}), "krcu has the unknown key 'reste': did you mean 'reset'"),
        (section("measure", krcu={"reset": 0}), "reset of KRCU must be at least 1"),
        (section("data", composed={}), "either the path of a corpus or"),
        (small_table(data={"composed": {"piece": 1}}), "did you mean 'pieces'"),
        (small_table(data={"path": 3}), r"\[data\] path must be a text, but it is 3"),
        (small_table(about=["a"]), r"about must be a text, but it is \['a'\]"),
        (small_table(models={"own": {"preset": 3}}), r"\[models.own\] preset must be a text, but it is 3"),
        (small_table(models={"own": {"preset": [3]}}), r"\[models.own\] preset must be a text, but it is \[3\]"),
        (small_table(models={"own": {"schedule": 3}}), r"\[models.own\] schedule must be a text, but it is 3"),
        (
            small_table(models={"own": {"preset": "full", "betas": 3}}),
            r"\[models.own\] betas must be two numbers, but it is 3",
        ),
        (small_table(models={"full": {"preset": "full"}}), "needs a name of its own"),
        (small_table(models={"own": {}}), "needs either a preset or a schedule"),
        (small_table(models={"own": {"schedule": "none(layers=3)"}}), "has 3 layers, but the size of the table has 2"),
        (small_table(models={"own": {"schedule": "nun(layers=2)"}}), "schedule 'nun' is unknown"),
        (small_table(models={"own": {"preset": "ful"}}), "did you mean 'full'"),
        (small_table(name=""), "needs a name"),
    ],
)
def test_what_cannot_be_is_a_sentence(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Table.parse(table)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the table .*missing\.toml"):
        Table.load(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(UserError, match=r"bad\.toml is not a TOML file"):
        Table.load(tmp_path / "bad.toml")
    (tmp_path / "small.toml").write_text(toml(small_table(cells={"ful": [0]})))
    with pytest.raises(UserError, match=r"small\.toml: \[cells\] has the unknown preset 'ful'"):
        Table.load(tmp_path / "small.toml")


def test_the_program_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(toml(section("train", leaning_rate=1)))
    for arguments, words in (
        (["run", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")], "unknown key 'leaning_rate'"),
        (["run", str(tmp_path / "no.toml"), "--out", str(tmp_path / "out")], "cannot read the table"),
        (["report", str(tmp_path / "out")], "there are no results at"),
        (["list", "--length", "1", "--short", "0"], "smaller than a token a layer"),
    ):
        result = CliRunner().invoke(app, ["experiments", *arguments])
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_some_cells_may_be_asked_for_by_model_or_by_name() -> None:
    table = Table.parse(small_table(cells={"full": [0, 2], "none": [5], "fhcr": [0, 1]}))
    assert [cell.key for cell in table.only(["fhcr", "full-s2"]).cells] == ["fhcr-s0", "full-s2", "fhcr-s1"]
    assert table.only(["none"]).settings() == table.settings()  # a folder may be gone on with in parts
    with pytest.raises(UserError, match=r"has no cell and no model 'ful': did you mean 'full'"):
        table.only(["none", "ful"])


def test_cells_that_have_a_row_are_left_out_and_rows_of_others_refused() -> None:
    models = {"mine": {"preset": "full", "lr": 0.25}}
    table = Table.parse(small_table(models=models, cells={"full": [0, 1], "mine": [0]}))
    full, mine = table.cells[0], table.cells[1]
    row = {"table": "small", "model": "full", "seed": 0, "settings": {}, "steps": table.train["steps"]}
    row |= {"schedule": str(full.model.schedule), "kv_bytes": table.size.bytes(full.model.schedule)}
    assert [cell.key for cell in table.without([row]).cells] == ["mine-s0", "full-s1"]
    assert table.without([{**row, "seed": 7}, {**row, "model": "gone"}]).cells == table.cells
    assert table.without([{**row, "train": dict(table.train)}]).cells == table.without([row]).cells
    of_mine = {**row, "model": "mine", "settings": mine.model.settings}
    assert [cell.key for cell in table.without([row, of_mine]).cells] == ["full-s1"]
    for name, value, words in (
        ("table", "large", "full-s0 is of the table large, not of small"),
        ("schedule", "none(layers=2)", "full-s0 has the schedule none"),
        ("settings", {"lr": 0.5}, "full-s0 has the settings {'lr': 0.5}, but the table has {}"),
        ("steps", 7, "full-s0 has the steps 7"),
        ("kv_bytes", 2 * row["kv_bytes"], f"full-s0 has the kv_bytes {2 * row['kv_bytes']}, but the table has"),
        ("train", {**table.train, "lr": 0.5}, "full-s0 was trained with lr = 0.5, but the table has 0.01"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            table.without([{**row, name: value}])


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_can_be_read_and_hold_the_papers_table(path: Path) -> None:
    table = Table.load(path)
    assert table.name == path.stem
    if path.stem == "maestro-speed":  # a sweep over settings, of one model
        assert {str(cell.model.schedule) for cell in table.cells} == {str(table.cells[0].model.schedule)}
    else:
        assert {cell.model.name for cell in table.cells} >= {*PRESETS, *CONTROLS}
    assert set(DECIDED).isdisjoint(table.train)
    assert all(table.config(cell, "", "").steps for cell in table.cells)  # not by the clock: all read the same
