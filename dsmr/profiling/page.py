"""`profile.html`: what `dsmr profile` found as one file that needs nothing else, neither network nor server.

Tables that sort, charts with hover values (drawn by `page.js`) and the pictures lie in it; its policy forbids
everything that the file does not bring along. Whatever a user or a device named stands in it as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from dsmr.console.files import write_text
from dsmr.profiling.charts import charts
from dsmr.profiling.profile import Profile, tokens_per_second
from dsmr.profiling.sheets import Cell, Column, Sheet, labels, sheets
from dsmr_kernels.costing.cost import human_bytes

PICTURES = {
    "layers.png": "Time and memory of each layer in a training step",
    "budget.png": "Speed of training against bytes of memory",
    "length.png": "Seconds for a piece by its length",
}


def write_page(found: Profile, path: Path, pictures: Sequence[Path] = ()) -> Path:
    """Write the page, whole or not at all, with the pictures that were drawn."""
    write_text(path, page(found, pictures))
    return path


def page(found: Profile, pictures: Sequence[Path] = ()) -> str:
    """The page as HTML."""
    style, script = _part("page.css"), _part("page.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    drawn = charts(found)
    places = f'<div class="charts">\n{"".join(map(_chart_place, drawn))}</div>\n'
    sections = [_warnings(found), _summary(found), places, *map(_table, sheets(found)), *map(_picture, pictures)]
    title = f"dsmr profile: {found.ceilings.device}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>What memory costs on this machine</h1>
<p>{escape(_sizes(found))}</p>
{"".join(sections)}
</main>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="charts">{_data(drawn)}</script>
<script type="application/json" id="profile">{_data(found.to_json())}</script>
<script>{script}</script>
</body>
</html>
"""


# --- What it brings along -----------------------------------------------------------------------------------------


def _part(name: str) -> str:
    """The style or the script, as they lie beside this module."""
    return resources.files("dsmr.profiling").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """By which the policy knows the only style and the only script that count."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data(value: Any) -> str:
    """JSON that no text in it can end: a browser reads the escapes as what they stand for."""
    text = json.dumps(value)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    words = escape(PICTURES.get(path.name, path.name))
    return (
        f'<figure class="picture"><img alt="{words}" src="data:image/png;base64,{data}">'
        f"<figcaption>{words} ({escape(path.name)})</figcaption></figure>\n"
    )


# --- What it says -------------------------------------------------------------------------------------------------


def _sizes(found: Profile) -> str:
    sizes = found.sizes
    return (
        f"{found.ceilings.device}, {sizes.threads} threads, {sizes.dtype}; a model of width {sizes.d_model} with "
        f"{sizes.heads} heads, segments of {sizes.segment_length:,} tokens"
    )


def _warnings(found: Profile) -> str:
    if not found.warnings and not found.failures:
        return ""
    lines = [f"Warning: {sentence}." for sentence in found.warnings]
    lines += [f"Not measured: {sentence}" for sentence in found.failures]
    return f'<ul class="warnings" role="alert">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>\n'


def _summary(found: Profile) -> str:
    """A sentence for each schedule, for who reads no further."""
    short, lines = labels(found.rows), []
    for name, rows in found.rows.items():
        said = []
        if "timings" in (row := rows.get("train", {})):
            said.append(
                f"trains {tokens_per_second(row):,.0f} tokens/s with {human_bytes(sum(row['kv_bytes']))} of memory"
            )
        if "positions" in (row := rows.get("decode", {})):
            last = row["positions"][-1]
            said.append(f"plays {1 / last['timing']['median']:,.0f} tokens/s after {last['position']:,} tokens")
        if said:
            lines.append(f"<li><b>{escape(short[name])}</b> {escape(' and '.join(said))}</li>")
    return (
        "<p>A schedule says how many tokens each layer remembers. A larger memory remembers more; a smaller one is "
        "cheaper, in bytes and in time. Tables sort by a click on the head of a column.</p>\n"
        + (f"<ul>{''.join(lines)}</ul>\n" if lines else "")
    )


def _chart_place(chart: dict[str, Any]) -> str:
    title = escape(chart["title"])
    return (
        f'<figure class="chart" data-chart="{escape(chart["name"])}"><figcaption>{title}</figcaption>'
        "<noscript><p>Charts need the page's own script; tables and pictures say the same.</p></noscript></figure>\n"
    )


def _table(sheet: Sheet) -> str:
    heads = "".join(map(_head, sheet.columns))
    rows = "".join(f"<tr>{_row(row, sheet.columns)}</tr>\n" for row in sheet.rows)
    return (
        f'<section><h2 id="{escape(sheet.name)}">{escape(sheet.title)}</h2>\n<div class="wide" tabindex="0" '
        f'role="region" aria-labelledby="{escape(sheet.name)}"><table data-table="{escape(sheet.name)}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
        f'<p class="note">{escape(sheet.caption)}</p></section>\n'
    )


def _head(column: Column) -> str:
    unit = f" <small>({escape(column.unit)})</small>" if column.unit else ""
    kind = ' class="left"' if column.left else ""
    return f'<th scope="col"{kind}><button type="button">{escape(column.name)}{unit}</button></th>'


def _row(row: list[Cell], columns: list[Column]) -> str:
    """Cells with the figures that they stand for; a row that is cut short ends in a sentence."""
    cells = []
    for number, (cell, column) in enumerate(zip(row, columns, strict=False)):
        values = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
        if cell.predicted is not None:
            values += f' data-predicted="{cell.predicted}"'
        if number == len(row) - 1 < len(columns) - 1:
            cells.append(f'<td class="left" colspan="{len(columns) - number}">{escape(cell.text)}</td>')
        else:
            kind = ' class="left"' if column.left else ""
            cells.append(f"<td{kind}{values}>{escape(cell.text)}</td>")
    return "".join(cells)
