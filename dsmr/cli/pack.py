"""`dsmr pack`: a prepared corpus as one file."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.console.terminal import command, console


@command
def pack(
    corpus: Annotated[Path, typer.Argument(help="A corpus directory written by `prepare`.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="The packed file to write (.dsmr).", show_default=False)],
) -> None:
    """Pack a prepared corpus into one compressed file; every command opens it like the directory."""
    from dsmr.corpus.pack import pack as work
    from dsmr_kernels.costing.cost import human_bytes

    work(corpus, file)
    console().print(f"{file}: {human_bytes(file.stat().st_size)}")
