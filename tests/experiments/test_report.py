"""The report: one table of all rows, seeds put together, and pictures of what was measured."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_rows import made_up
from typer.testing import CliRunner

from dsmr.cli.app import app
from dsmr.console.errors import UserError
from dsmr.experiments.report import markdown, write_report
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
    assert none.figures["perplexity"] == Figure(24.0, None, 1)  # one seed has no spread
    assert none.figures["perplexity"].text(1) == "24.0"
    assert nats.text(2) == "10.50 ± 0.71"
    assert Figure(-0.00001, None, 1).text(4) == "0.0000"
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


def test_rows_of_one_table_may_be_measured_differently(tmp_path: Path) -> None:
    """A model is missing in the picture of what it was not measured by, and its cells are blank: also the first's."""
    far = {"by_distance": [{"start": 10, "end": 20, "returns": 3, "saved": 4.0}]}
    rows = [
        made_up("full", 0, 10.0, krcu=None, returns=None, retain=[], by_label=None),
        made_up("two_scale", 0, 11.0, returns=far),
        made_up("none", 0, 12.0, krcu=None, returns=far),
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    text = "\n".join(write_report(read_rows(tmp_path / "rows.json"), tmp_path / "out"))
    assert "| full | 1 | 10.000 | 20.000 |  |  |  |  |" in text
    assert "| none | 1 | 12.000 | 24.000 |  |  |  | 0.1200 |" in text
    assert "| model | 10 to 19 (3) |" in text
    assert "| full |  |\n| two_scale | 4.000 |\n| none | 4.000 |" in text
    assert "| full |  |\n| two_scale | 2.750 |\n| none | 3.000 |" in text  # loss elsewhere
    assert (tmp_path / "out" / "krcu.png").exists()
    assert (tmp_path / "out" / "returns.png").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            {"krcu": {**ROWS[0]["krcu"], "reset": 16}},
            "hold KRCU of full, measured in 3 bins from 8 to 19 after a reset at 8, "
            "and of fhcr, measured in 3 bins from 8 to 19 after a reset at 16",
        ),
        ({"krcu": {**ROWS[0]["krcu"], "bins": LATER}}, "and of fhcr, measured in 3 bins from 16 to 27 after"),
        (
            {"returns": {"by_distance": [{"start": 10, "end": 40, "returns": 3, "saved": 4.0}]}},
            "hold planted returns of full, measured in bins of 10 to 19, and of fhcr, measured in bins of 10 to 39",
        ),
    ],
)
def test_what_two_models_were_measured_by_is_one_or_they_are_refused(
    more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text(json.dumps([made_up("full", 0, 10.0)]))
    (tmp_path / "b").write_text(json.dumps([made_up("fhcr", 0, 10.0, **more)]))
    with pytest.raises(UserError, match=rf"/a and .*/b: one report cannot .*{re.escape(words)}"):
        read_rows(tmp_path / "a", tmp_path / "b")


def on(device: str, **more: Any) -> dict[str, Any]:
    return {
        "measured": {"tokens_per_second": 900.0, "peak_bytes": 2**30, "device": device, "dtype": "bfloat16", **more}
    }


def test_memory_and_speed_of_several_devices_have_no_mean() -> None:
    """Two GPUs have their memory counted alike; their speeds are two."""
    rows = [
        made_up("full", 0, 10.0, **on("NVIDIA H100")),
        made_up("full", 1, 10.0, **on("NVIDIA H200", device_type="cuda")),
        made_up("two_scale", 0, 11.0, **on("NVIDIA H200", peak_bytes=2**29)),
        made_up("fhcr", 0, 12.0, **on("NVIDIA H200", peak_bytes=2**28)),
        made_up("none", 0, 12.0, **on("AMD EPYC")),  # which is not of the paper
        made_up("none", 1, 12.0, **on("NVIDIA H200")),
    ]
    lines = lines_of(rows)
    text = markdown(rows, lines, [])
    assert [line.figures["peak memory"] is None for line in lines] == [False, False, False, True]
    assert [line.figures["tokens/s"] is None for line in lines] == [True, False, False, True]
    assert "Peak memory is left blank where seeds were trained on a CPU and on a GPU: none." in text
    assert "Tokens/s is left blank where seeds were trained on several devices: full, none." in text
    assert "Rank order of peak memory against the paper's peak memory: +1.00 over 3 models." in text
    rows[2] = made_up("two_scale", 0, 11.0, **on("a GPU", device_type="cpu"))  # what it says of itself counts
    text = markdown(rows, lines_of(rows), [])
    assert "No rank order of peak memory: some of the models were trained on a CPU, others on a GPU." in text
    assert "Rank order of peak memory" not in text
    assert "Rank order of nats a note" in text


def test_what_differs_between_models_is_a_range() -> None:
    def returns(count: int, beyond: int) -> dict[str, Any]:
        bins = ((10, 20, count), (20, 1041, beyond), (2, 10, 1))
        return {"by_distance": [{"start": a, "end": b, "returns": n, "saved": 1.0 if n else None} for a, b, n in bins]}

    rows = [
        made_up("full", 0, 10.0, parameters=3_716_352, returns=returns(3, 0)),
        made_up("two_scale", 0, 11.0, parameters=3_322_880, returns=returns(5, 4)),
        made_up("none", 0, 12.0, parameters=3_454_208, returns=None),
    ]
    text = markdown(rows, lines_of(rows), [])
    assert "\n3.3 to 3.7 M parameters, 1,000 tokens of training" in text
    assert "| model | 2 to 9 (1) | 10 to 19 (3 to 5) | 20 to 1,040 (4) |" in text
    assert "| full | 1.000 | 1.000 |  |" in text
    assert "\n1.5 M parameters" in markdown(ROWS, lines_of(ROWS), [])


def test_reports_of_two_files_do_not_meet_and_keep_no_picture_of_a_former_one(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps([made_up("full", 0, 10.0, table=name)]))
        assert CliRunner().invoke(app, ["experiments", "report", str(tmp_path / f"{name}.json")]).exit_code == 0
    for name in ("one", "two"):
        assert f"# {name}\n" in (tmp_path / f"{name}-report" / "report.md").read_text()
    (tmp_path / "one-report" / "mine.png").write_text("not of the report")
    (tmp_path / "one.json").write_text(json.dumps([made_up("full", 0, 10.0, krcu=None, returns=None, learning=[])]))
    assert CliRunner().invoke(app, ["experiments", "report", str(tmp_path / "one.json")]).exit_code == 0
    assert {path.name for path in (tmp_path / "one-report").glob("*.png")} == {"bars.png", "fronts.png", "mine.png"}
    cell = tmp_path / "run" / "cells" / "full-s0"
    cell.mkdir(parents=True)
    (cell / "row.json").write_text(json.dumps(made_up("full", 0, 10.0)))
    assert CliRunner().invoke(app, ["experiments", "report", str(tmp_path / "run")]).exit_code == 0
    assert (tmp_path / "run" / "report" / "report.md").exists()


def test_pictures_where_no_report_was_are_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps([made_up("full", 0, 10.0, krcu=None, returns=None, learning=[])]))
    (tmp_path / "returns.png").write_text("mine")
    given = ["experiments", "report", str(tmp_path / "one.json"), "--out", str(tmp_path)]
    assert CliRunner().invoke(app, given).exit_code == 0
    assert (tmp_path / "returns.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"nats_per_note": math.nan}, "nats_per_note"),
        ({"perplexity": math.inf}, "perplexity"),
        (on("a CPU", tokens_per_second=math.inf), "measured.tokens_per_second"),
        ({"retain": [{"k": 3, "delta": {"mean": math.nan}}]}, "retain[0].delta.mean"),
        ({"returns": {"by_distance": [{"start": 1, "end": 2, "returns": 3, "saved": math.nan}]}}, "saved"),
        ({"krcu": {**ROWS[0]["krcu"], "tail": {"mean": -math.inf}}}, "krcu.tail.mean"),
        ({"by_label": [{"label": "elsewhere", "nats_per_token": math.nan}]}, "by_label[0].nats_per_token"),
        ({"learning": [[500, math.nan]]}, "learning[0][1]"),
    ],
)
def test_what_is_no_number_is_refused(more: dict[str, Any], field: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([made_up("full", 0, 10.0, **more)]))
    with pytest.raises(UserError, match=rf"rows\.json, row 1, is damaged: its .*{re.escape(field)} is .*finite number"):
        read_rows(tmp_path / "rows.json")


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
