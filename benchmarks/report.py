"""Tables and pictures of saved benchmark runs, and what became slower between two of them.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python -m benchmarks.report run.json                            # a Markdown table for each question
    python -m benchmarks.report run.json --out DIR                  # also DIR/benchmarks.md and DIR/images/*.png
    python -m benchmarks.report before.json after.json              # what became slower; exit code 1 if anything did

Rows are compared by the fastest round (on CUDA by the GPU's own work): what else the machine does can only make a round
slower.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_text

THRESHOLD = 0.25
KEY = ("question", "case", "contender")
# Column, the field of a row that it shows, and how. Those that no row of a table fills are left out.
COLUMNS = (
    ("GPU's own work, ms", "kernel_ms", "{:.3f}"),
    ("graph replay, ms", "graph_ms", "{:.3f}"),
    ("fastest, ms", "fastest_ms", "{:.3f}"),
    ("median, ms", "median_ms", "{:.3f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("GFLOP/s", "gflops", "{:.1f}"),
    ("nominal", "nominal_gflops", "{:.1f}"),
    ("GB/s", "gb_per_s", "{:.2f}"),
    ("of the ceiling", "share_of_ceiling", "{:.0%}"),
    ("predicted, ms", "predicted_ms", "{:.3f}"),
    ("peak, MiB", "peak_mib", "{:.0f}"),
    ("KV, MiB", "kv_mib", "{:.2f}"),
    ("parameters", "parameters", "{:,}"),
)
PAGE = """# Benchmarks

Written by `python -m benchmarks.report RUN.json --out docs` from a run of `pytest benchmarks/ --benchmark-only
--benchmark-json=RUN.json`; `make bench` does both for your machine. Each row is compared with the float64 oracle by the
rule of `dsmr_kernels/tolerance.py` before it is timed, and fails instead if it is wrong; models, whose results cannot
be equal, are held to the same number of parameters and a loss that falls, ours also to the reference backend. Ratios
and rates are those of the fastest round (on CUDA of the GPU's own work, cold L2 cache). "GFLOP/s" counts what the
result needs, "nominal" what ordinary attention with all its gradients makes for it; "of the ceiling" is the least time
by the measured matrix rate and copy bandwidth (`python -m dsmr_kernels.costing.ceilings`) over the time taken. Rows of
ours are set in bold.

"""
OTHERS = {"schedules": "full memory"}  # what rows are held against, where it is not a peer

Key = tuple[str, ...]


@dataclass
class Run:
    """A saved run: its rows by question, case and contender, and the rows that were not timed."""

    machine: dict[str, str]
    profile: str
    rows: dict[Key, dict[str, Any]]
    untimed: list[dict[str, str]] = field(default_factory=list)

    @property
    def questions(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Rows by question and then by case, in the order of the run."""
        found: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for row in self.rows.values():
            found.setdefault(row["question"], {}).setdefault(row["case"], []).append(row)
        return found


def load(path: Path) -> Run:
    """Read a file of `pytest --benchmark-json`; `UserError` in one sentence if it is not one of these benchmarks."""
    content = read_json(path)
    try:
        rows = {}
        for benchmark in content["benchmarks"]:
            said, stats = benchmark["extra_info"], benchmark["stats"]
            if "question" not in said:  # a benchmark that was not made by benchmarks/parts/rows.py
                continue
            row = {**said, "fastest_ms": 1e3 * stats["min"], "median_ms": 1e3 * stats["median"]}
            row["ms"] = row.get("kernel_ms", row["fastest_ms"])
            rows[tuple(str(row[name]) for name in KEY)] = row
        machine = {str(name): str(value) for name, value in content["machine_info"].items()}
        untimed = [{str(name): str(value) for name, value in row.items()} for row in content.get("untimed", [])]
        run = Run(machine, str(content.get("profile", "unknown")), rows, untimed)
        _ = [(row["question"], row["contender"], row["reason"], row["status"]) for row in untimed]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a run of these benchmarks saved by --benchmark-json: {what}") from error
    if not rows:
        raise UserError(f"{path} holds no rows of these benchmarks: run pytest benchmarks/ --benchmark-only")
    return run


def against_best(rows: Iterable[dict[str, Any]]) -> float | None:
    """The least time among the rows that are not ours; None if there is none."""
    return min((row["ms"] for row in rows if not row["ours"]), default=None)


def table(cases: dict[str, list[dict[str, Any]]], question: str) -> str:
    """One question as Markdown."""
    every = [row for rows in cases.values() for row in rows]
    columns = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in every)]
    other = OTHERS.get(question, "the best peer")
    heads = ["case", "contender", *(head for head, _, _ in columns), f"times as fast as {other}"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(columns) + 1)]
    for case, rows in cases.items():
        best, name = against_best(rows), case
        for row in sorted(rows, key=lambda row: float(row["ms"])):
            shown = [form.format(row[key]) if row.get(key) is not None else "" for _, key, form in columns]
            ratio = "" if best is None else f"{best / row['ms']:.2f} ×"
            if row["ours"]:
                ratio = f"**{ratio}**" if ratio else ""
            lines.append(f"| {name} | {row['contender']} | {' | '.join(shown)} | {ratio} |")
            name = ""
    return "\n".join(lines)


def not_timed(rows: list[dict[str, str]]) -> str:
    """The rows of one question that were skipped or that failed, by contender and reason."""
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        key = (row["contender"], row["status"], row["reason"])
        counts[key] = counts.get(key, 0) + 1
    return "\n".join(
        f"- {contender}: {status}{f' in {count} rows' if count > 1 else ''}: {reason}"
        for (contender, status, reason), count in counts.items()
    )


def markdown(run: Run) -> str:
    """All tables, the machine above them."""
    machine = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    parts = [f"Measured on: {machine} ({run.profile} profile)."]
    unseen = {row["question"]: None for row in run.untimed}
    for question in [*run.questions, *(name for name in unseen if name not in run.questions)]:
        parts.append(f"### {question[0].upper()}{question[1:]}, {run.machine.get('device', 'unknown device')}")
        if question in run.questions:
            parts.append(table(run.questions[question], question))
        if missing := [row for row in run.untimed if row["question"] == question]:
            parts.append(f"Not timed:\n\n{not_timed(missing)}")
    return "\n\n".join(parts) + "\n"


def slug(question: str) -> str:
    """A question as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", question.lower()).strip("-")


def picture(folder: Path, question: str) -> Path:
    """Where a question's picture lies."""
    return folder / "images" / f"bench-{slug(question)}.png"


def draw(run: Run, folder: Path) -> list[Path]:
    """For each question a picture of how many times as fast as the best of the others ours is, case by case."""
    from dsmr.console.figures import new_figure, save

    written = []
    for question, cases in run.questions.items():
        bars = [
            (f"{case}\n{row['contender']}", best / row["ms"], row["dtype"])
            for case, rows in cases.items()
            if (best := against_best(rows)) is not None
            for row in rows
            if row["ours"]
        ]
        if not bars:
            continue
        figure, axes = new_figure(size=(9.5, 0.5 * len(bars) + 1.2))
        colours = ["#2a6f97" if dtype == "float32" else "#e07a5f" for _, _, dtype in bars]
        axes.barh(range(len(bars)), [ratio for _, ratio, _ in bars], color=colours)
        axes.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=1)
        for place, (_, ratio, _) in enumerate(bars):
            axes.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        other = OTHERS.get(question, "the best peer")
        axes.set_title(f"{question}, {run.machine.get('device', '?')}: times as fast as {other}", fontsize=9)
        written.append(picture(folder, question))
        save(figure, written[-1])
    return written


@dataclass(frozen=True)
class Difference:
    """A row in two runs; `after` is None if it failed or was skipped in the second."""

    key: Key
    before: float
    after: float | None
    regression: bool


def differences(before: Run, after: Run, threshold: float) -> list[Difference]:
    """Of every row of the first run that the second one timed, or tried to.

    Raises:
        UserError: if the runs cannot be compared: other devices, other threads, or no row in common.
    """
    for name in ("device", "processor", "threads"):
        one, other = before.machine.get(name), after.machine.get(name)
        if one != other:
            raise UserError(f"the runs cannot be compared: {name} is {one} in the first and {other} in the second")
    tried = {tuple(row.get(name, "") for name in KEY): row["status"] for row in after.untimed}
    found = []
    for key, row in before.rows.items():
        if key in after.rows:
            ms = after.rows[key]["ms"]
            found.append(Difference(key, row["ms"], ms, ms > (1 + threshold) * row["ms"]))
        elif key in tried:
            found.append(Difference(key, row["ms"], None, tried[key] == "failed"))
    if not found:
        raise UserError("the runs cannot be compared: they have no row in common (quick and full differ in shapes)")
    return found


def differences_table(found: list[Difference], threshold: float) -> str:
    """The rows that changed by more than the threshold, and a sentence on all."""
    lines = ["| question | case | contender | before, ms | after, ms | change |", "|---|---|---|--:|--:|---|"]
    for one in found:
        if one.after is None:
            last = "| | no longer timed |"
        elif not one.regression and one.after * (1 + threshold) >= one.before:
            continue
        else:
            last = f"| {one.after:.3f} | {one.after / one.before - 1:+.0%}{' slower' if one.regression else ''} |"
        lines.append(f"| {' | '.join(one.key)} | {one.before:.3f} {last}")
    slower = sum(one.regression for one in found)
    lines.append(f"\n{slower} of {len(found)} rows became slower by more than {threshold:.0%}, or fail now.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 for what the user can mend and for regressions."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="one saved run, or two to compare")
    parser.add_argument("--out", type=Path, help="folder for benchmarks.md and the pictures")
    parser.add_argument("--note", default="", help="a sentence on the circumstances, put above the tables")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="share by which a row may become slower")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) > 2:
            raise UserError(f"one run is shown and two are compared, got {len(options.runs)} files")
        if not options.threshold >= 0:
            raise UserError(f"--threshold must be at least 0, got {options.threshold}")
        runs = [load(path) for path in options.runs]
        regressions = 0
        if len(runs) == 2:
            found = differences(runs[0], runs[1], options.threshold)
            text = differences_table(found, options.threshold)
            regressions = sum(one.regression for one in found)
        else:
            text = (f"{options.note}\n\n" if options.note else "") + markdown(runs[0])
        print(text)
        if options.out is not None:
            drawn = draw(runs[-1], options.out) if len(runs) == 1 else []
            shown = "".join(f"\n![{path.stem}]({path.relative_to(options.out)})\n" for path in drawn)
            write_text(options.out / "benchmarks.md", PAGE + text + shown)
            for path in drawn:
                print(f"wrote {path}", file=sys.stderr)
    except UserError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 1 if regressions else 0


if __name__ == "__main__":
    raise SystemExit(main())
