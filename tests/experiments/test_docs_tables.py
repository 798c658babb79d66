"""Every result in docs/experiments.md is what the kept rows say: cell by cell, columns known by their headings.

A table belongs to the rows that were named last before it, by the command that reports them or by a paragraph that
begins with their name. It may leave columns and models out.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsmr.experiments.report import markdown
from dsmr.experiments.rows import lines_of, read_rows

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "experiments.md"
KEPT = {path.stem: path for path in sorted((ROOT / "experiments" / "results").glob("*.json"))}
IN_WORDS = "maestro-speed"
"""Rows that the page calls by what was changed, not by the names of their models."""


@dataclass(frozen=True)
class Written:
    """A table as Markdown has it: the rows that it belongs to, its headings (as they stand there, and as a column is
    known), and the cells of each of its rows."""

    name: str
    above: tuple[str, ...]
    headings: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def tables_of(text: str) -> Iterator[Written]:
    """The tables of a page that stand below the name of kept rows."""
    name, block = "", []
    for line in [*text.splitlines(), ""]:
        named = re.match(r"dsmr experiments report experiments/results/([\w-]+)\.json", line) or re.match(
            r"`([\w-]+)`", line
        )
        if line.startswith("|"):
            block.append(tuple(cell.strip() for cell in line.strip().strip("|").split("|")))
        elif block:
            yield Written(name, block[0], tuple(_headings(block[0])), tuple(block[2:]))
            block = []
        if named is not None and named[1] in KEPT:
            name = named[1]


def _headings(cells: Sequence[str]) -> Iterator[str]:
    """The headings, without the number of returns in a bin; the paper's columns are those from its first on."""
    papers = ""
    for cell in cells:
        papers = "paper: " if cell.startswith("paper: ") else papers
        yield papers + re.sub(r" \([\d, to]+\)$", "", cell).removeprefix("paper: ")


@functools.cache
def report_of(name: str) -> str:
    rows = read_rows(KEPT[name])
    return markdown(rows, lines_of(rows), [])


@functools.cache
def headings_of(name: str) -> set[str]:
    return {heading for table in tables_of(f"`{name}`\n" + report_of(name)) for heading in table.above}


@functools.cache
def reported(name: str) -> dict[str, dict[str, str]]:
    """What the report says of each model, by heading."""
    found: dict[str, dict[str, str]] = {}
    for table in tables_of(f"`{name}`\n" + report_of(name)):
        for model, *cells in table.cells:
            found.setdefault(model, {}).update(zip(table.headings[1:], cells, strict=True))
    return found


def ahead(name: str, model: str) -> str:
    """How much lower the nats a note of `model` are than those of two-scale, seed by seed."""
    nats = {(row["model"], row["seed"]): row["nats_per_note"] for row in read_rows(KEPT[name])}
    seeds = sorted(seed for of, seed in nats if of == model)
    return ", ".join(f"{nats['two_scale', seed] - nats[model, seed]:.3f}" for seed in seeds)


def model_of(cell: str, models: Any) -> str | None:
    """The model that the first cell of a row names: alone, or in a sentence as code."""
    return next((name for name in (cell, *re.findall(r"`([\w-]+)`", cell)) if name in models), None)


def differences(text: str) -> list[str]:
    """Where the page says something else than the rows: a sentence for each cell."""
    found = []
    for table in tables_of(text):
        models = reported(table.name) if table.name else {}
        known = {heading for cells in models.values() for heading in cells}
        if not known.intersection(table.headings[1:]):
            continue  # no table of results
        where = f"{table.name}, table of {', '.join(table.headings[1:])}"
        counted = {one for one in table.above if re.search(r"\d \([\d, to]+\)$", one)}
        found += [f"{where}: the report has no column {one}" for one in counted - headings_of(table.name)]
        if table.name == IN_WORDS and not any(model_of(row[0], models) for row in table.cells):
            for place, heading in enumerate(table.headings[1:], 1):
                said = Counter(row[place] for row in table.cells)
                true = Counter(cells[heading] for cells in models.values())
                found += [f"{where}: {cell} is of no row" for cell in said - true]
                found += [f"{where}: {cell} is missing" for cell in true - said]
            continue
        for first, *cells in table.cells:
            model = model_of(first, models)
            if model is None:
                found.append(f"{where}: {first} is no model of the rows")
                continue
            for heading, cell in zip(table.headings[1:], cells, strict=True):
                if heading.startswith("ahead of two-scale"):
                    true_cell = "" if not cell else ahead(table.name, model)
                else:
                    true_cell = models[model].get(heading, f"no column {heading}")
                if cell != true_cell:
                    found.append(f"{where}: {model} has {cell!r} for {heading}, but its rows say {true_cell!r}")
    for name, line in ranks_of(text):
        if line not in report_of(name).splitlines():
            found.append(f"{name}: the report does not say {line!r}")
    return found


def ranks_of(text: str) -> Iterator[tuple[str, str]]:
    """The lines that say a rank order, and the rows that they belong to."""
    name = ""
    for line in text.splitlines():
        named = re.match(r"dsmr experiments report experiments/results/([\w-]+)\.json", line)
        name = named[1] if named is not None else name
        if line.startswith("Rank order of "):
            yield name, line


def test_the_page_says_what_the_rows_say() -> None:
    assert differences(PAGE.read_text(encoding="utf-8")) == []


def test_all_rows_that_are_kept_stand_in_a_table() -> None:
    """Else a table whose rows are not found would be held to nothing."""
    text = PAGE.read_text(encoding="utf-8")
    tables = [table for table in tables_of(text) if table.name]
    for name in KEPT:
        own = [table for table in tables if table.name == name and "nats a note" in table.headings]
        most = max((len(table.cells) for table in own), default=0)
        assert most == len(reported(name)), name
    returns = [table.name for table in tables if any(re.match(r"[\d,]+ to [\d,]+$", one) for one in table.headings)]
    assert set(returns) >= {"composed", "maestro-returns", "maestro-curriculum"}
    assert any("elsewhere" in table.headings for table in tables)
    assert any(one.startswith("ahead of two-scale") for table in tables for one in table.headings)
    assert len(list(ranks_of(text))) >= 2


def digits_of_tables(text: str) -> list[int]:
    """The place of one digit in every cell with a decimal point but the first of a row, in every table of results."""
    below = text.index("experiments report experiments/results")
    return [
        found.start(1)
        for row in re.compile(r"^\|[^|]*\|(.*\|)$", re.MULTILINE).finditer(text, below)
        for found in re.compile(r"\.\d*(\d)[^|]*\|").finditer(text, row.start(1), row.end())
    ]


@pytest.mark.slow
def test_one_digit_that_is_changed_is_found() -> None:
    """Slow for the whole page, held some fifty times."""
    text = PAGE.read_text(encoding="utf-8")
    before = differences(text)
    places = digits_of_tables(text)
    assert len(places) > 500
    for place in places[:: len(places) // 50]:
        other = text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]
        assert differences(other) != before, text[text.rindex("\n", 0, place) : text.index("\n", place)]
