"""`dsmr budget`: what a schedule costs, counted."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import Schedule, parse_schedule
from dsmr.console.terminal import command, console


@command
def budget(
    schedule: Schedule,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of one head.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Query heads; KV heads too where the schedule names none.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the memory: float32, bfloat16, float16 or int8.")] = "bfloat16",
    batch: Annotated[int, typer.Option(min=1, help="Streams.")] = 1,
    segment_length: Annotated[int, typer.Option(min=1, help="Tokens of a segment, for the FLOPs.")] = 1024,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the table as JSON.", show_default="no")
    ] = None,
) -> None:
    """What a schedule costs, layer by layer and against full memory: bytes of state, attention FLOPs a token."""
    from dsmr.console.files import check_replaceable, write_json
    from dsmr.profiling.budget_table import budget_of

    check_replaceable(json)
    found = budget_of(
        parse_schedule(schedule),
        n_heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        batch=batch,
        segment_length=segment_length,
    )
    if json is not None:
        write_json(json, found.to_json(), sealed=True)
    console().print(found.table())
