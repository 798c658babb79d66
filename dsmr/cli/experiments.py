"""`dsmr experiments`: the paper's models side by side."""

import time
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
    few_heads: Annotated[
        int | None, typer.Option(min=1, help="KV heads of FHCR.", show_default="2 where these divide the heads, else 1")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write it as JSON.", show_default="no")] = None,
) -> None:
    """The paper's ten models and ours at one size: schedule, budget, and where each comes from."""
    from dsmr.console.files import check_replaceable, write_json
    from dsmr.experiments.listing import listing, sentences, table
    from dsmr.experiments.presets import Size

    check_replaceable(json)
    few = few_heads if few_heads is not None else (1 if heads % 2 else 2)
    size = Size(layers, heads, head_dim, length, short, n_long, few)
    rows = listing(size)
    if json is not None:
        write_json(json, rows, sealed=True)
    console().print(table(rows, size))
    for line in sentences(rows):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


@group.command("run")
@command
def run(
    table: Annotated[Path, typer.Argument(help="A table of cells, such as experiments/composed.toml.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.", show_default=False)],
    jobs: Annotated[int, typer.Option(min=1, help="Cells at once, a core (or GPU) each; of each rank.")] = 1,
    graph: Annotated[
        bool, typer.Option("--graph", help="Train by CUDA graphs, as of dsmr train; needs a GPU.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="The corpus, where it is not where the table says.", show_default="the table's")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Models or cells of the table, such as full,fhcr-s0.", show_default="all")
    ] = None,
    finished: Annotated[
        Path | None, typer.Option(help="Rows of cells finished elsewhere, not to be run.", show_default="none")
    ] = None,
) -> None:
    """Train and measure every cell of a table. Stop it, kill it: the same command goes on where it was.

    Several cells at once are spread over the GPUs that there are. Under torchrun whichever process is free takes the
    next cell, each on a GPU of its own.
    """
    from dsmr.console.ranks import LONG, Ranks, together
    from dsmr.experiments.rows import read_rows
    from dsmr.experiments.runner import run_table
    from dsmr.experiments.table import Table

    cells = Table.load(table)
    if only is not None:
        cells = cells.only([name.strip() for name in only.split(",")])
    if finished is not None:
        rows = read_rows(finished)
        try:
            cells = cells.without(rows)
        except UserError as error:
            raise UserError(f"{finished}: {error}") from error
        if not cells.cells:
            said = f"nothing is left to run: {finished} has a row of every cell that was asked for"
            console().print(said, highlight=False, markup=False, soft_wrap=True)
            return
    with together(Ranks, "cpu", nccl=False, patience=LONG) as ranks:
        result = run_table(cells, out, jobs=jobs, data=data, graph=graph, ranks=ranks)
    if result.failed and result.signal is None and ranks.first:
        raise UserError("; ".join(f"{key} failed: {why}" for key, why in result.failed.items()))
    if result.exit_code:
        raise SystemExit(result.exit_code)


@group.command("report")
@command
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of `run`, files of rows; the first of a cell counts.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the report.", show_default="RESULTS/report, FILE-report"),
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="Also keep the rows in this JSON file.", show_default="no")] = None,
) -> None:
    """One table of all finished cells (report.md and .json), and the pictures."""
    from dsmr.console.files import check_replaceable
    from dsmr.experiments.report import write_report
    from dsmr.experiments.rows import read_rows

    check_replaceable(rows)
    found, first = read_rows(*results), results[0]
    beside = first / "report" if first.is_dir() else first.with_name(f"{first.stem}-report")
    for line in write_report(found, out or beside, rows_path=rows):
        console().print(line, highlight=False, markup=False, soft_wrap=True)


@group.command("search")
@command
def search(
    run: Annotated[Path, typer.Argument(help="A trained run, of a full schedule best.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the results.", show_default="RUN/search")
    ] = None,
    budget: Annotated[str, typer.Option(help="Bytes of one stream's memory, such as 2MiB, or a share: 50%.")] = "50%",
    on: Annotated[str, typer.Option(help="Count the loss on all tokens, or at planted returns: tokens, returns.")] = (
        "tokens"
    ),
    distance: Annotated[str, typer.Option(help="How far back planted returns lie, in tokens.")] = "1000,16000",
    data: Annotated[
        Path | None, typer.Option(help="The corpus.", show_default="the one that RUN was trained on")
    ] = None,
    split: Annotated[str, typer.Option(help="Measured on: train, validation or test.")] = "validation",
    tokens: Annotated[int, typer.Option(min=1, help="Measure on pieces of about so many tokens.")] = 100_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces side by side.")] = 4,
    dtype: Annotated[str, typer.Option(help="Computed in: float32, bfloat16 or auto.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> None:
    """Which layers of a trained model need distance and width, and the best schedule within a budget."""
    from dsmr.console.files import check_writable
    from dsmr.console.progress import ProgressLine, duration
    from dsmr.experiments.search import parse_budget, parse_distance
    from dsmr.experiments.search import search as find
    from dsmr.experiments.search_report import write_search

    folder = run / "search" if out is None else out
    check_writable(folder / "search.json")
    began = time.monotonic()
    with ProgressLine() as line:

        def progress(done: int, total: int) -> None:
            left = (time.monotonic() - began) / done * (total - done)
            line.update(f"{done} of {total} schedules measured, {duration(left)} to go")

        found = find(
            run,
            data,
            budget=parse_budget(budget),
            on=on,
            split=split,
            tokens=tokens,
            distance=parse_distance(distance),
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    for said in write_search(found, folder):
        console().print(said, highlight=False, markup=False, soft_wrap=True)
