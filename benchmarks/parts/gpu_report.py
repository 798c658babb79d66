"""The GPU run as a page: goals first, then what was measured, then how it compares with what was predicted."""

import importlib.util
from typing import Any

from benchmarks.parts.goals import OURS, Row, goals
from benchmarks.parts.predictions import predict

PASSES = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def compared(rows: list[Row]) -> list[Row]:
    """Each prediction beside the kernel time that was measured at the same shape; none without Triton's tiles."""
    if importlib.util.find_spec("triton") is None:
        return []
    measured = {
        (row["label"], row["contender"], direction): row[direction]["kernel_ms"]
        for row in rows
        if row["kind"] == "attention" and row["status"] == "ok"
        for direction in PASSES
    }
    found = []
    for row in predict():
        time = measured.get((row["label"], row["contender"], row["direction"]))
        if time is not None:
            keys = ("label", "contender", "direction", "floor_ms", "fast_ms", "expected_ms", "slow_ms")
            entry = {key: row[key] for key in keys}
            within = row["fast_ms"] <= time <= row["slow_ms"]
            found.append(entry | {"measured_ms": time, "over_floor": time / row["floor_ms"], "within": within})
    return found


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [f"# {report['machine']['device']}", "", f"Measured by `{report['command']}` on: {about}.", ""]
    lines += [
        "Each result was checked against the float64 oracle before it was timed. Kernel: the GPU's own time, by",
        "events, with a cold L2 cache. Eager: a call among others, Python included. Graph: a replay of the call's CUDA",
        "graph, timed as kernel. Medians, in milliseconds. TFLOP/s count visible pairs only.",
        "",
        "## Goals",
        "",
        "| goal | wanted | measured | met? |",
        "|---|---|--:|---|",
    ]
    for row in goals(report["rows"]):
        value = "not measured" if row["measured"] is None else f"{row['measured']:.2f} {row['unit']}"
        met = {None: "not measured", True: "yes", False: "no"}[row["met"]]
        lines.append(f"| {row['goal']} | {row['wanted']} | {value} | {met} |")
    lines += ["", "## Steps", "", "| step | outcome | seconds | |", "|---|---|--:|---|"]
    lines += [
        f"| {step['step']} | {step['status']} | {step['seconds']:.0f} | {_cell(step.get('said', ''))} |"
        for step in report["steps"]
    ]
    for label in dict.fromkeys(row["label"] for row in report["rows"] if row["kind"] == "attention"):
        lines += ["", *_shape(label, [row for row in report["rows"] if row["label"] == label])]
    for row in report["rows"]:
        if row["kind"] == "piece":
            lines += ["", *_piece(row)]
    lines += ["", "## Predicted and measured", "", *_compared(report["rows"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def _shape(label: str, rows: list[Row]) -> list[str]:
    lines = [
        f"## {label}, {rows[0]['dtype']}",
        "",
        "| | forward: kernel | eager | graph | TFLOP/s | backward: kernel | eager | graph "
        "| forward + backward: kernel | eager | graph | peak, MiB | error, of what is allowed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['contender']} | {row['status']}: {_cell(row['reason'])} |" + " |" * 11)
            continue
        cells = [row["contender"]]
        for direction in PASSES:
            times = row[direction]
            cells += [_ms(times["kernel_ms"]), _ms(times["wall_ms"]), _ms(times["graph_ms"])]
            if direction == "forward":
                cells.append(f"{times['tflops']:.1f}")
        peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        cells += [peak, f"{max(row['errors'].values()):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _piece(row: Row) -> list[str]:
    lines = [f"## Whole-piece pass, {row['label']}, {row['dtype']}", ""]
    if row["status"] != "ok":
        return [*lines, f"{row['status']}: {_cell(row['reason'])}"]
    lines += ["| forward + backward | kernel, ms | eager, ms | tokens/s |", "|---|--:|--:|--:|"]
    for key, name in (("at_once", "at once"), ("in_turn", f"{row['segments']} calls in turn")):
        times = row[key]
        lines.append(f"| {name} | {times['kernel_ms']:.2f} | {times['wall_ms']:.2f} | {times['tokens_per_s']:,.0f} |")
    return [
        *lines,
        "",
        f"{row['gain']:.2f} times the tokens/s; results differ by {row['difference']:.2g} of the largest.",
    ]


def _compared(rows: list[Row]) -> list[str]:
    found = compared(rows)
    if not found:
        return ["Nothing was measured at a shape with a prediction."]
    lines = [
        "Predictions are for an H100: see `benchmarks/parts/predictions.py`.",
        "",
        "| shape | contender | pass | floor, ms | fast | expected | slow | measured | over the floor | within? |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        times = [f"{row[key]:.3f}" for key in ("floor_ms", "fast_ms", "expected_ms", "slow_ms", "measured_ms")]
        cells = [row["label"], row["contender"], PASSES[row["direction"]], *times, f"{row['over_floor']:.1f} x"]
        lines.append("| " + " | ".join([*cells, "yes" if row["within"] else "no"]) + " |")
    return lines


def summary(report: dict[str, Any]) -> str:
    """The end of the run for the terminal: the goals, and what went wrong."""
    lines = []
    for row in goals(report["rows"]):
        value = "not measured" if row["measured"] is None else f"{row['measured']:.2f} {row['unit']}"
        lines.append(
            f"{ {None: '?', True: 'met', False: 'missed'}[row['met']]:7} {value:>18}  {row['wanted']}: {row['goal']}"
        )
    wrong = [row for row in report["rows"] if row["status"] == "failed" and row["contender"] == OURS]
    lines += [f"failed: {row['label']}: {row['reason']}" for row in wrong]
    return "\n".join(lines)
