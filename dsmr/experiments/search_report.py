"""What a search found, as a page, a picture, plain values, and a table's lines to train what it proposes."""

from pathlib import Path

from dsmr.console.figures import available, new_figure, save
from dsmr.console.files import write_json, write_text
from dsmr.experiments.search import HORIZON, KV_HEADS, Search
from dsmr.model.schedule import MemorySchedule
from dsmr_kernels.costing.cost import human_bytes


def write_search(found: Search, out: str | Path) -> list[str]:
    """Write search.md, search.json, found.toml and, with Matplotlib, search.png into `out`; returns the page and what
    was written, line by line."""
    folder = Path(out)
    picture = folder / "search.png"
    write_json(folder / "search.json", found.to_json(), sealed=True)
    write_text(folder / "found.toml", lines_of_table(found))
    if available():
        draw(found, picture)
    text = page(found, picture.name if available() else None)
    write_text(folder / "search.md", text)
    written = [folder / name for name in ("search.md", "search.json", "found.toml")]
    return [*text.splitlines(), *map(str, written), *([str(picture)] if available() else [])]


def page(found: Search, picture: str | None) -> str:
    """Markdown: what each layer needs, the front, the proposal."""
    what = "all tokens" if found.on == "tokens" else "planted returns"
    lines = [
        f"# What the layers of {found.run} need",
        "",
        f"Its schedule: `{found.own}`, {human_bytes(found.bytes)} a stream (bfloat16). Measured on {found.corpus}, "
        f"{found.split} split, {found.pieces} pieces: "
        f"{found.base.tokens:.4f} nats a token"
        + ("" if found.base.returns is None else f", {found.base.returns:.4f} at planted returns")
        + ". Nothing was trained: a model trained with a schedule from the start may do better than one that is cut.",
        "",
        f"More loss with one layer's horizon cut, in nats a token on {what}:",
        "",
        *_grid(found, HORIZON),
        "",
        "With one layer's KV heads merged:",
        "",
        *_grid(found, KV_HEADS),
        "",
        "The best schedules by size, if the costs of layers add up; measured whole where it says so:",
        "",
        "| horizons, from the bottom | KV heads | bytes | of its own | predicted | measured |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for point in found.front:
        if point.measured is None and point != found.best and len(found.front) > 24:
            continue
        measured = "" if point.measured is None else f"{point.measured.on(found.on):+.4f}"
        lines.append(
            f"| {', '.join(map(str, point.horizons))} | {', '.join(map(str, point.kv_heads))} | "
            f"{human_bytes(point.bytes)} | {point.bytes / found.bytes:.0%} | {point.predicted:+.4f} | {measured} |"
        )
    lines += [
        "",
        f"Within {human_bytes(found.budget)}: `{found.best.schedule}`, {human_bytes(found.best.bytes)}. To train it "
        "beside others, put the lines of found.toml into a table of `dsmr experiments run`.",
    ]
    if picture is not None:
        lines += ["", f"![what the layers need, and the front]({picture})"]
    return "\n".join(lines) + "\n"


def _grid(found: Search, what: str) -> list[str]:
    cells = {(cost.layer, cost.value): cost.more.on(found.on) for cost in found.costs if cost.what == what}
    columns = sorted({value for _, value in cells}, reverse=True)
    if not columns:
        return ["(a single KV head in every layer: there is nothing to merge)"]
    title = "tokens" if what == HORIZON else "KV heads"
    rows = [
        f"| layer | {' | '.join(f'{value:,} {title}' for value in columns)} |",
        "|---" + "|--:" * len(columns) + "|",
    ]
    for layer in sorted({layer for layer, _ in cells}):
        values = (cells.get((layer, value)) for value in columns)
        rows.append(f"| {layer} | {' | '.join('' if v is None else f'{v:+.4f}' for v in values)} |")
    return rows


def lines_of_table(found: Search) -> str:
    """What to put into a table of cells to train the proposal."""
    return (
        f"# Proposed by `dsmr experiments search` for {human_bytes(found.budget)} a stream, from {found.run}.\n"
        f'[models.found]\nschedule = "{found.best.schedule}"\n\n[cells]\nfound = [0]\n'
    )


def draw(found: Search, path: Path) -> None:
    """Left: what a shorter horizon costs, a line a layer. Right: the front, predicted and measured."""
    figure, (left, right) = new_figure(1, 2, (12, 4.6))
    what = "all tokens" if found.on == "tokens" else "planted returns"
    own = MemorySchedule.parse(found.own)
    for layer, horizon in enumerate(own.horizons):
        cuts = [(c.value, c.more.on(found.on)) for c in found.costs if (c.layer, c.what) == (layer, HORIZON)]
        line = sorted([*cuts, (horizon, 0.0)])
        left.plot([h for h, _ in line], [cost for _, cost in line], marker="o", markersize=4, label=f"layer {layer}")
    left.set_xscale("symlog", base=2, linthresh=64)
    left.set_xlabel("horizon that the layer is cut to (tokens)")
    left.set_ylabel(f"more loss on {what} (nats a token)")
    left.legend()
    size = [point.bytes / 2**20 for point in found.front]
    right.plot(size, [p.predicted for p in found.front], color="C0", label="predicted: costs of layers added")
    seen = [(point.bytes / 2**20, point.measured.on(found.on)) for point in found.front if point.measured is not None]
    right.plot([x for x, _ in seen], [y for _, y in seen], "C1o", label="measured")
    right.axvline(found.budget / 2**20, color="0.5", linestyle=":", label="budget")
    right.set_xlabel("memory of one stream (MiB, bfloat16)")
    right.set_ylabel(f"more loss on {what} (nats a token)")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)
