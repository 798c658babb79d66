"""`dsmr prepare`: MIDI files, MAESTRO or the composer's pieces into a corpus."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import HELP, Jobs, Out, Overwrite, Seed, Tokenizer
from dsmr.console.errors import UserError
from dsmr.console.terminal import command, console

group = typer.Typer(
    help="Turn MIDI files into a corpus that the other commands read.", no_args_is_help=True, context_settings=HELP
)


@group.command("midi")
@command
def prepare_midi(
    folder: Annotated[Path, typer.Argument(help="Folder with .mid and .midi files, at any depth.", show_default=False)],
    out: Out,
    tokenizer: Tokenizer = "tsd",
    jobs: Jobs = None,
    overwrite: Overwrite = False,
) -> None:
    """A folder of piano MIDI. Files that cannot be read are skipped, counted and named."""
    from dsmr.corpus import prepare as work

    console().print(work.prepare_midi(folder, out, tokenizer=tokenizer, jobs=jobs, overwrite=overwrite).table())


@group.command("maestro")
@command
def prepare_maestro(
    source: Annotated[
        Path | None,
        typer.Argument(help="MAESTRO v3 as a folder or an archive (.zip, .tar.xz, …).", show_default=False),
    ] = None,
    out: Out = Path("data/maestro"),
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the archive (57 MB) from its publisher first; resumes.")
    ] = False,
    tokenizer: Tokenizer = "tsd",
    jobs: Jobs = None,
    overwrite: Overwrite = False,
) -> None:
    """MAESTRO v3 with its official split (research use only, CC BY-NC-SA 4.0)."""
    from dsmr.corpus import prepare as work

    if source is None and not download:
        raise UserError("name the folder or archive that holds MAESTRO, or add --download to fetch it")
    report = work.prepare_maestro(source, out, tokenizer=tokenizer, jobs=jobs, download=download, overwrite=overwrite)
    console().print(report.table())


@group.command("composed")
@command
def prepare_composed(
    out: Out,
    pieces: Annotated[int, typer.Option(min=3, help="Pieces to compose, of 3 to 8 minutes each.")] = 60,
    seed: Seed = 0,
    tokenizer: Tokenizer = "tsd",
    jobs: Jobs = None,
    overwrite: Overwrite = False,
) -> None:
    """Pieces of the built-in composer: rondos and variations whose refrains return after thousands of tokens."""
    from dsmr.corpus import prepare as work

    report = work.prepare_composed(out, pieces=pieces, seed=seed, tokenizer=tokenizer, jobs=jobs, overwrite=overwrite)
    console().print(report.table())
