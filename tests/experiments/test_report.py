"""The report: one table of all rows, seeds put together, and pictures of what was measured."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from made_up_rows import made_up
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.experiments.presets import PRESETS
from dsmr.experiments.report import write_report
from dsmr.experiments.rows import Figure, lines_of, rank_correlation, read_rows

ROOT = Path(__file__).resolve().parents[2]
KEPT = sorted((ROOT / "experiments" / "results").glob("*.json"))


ROWS = [made_up("none", 0, 12.0), made_up("two_scale", 1, 10.0), made_up("two_scale", 0, 11.0), made_up("mine", 0, 9.0)]


def test_seeds_become_a_mean_and_a_spread(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    rows = read_rows(tmp_path / "rows.json")
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("two_scale", 0),
        ("two_scale", 1),
        ("none", 0),
        ("mine", 0),
    ]
    two_scale, none, _ = lines_of(rows)
    nats = two_scale.figures["nats a note"]
    assert nats is not None
    assert (nats.mean, nats.seeds) == (10.5, 2)
    assert nats.spread == pytest.approx(0.5**0.5)
    assert none.figures["perplexity"].text(1) == "24.0"  # type: ignore[union-attr]
    assert nats.text(2) == "10.50 ± 0.71"
    assert Figure(-0.00001, 0.0, 1).text(4) == "0.0000"
    assert two_scale.retain[1024].mean == pytest.approx(0.105)


def test_rank_order_is_held_against_the_papers() -> None:
    def order(**nats: float) -> tuple[float, int] | None:
        return rank_correlation(
            lines_of([made_up(name, 0, n) for name, n in nats.items()]), "nats a note", "perplexity"
        )

    assert order(full=2.0, two_scale=1.0, fhcr=3.0, none=0.0) == (pytest.approx(1.0), 3)  # 5.98, 5.96, 6.01
    assert order(full=2.0, two_scale=3.0, fhcr=1.0) == (pytest.approx(-1.0), 3)
    assert order(full=2.0, two_scale=3.0) is None
    assert order(full=2.0, two_scale=2.0, fhcr=2.0) is None
    found = order(reverse_two_scale=1.0, fhcr=2.0, full=0.0)  # two of the paper are equal
    assert found is not None
    assert found[0] == pytest.approx(0.75**0.5)


def test_the_report_has_a_table_and_pictures(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    arguments = [str(tmp_path / "rows.json"), "--out", str(tmp_path / "out"), "--rows", str(tmp_path / "kept.json")]
    result = CliRunner().invoke(app, ["experiments", "report", *arguments])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| two_scale | 2 | 10.500 ± 0.707 |" in text
    assert "Retain-1,024" in text
    assert "| two_scale | 2.625 ± 0.177 |" in text  # loss elsewhere
    assert "5.96" in text  # the paper's figure stands beside ours
    for picture in ("bars", "krcu", "fronts", "returns", "learning"):
        assert (tmp_path / "out" / f"{picture}.png").stat().st_size > 1000
        assert f"![{picture}]({picture}.png)" in text
    assert "![bars](bars.png)" in result.stdout
    assert read_rows(tmp_path / "kept.json") == read_rows(tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())) == 3


def test_rows_of_several_machines_become_one_report(tmp_path: Path) -> None:
    """The first of a cell counts, and each machine is named."""
    there = {"tokens_per_second": 900.0, "peak_bytes": 2**30, "device": "a GPU", "dtype": "bfloat16"}
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[1:]))
    cell = tmp_path / "run" / "cells" / "none-s0"
    cell.mkdir(parents=True)
    (cell / "row.json").write_text(json.dumps(made_up("none", 0, 12.0, measured=there)))
    other = tmp_path / "run" / "cells" / "mine-s0"
    other.mkdir()
    (other / "row.json").write_text(json.dumps(made_up("mine", 0, 8.0)))
    sources = [str(tmp_path / "run"), str(tmp_path / "rows.json")]
    arguments = [*sources, "--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(app, ["experiments", "report", *arguments])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    assert "a CPU, float32" in text
    assert "a GPU, bfloat16" in text
    kept = read_rows(tmp_path / "rows.json")  # a file that is read may be the one that all go into
    assert [(row["model"], row["nats_per_note"]) for row in kept] == [
        ("two_scale", 11.0), ("two_scale", 10.0), ("none", 12.0), ("mine", 8.0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["table", "corpus", "split", "pieces", "tokens", "tokenizer_hash"])
def test_rows_that_a_report_would_say_something_wrong_of_are_refused(name: str, tmp_path: Path) -> None:
    """It says these once, as the first row has them. The sentence names both files."""
    other = made_up("none", 0, 12.0)
    other[name] = other[name] + (1 if isinstance(other[name], int) else "1")
    for file, row in (("a", ROWS[1]), ("b", other)):
        (tmp_path / file).write_text(json.dumps([row]))
    with pytest.raises(UserError, match=rf"whose {name} is .* \(.*/a\) and .* \(.*/b\)"):
        read_rows(tmp_path / "a", tmp_path / "b")


def test_rows_of_other_settings_of_training_are_refused(tmp_path: Path) -> None:
    """Also of other models, whose figures stand side by side. Rows of earlier versions do not tell theirs."""
    (tmp_path / "a").write_text(json.dumps([made_up("full", 0, 10.0, train={"lr": 0.1, "steps": 9}), *ROWS]))
    for train, words in (
        ({"lr": 0.2, "steps": 9}, r"trained with lr = 0\.1 \(.*/a\) and with 0\.2 \(.*/b\)"),
        ({"lr": 0.1}, r"trained with steps = 9 \(.*/a\) and with None \(.*/b\)"),
        ({"lr": 0.1, "steps": 9, "recall": 3}, r"trained with recall = 0 \(.*/a\) and with 3 \(.*/b\)"),
    ):
        (tmp_path / "b").write_text(json.dumps([made_up("fhcr", 0, 12.0, train=train)]))
        with pytest.raises(UserError, match=words):
            read_rows(tmp_path / "a", tmp_path / "b")
    same = {"steps": 9, "lr": 0.1, "recall": 0, "betas": [0.9, 0.95], "threads": 3, "save_minutes": 9.0}
    for train in ({"train": same}, {}):
        (tmp_path / "b").write_text(json.dumps([made_up("fhcr", 0, 12.0, **train)]))
        assert len(read_rows(tmp_path / "a", tmp_path / "b")) == len(ROWS) + 2


LATER = [{**one, "start": one["start"] + 8, "end": one["end"] + 8} for one in ROWS[0]["krcu"]["bins"]]


@pytest.mark.parametrize(
    ("more", "how"),
    [
        ({"schedule": "none(layers=3)"}, "trained"),
        ({"settings": {"lr": 0.5}}, "trained"),
        ({"retain": []}, "measured"),
        ({"krcu": {**ROWS[0]["krcu"], "bins": LATER}}, "measured"),
    ],
)
def test_seeds_of_a_model_that_are_not_alike_have_no_mean(more: dict[str, Any], how: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(json.dumps(ROWS))
    (tmp_path / "b").write_text(json.dumps([made_up("two_scale", 2, 10.0, **more)]))
    with pytest.raises(UserError, match=rf"/a and .*/b: rows of two_scale that were not {how} alike"):
        read_rows(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b").write_text(json.dumps([made_up("two_scale", 1, 10.0, **more)]))
    assert len(read_rows(tmp_path / "a", tmp_path / "b")) == len(ROWS)  # the first of a cell counts


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    rows = copy.deepcopy(ROWS[:1])
    rows[0].update(krcu=None, retain=[], returns=None, learning=[])
    write_report(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "bars.png", "fronts.png"}
    assert lines_of(rows)[0].figures["KRCU tail"] is None


def test_bins_that_no_piece_reaches_are_left_blank(tmp_path: Path) -> None:
    rows = copy.deepcopy(ROWS[1:3])
    for row in rows:
        row["krcu"] = {**row["krcu"], "auc": {"mean": 0.03}, "reset_bin": {"mean": 0.05}, "tail": {"mean": None}}
        for one in row["krcu"]["bins"][1:]:
            one.update(tokens=0, delta={"mean": None})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    lines = write_report(read_rows(tmp_path / "rows.json"), tmp_path)
    (row,) = (line for line in lines if line.startswith("| two_scale | 2 | 10.500"))
    assert [cell.strip() for cell in row.split("|")][5:8] == ["0.0300 ± 0.0000", "0.0500 ± 0.0000", ""]
    assert (tmp_path / "krcu.png").stat().st_size > 1000
    found = lines_of(rows)[0].figures
    assert found["KRCU tail"] is None
    assert found["KRCU-AUC"] is not None


def test_what_is_no_result_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished cell"):
        read_rows(tmp_path)
    with pytest.raises(UserError, match="there are no results at"):
        read_rows(tmp_path / "nowhere")
    (tmp_path / "rows.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not a file of rows"):
        read_rows(tmp_path / "rows.json")
    (tmp_path / "rows.json").write_text('[{"format": 99}]')
    with pytest.raises(UserError, match="another version"):
        read_rows(tmp_path / "rows.json")


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_can_be_reported(path: Path, tmp_path: Path) -> None:
    lines = write_report(read_rows(path), tmp_path)
    assert f"# {path.stem}" in lines[0]


@pytest.mark.parametrize("path", [None, *KEPT], ids=lambda path: "made-up" if path is None else path.stem)
def test_no_name_covers_another_nor_a_legend_what_is_drawn(
    path: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models of nearly equal bytes and losses, as a study has them."""
    from dsmr.experiments import pictures

    names = [name for name in PRESETS if name != "full"]
    rows = [
        made_up(name, seed, 11.6 + 0.001 * place + 0.0001 * seed, kv_bytes=2**20 + place)
        for place, name in enumerate(names)
        for seed in (0, 1)
    ]
    if path is not None:
        rows = read_rows(path)
    drawn: dict[str, Any] = {}

    def keep(figure: Any, path: Path) -> None:
        figure.canvas.draw()
        drawn[Path(path).stem] = figure

    monkeypatch.setattr(pictures, "save", keep)
    monkeypatch.setattr("dsmr.console.figures.save", keep)
    pictures.draw(rows, lines_of(rows), tmp_path)
    for axis in drawn["fronts"].axes:
        assert sorted(text.get_text() for text in axis.texts) == sorted({row["model"] for row in rows})
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for name in {"krcu", "returns", "learning"}.intersection(drawn):
        (axis,) = drawn[name].axes
        assert not axis.get_legend().get_window_extent().overlaps(axis.get_window_extent().padded(-2))
