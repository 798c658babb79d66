"""All rows of a table as one: Markdown, JSON and pictures."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsmr.console.figures import available
from dsmr.console.files import write_json, write_text
from dsmr.experiments.pictures import NAMES, draw
from dsmr.experiments.presets import PRESETS
from dsmr.experiments.rows import Figure, Line, bin_name, lines_of, mixed_devices, rank_correlation
from dsmr_kernels.costing.cost import human_bytes


def write_report(rows: Sequence[dict[str, Any]], out: str | Path, *, rows_path: str | Path | None = None) -> list[str]:
    """Write report.md, report.json and, with Matplotlib, the pictures into `out`, and remove there what an earlier
    report has drawn and this one does not; returns the Markdown and what was written, line by line."""
    folder = Path(out)
    lines = lines_of(rows)
    earlier = NAMES if (folder / "report.json").exists() else ()  # else pictures of these names are not a report's
    write_json(folder / "report.json", [asdict(line) for line in lines], sealed=True)
    if rows_path is not None:
        write_json(rows_path, list(rows), sealed=True)
    pictures: list[Path] = []
    if available():
        pictures = draw(rows, lines, folder)
    for stale in {folder / f"{name}.png" for name in earlier}.difference(pictures):
        stale.unlink(missing_ok=True)
    text = markdown(rows, lines, [picture.name for picture in pictures])
    write_text(folder / "report.md", text)
    written = [folder / "report.md", folder / "report.json", *pictures]
    return [*text.splitlines(), *(str(path) for path in written)]


def markdown(rows: Sequence[dict[str, Any]], lines: Sequence[Line], pictures: Sequence[str]) -> str:
    """The report: what was trained and measured, the table, returns by distance, the pictures."""
    first = rows[0]
    machines = dict.fromkeys(f"{row['measured']['device']}, {row['measured']['dtype']}" for row in rows)
    tokens = sorted({row["trained_tokens"] for row in rows})
    millions = dict.fromkeys(f"{of([row['parameters'] for row in rows]) / 1e6:.1f}" for of in (min, max))
    said = [
        f"# {first['table']}",
        "",
        f"{' to '.join(millions)} M parameters, {' or '.join(f'{n:,}' for n in tokens)} tokens of training, "
        f"{first['corpus']}, {first['split']} split ({first['pieces']} pieces, {first['tokens']:,} tokens); "
        f"{' or '.join(machines)}; tokeniser {first['tokenizer_hash'][:16]}.",
        "Losses in nats; KRCU and Retain-k in nats a token. ± is the standard deviation over seeds.",
        "",
    ]
    said += _table(lines)
    said += _left_blank(lines)
    for title, columns, found_of in (
        (
            "Saved at planted returns, in nats a token, by distance in tokens (and how many returns):",
            _bins(rows),
            [line.returns for line in lines],
        ),
        (
            "Loss in nats a token, by kind of passage:",
            {label: label for line in lines for label in line.labels},
            [line.labels for line in lines],
        ),
    ):
        if columns:
            said += ["", title, ""]
            said += _rows(
                ["model", *columns.values()],
                [
                    [line.model, *(_text(found.get(name), 3) for name in columns)]
                    for line, found in zip(lines, found_of, strict=True)
                ],
            )
    for ours, theirs in (("nats a note", "perplexity"), ("KRCU-AUC", "krcu_auc"), ("peak memory", "peak_gb")):
        if mixed_devices(lines, ours):
            said += ["", f"No rank order of {ours}: some of the models were trained on a CPU, others on a GPU."]
        found = rank_correlation(lines, ours, theirs)
        if found is not None:
            name = "KRCU-AUC" if theirs == "krcu_auc" else theirs.replace("_gb", " memory")
            said += ["", f"Rank order of {ours} against the paper's {name}: {found[0]:+.2f} over {found[1]} models."]
    for picture in pictures:
        said += ["", f"![{Path(picture).stem}]({picture})"]
    said += ["", "Our reading, where the paper leaves it open:", ""]
    said += [f"- {line.model}: `{line.schedule}`. {line.our_reading}".rstrip() for line in lines]
    return "\n".join(said) + "\n"


def _bins(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The bins of planted returns that any row has returns in, from the nearest on, and the heading of each."""
    counts: dict[tuple[int, str], list[int]] = {}
    for row in rows:
        for one in row["returns"]["by_distance"] if row["returns"] else ():
            if one["returns"]:
                counts.setdefault((one["start"], bin_name(one)), []).append(one["returns"])
    return {
        name: f"{name} ({' to '.join(dict.fromkeys(f'{n:,}' for n in (min(found), max(found))))})"
        for (_, name), found in sorted(counts.items())
    }


def _left_blank(lines: Sequence[Line]) -> list[str]:
    """Which figures the table leaves out, since seeds were trained on several kinds of device."""
    said = []
    for what, several, kinds in (
        ("Peak memory", [line.model for line in lines if len(line.device_types) > 1], "on a CPU and on a GPU"),
        ("Tokens/s", [line.model for line in lines if len(line.devices) > 1], "on several devices"),
    ):
        if several:
            said += ["", f"{what} is left blank where seeds were trained {kinds}: {', '.join(several)}."]
    return said


def _table(lines: Sequence[Line]) -> list[str]:
    ks = sorted({k for line in lines for k in line.retain})
    header = ["model", "seeds", "nats a note", "perplexity", "KRCU-AUC", "reset bin", "tail"]
    header += [f"Retain-{k:,}" for k in ks]
    header += ["KV bytes", "peak memory", "tokens/s", "paper: perplexity", "KRCU-AUC", "peak GB"]
    body = []
    for line in lines:
        figures = line.figures
        preset = PRESETS.get(line.model)
        paper = preset.paper if preset is not None else None
        peak, speed = figures["peak memory"], figures["tokens/s"]
        body.append(
            [
                line.model,
                str(len(line.seeds)),
                _text(figures["nats a note"], 3),
                _text(figures["perplexity"], 3),
                *(_text(figures[name], 4) for name in ("KRCU-AUC", "KRCU reset bin", "KRCU tail")),
                *(_text(line.retain.get(k), 4) for k in ks),
                human_bytes(line.kv_bytes),
                "" if peak is None else human_bytes(round(peak.mean)),
                "" if speed is None else f"{speed.mean:,.0f}",
                *(
                    ("", "", "")
                    if paper is None
                    else (f"{paper.perplexity:.2f}", f"{paper.krcu_auc:.4f}", f"{paper.peak_gb:.1f}")
                ),
            ]
        )
    return _rows(header, body)


def _rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|---" + "|--:" * (len(header) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in body),
    ]


def _text(figure: Figure | None, digits: int) -> str:
    return "" if figure is None or math.isnan(figure.mean) else figure.text(digits)
