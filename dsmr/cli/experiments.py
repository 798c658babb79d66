"""`dsmr experiments`: the paper's models side by side."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import HELP
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
        console().print(line, highlight=False, soft_wrap=True)
