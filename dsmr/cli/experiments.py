"""`dsmr experiments`: the paper's models side by side."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import HELP
from dsmr.console.errors import UserError
from dsmr.console.terminal import command, console

group = typer.Typer(
    help="The paper's models side by side: list them, run a table of them, report what came out.",
    no_args_is_help=True,
    context_settings=HELP,
)


@group.command("list")
@command
def list_presets(
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 12,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of one head.")] = 64,
    length: Annotated[int, typer.Option(min=0, help="The horizon that counts as the whole piece, in tokens.")] = 8192,
    short: Annotated[int, typer.Option(min=0, help="The short horizon of two-scale.")] = 512,
    n_long: Annotated[int, typer.Option(min=0, help="Long layers of two-scale.")] = 3,
    json: Annotated[Path | None, typer.Option("--json", help="Also write it as JSON.", show_default="no")] = None,
) -> None:
    """The ten models of the paper's table at one size: schedule, budget, and where each comes from."""
    from dsmr.console.files import write_json
    from dsmr.experiments.listing import listing, sentences, table
    from dsmr.experiments.presets import Size

    size = Size(layers, heads, head_dim, length, short, n_long)
    rows = listing(size)
    if json is not None:
        write_json(json, rows)
    console().print(table(rows, size))
    for line in sentences(rows):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


@group.command("run")
@command
def run(
    table: Annotated[Path, typer.Argument(help="A table of cells, such as experiments/composed.toml.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once, a core each.")] = 1,
    data: Annotated[
        Path | None, typer.Option(help="The corpus, where it is not where the table says.", show_default="the table's")
    ] = None,
) -> None:
    """Train and measure every cell of a table. Stop it, kill it: the same command goes on where it was."""
    from dsmr.experiments.runner import run_table
    from dsmr.experiments.table import Table

    result = run_table(Table.load(table), out, jobs=jobs, data=data)
    if result.failed and result.signal is None:
        raise UserError("; ".join(f"{key} failed: {why}" for key, why in result.failed.items()))
    if result.exit_code:
        raise SystemExit(result.exit_code)


@group.command("report")
@command
def report(
    results: Annotated[Path, typer.Argument(help="A folder of `run`, or a file of rows.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the report.", show_default="RESULTS/report")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Also keep the rows in this JSON file.", show_default="no")] = None,
) -> None:
    """One table of all finished cells (report.md and .json), and the pictures."""
    from dsmr.experiments.report import write_report
    from dsmr.experiments.rows import read_rows

    found = read_rows(results)
    folder = out if out is not None else (results if results.is_dir() else results.parent) / "report"
    for line in write_report(found, folder, rows_path=rows):
        console().print(line, highlight=False, markup=False, soft_wrap=True)
