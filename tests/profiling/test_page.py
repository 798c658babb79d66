"""`profile.html`: one file that loads nothing, and whose tables and charts say what profile.json says; what a name
brings along is text, and never runs."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from known_ceilings import KNOWN

from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.budget import propose
from dsmr.profiling.charts import charts
from dsmr.profiling.job import KINDS, Sizes
from dsmr.profiling.page import page, write_page
from dsmr.profiling.profile import Profile, length_curves, predicted_row
from dsmr.profiling.sheets import Sheet, sheets

SIZES = Sizes(d_model=32, heads=4, segment_length=16, vocab_size=50, piece_tokens=48, positions=(0, 100))
TWO, FULL = MemorySchedule.two_scale(3, 64, 16, 1), MemorySchedule.full(3, 64)
HOSTILE = '</script><script src="https://example.org/x.js"></script><b onclick=alert(1)>&amp;'
EMPTY = {"meta", "link", "img", "br"}
LOADING = {"src", "href", "srcset", "poster", "action", "formaction", "data", "background"}


def timing(seconds: float, spread: float = 0.01) -> dict:
    return {"median": seconds, "fastest": seconds, "spread": spread, "rounds": 7}


def measured(schedule: MemorySchedule, kind: str, factor: float) -> dict:
    """A row as if every figure had turned out `factor` times as long as predicted."""
    predicted = predicted_row(SIZES, schedule, kind, KNOWN)
    row = {"tokens": 16, "peak_bytes": 7_654_321, "kv_bytes": list(predicted["kv_bytes"]), "predicted": predicted}
    if kind == "decode":
        positions = predicted["positions"]
        timed = [{"position": p["position"], "timing": timing(factor * p["seconds"])} for p in positions]
        return {**row, "tokens": 1, "positions": timed}
    return {
        **row,
        "activation_bytes": [100, 2000, 3000, 4000],
        "timings": {name: timing(factor * seconds) for name, seconds in predicted["seconds"].items()},
        "parts": [{**part, "seconds": factor * part["seconds"]} for part in predicted["parts"]],
    }


@pytest.fixture
def found() -> Profile:
    made = Profile(SIZES, KNOWN, load_before=0.0, load_after=0.0)
    for factor, schedule in ((1.5, TWO), (1.25, FULL)):
        made.rows[str(schedule)] = {kind: measured(schedule, kind, factor) for kind in KINDS}
    made.rows["none(layers=3)"] = {kind: {"error": f"out of memory: {HOSTILE}"} for kind in KINDS}
    made.curves = length_curves([TWO], SIZES, KNOWN)
    made.proposals = propose(20_000, 3, SIZES, KNOWN)
    return made


class Reader(HTMLParser):
    """Reads a page and insists that every element that is opened is closed, in order, and no id comes twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # of elements with an id
        self.tables: dict[str, list[list[tuple[str, dict[str, str | None]]]]] = {}
        self._table, self._inside = "", ""
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [given["id"] for _, given in self.elements if "id" in given]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.elements.append((tag, given))
        if tag in EMPTY:
            return
        self.open.append(tag)
        if tag == "table":
            self._table = given["data-table"] or ""
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append(("", given))
        elif tag == "script":
            self._inside = given.get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            row = self.tables[self._table][-1]
            row[-1] = (row[-1][0] + data, row[-1][1])
        elif self.open and self.open[-1] == "script":
            self.texts[self._inside] = self.texts.get(self._inside, "") + data


def as_json(found: Profile) -> dict:
    return json.loads(json.dumps(found.to_json()))


def test_the_page_loads_nothing(found: Profile, tmp_path: Path) -> None:
    drawn = [tmp_path / name for name in ("layers.png", "budget.png", "length.png")]
    for path in drawn:
        path.write_bytes(b"\x89PNG of " + path.name.encode())
    text = write_page(found, tmp_path / "profile.html", drawn).read_text(encoding="utf-8")
    read = Reader(text)
    for tag, given in read.elements:
        for name in LOADING & given.keys():
            assert (given[name] or "").startswith("data:"), (tag, name)
        assert not any(name.startswith("on") for name in given)
        assert tag not in ("iframe", "object", "embed", "base", "form")
    styles = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in styles
    assert "url(" not in styles
    script = read.texts[""]
    assert not re.search(r"fetch|XMLHttpRequest|WebSocket|EventSource|import\(|sendBeacon|eval|innerHTML", script)
    assert re.findall(r"https?://[^\s\"']+", script) == ["http://www.w3.org/2000/svg"]  # a name, which nobody fetches
    policy = next(given["content"] or "" for tag, given in read.elements if "http-equiv" in given)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    images = [given["src"] or "" for tag, given in read.elements if tag == "img"]
    assert [base64.b64decode(image.partition(",")[2]) for image in images] == [path.read_bytes() for path in drawn]
    assert [tag for tag, _ in read.elements].count("script") == 3


def test_what_a_user_named_is_text(found: Profile) -> None:
    found.ceilings = replace(KNOWN, device=HOSTILE)
    text = page(found)
    assert HOSTILE not in text
    read = Reader(text)
    assert [given for tag, given in read.elements if tag == "script" and "src" in given] == []
    assert not any("onclick" in given for _, given in read.elements)
    error = read.tables["train"][3][1]
    assert error[0] == f"out of memory: {HOSTILE}"
    assert json.loads(read.texts["profile"])["device"] == HOSTILE


def test_every_table_has_every_row_with_the_figures_of_the_json(found: Profile) -> None:
    read, kept = Reader(page(found)), as_json(found)
    assert json.loads(read.texts["profile"]) == kept
    every = list(sheets(found))
    assert list(read.tables) == [sheet.name for sheet in every]
    names = {"schedules", "train", "piece", "decode", "layers-0", "layers-1", "proposals"}
    assert {sheet.name for sheet in every} == names
    for sheet in every:
        rows = read.tables[sheet.name]
        assert len(rows) == 1 + len(sheet.rows) > 1
        assert [len(row) for row in rows[1:]] == [len(row) for row in sheet.rows]
    for number, entry in enumerate(kept["schedules"][:2], 1):
        for kind in ("train", "piece"):
            row, cells = entry["rows"][kind], read.tables[kind][number]
            seconds = [row["timings"][name]["median"] for name in ("forward", "backward", "step", "all")]
            assert [float(cell["data-value"] or "") for _, cell in cells[1:5]] == seconds
            expected = [row["predicted"]["seconds"][name] for name in ("forward", "backward", "step", "all")]
            assert [float(cell["data-predicted"] or "") for _, cell in cells[1:5]] == expected
            assert float(cells[5][1]["data-value"] or "") == row["timings"]["all"]["spread"]
            assert int(cells[10][1]["data-value"] or "") == row["peak_bytes"]
        for place, position in enumerate(entry["rows"]["decode"]["positions"], 1):
            shown = float(read.tables["decode"][number][place][1]["data-value"] or "")
            assert shown == pytest.approx(1 / position["timing"]["median"])
        layers = read.tables[f"layers-{number - 1}"][1:]
        parts = {(p["layer"], p["direction"], p["part"]): p["seconds"] for p in entry["rows"]["train"]["parts"]}
        for layer, cells in enumerate(layers):
            assert float(cells[4][1]["data-value"] or "") == parts[layer, "forward", "attention"]
            assert int(cells[2][1]["data-value"] or "") == entry["rows"]["train"]["kv_bytes"][layer]
    for proposal, cells in zip(kept["proposals"], read.tables["proposals"][1:], strict=True):
        assert cells[0][1]["data-value"] == proposal["schedule"]
        assert float(cells[3][1]["data-value"] or "") == proposal["tokens_per_second"]


def test_the_charts_draw_the_figures_of_the_json(found: Profile) -> None:
    read, kept = Reader(page(found)), as_json(found)
    drawn = json.loads(read.texts["charts"])
    assert drawn == json.loads(json.dumps(charts(found)))
    places = [given["data-chart"] for _, given in read.elements if "data-chart" in given]
    assert places == [chart["name"] for chart in drawn]
    length = next(chart for chart in drawn if chart["name"] == "length")
    for series, points in zip(length["series"], kept["seconds_by_piece_length"].values(), strict=False):
        assert [point[:2] for point in series["points"]] == points
    assert "unlimited" in length["series"][0]["name"]
    bars = next(chart for chart in drawn if chart["name"] == "seconds of two_scale")
    row = kept["schedules"][0]["rows"]["train"]
    layers = sum(part["seconds"] for part in row["parts"] if part["layer"] >= 0)
    assert sum(sum(series["values"]) for series in bars["series"]) == pytest.approx(1e3 * layers)


def test_warnings_and_failures_stand_on_top(found: Profile) -> None:
    calm = page(Profile(SIZES, KNOWN, load_before=0.0, load_after=0.0))
    assert "Warning" not in calm
    found.load_before = 1000.0
    text = page(found)
    assert text.index("the machine was busy") < text.index("Not measured") < text.index("<table")


def _units(sheet: Sheet) -> Iterator[tuple[str, str]]:
    for row in sheet.rows:
        if len(row) == len(sheet.columns):
            for cell, column in zip(row, sheet.columns, strict=True):
                if not isinstance(cell.value, str):
                    yield column.name, f"{cell.text} {column.unit}"


def test_every_figure_has_its_unit(found: Profile) -> None:
    """A percentage, bytes, milliseconds, tokens or tokens a second; a layer's number is no quantity."""
    for sheet in sheets(found):
        for name, text in _units(sheet):
            if name != "layer":
                assert re.search(r"(%|\bB|[KMGT]iB|\bms|\btokens(/s)?)\s*$", text), (sheet.name, name, text)


def test_style_and_script_come_with_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    setup = (root / "setup.py").read_text(encoding="utf-8")
    for name in ("profiling/page.css", "profiling/page.js"):
        assert (root / "dsmr" / name).exists()
        assert f'"{name}"' in setup
