"""The `dsmr` program: prepare, pack, train, eval, generate, play, budget, profile, demo.

Each command only reads its arguments, calls the function that does the work, and prints what it returns. What the user
can mend ends in one sentence on stderr and exit code 1; wrong usage in 2; Ctrl-C in 130. `DSMR_DEBUG=1` shows the
traceback instead. Heavy modules are imported inside the commands, so that `dsmr --help` answers at once.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dsmr.cli_play import generate, play
from dsmr.cli_profile import profile
from dsmr.cli_train import train
from dsmr.errors import UserError
from dsmr.terminal import command, console, parse_schedule

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="dsmr",
    help="Piano models that read whole pieces and play on for ever in bounded memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
prepare = typer.Typer(
    help="Turn MIDI files into a corpus that the other commands read.", no_args_is_help=True, context_settings=HELP
)
app.add_typer(prepare, name="prepare")


def main() -> None:
    """The console script."""
    app()


# Options that several commands share.
Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.", show_default=False)]
Tokenizer = Annotated[
    str, typer.Option(help="tsd (10 ms grid, the default), midilike, remi, or tsd_pedal (with the sustain pedal).")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one for each core")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, or cuda:N.")]
Schedule = Annotated[
    str,
    typer.Option(
        help="Memory of every layer, in tokens, such as 'two_scale(layers=8, long=4096, short=512, n_long=2)'.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result.")]


# --- prepare ------------------------------------------------------------------------------------------------------


@prepare.command("midi")
@command
def prepare_midi(
    folder: Annotated[Path, typer.Argument(help="Folder with .mid and .midi files, at any depth.", show_default=False)],
    out: Out,
    tokenizer: Tokenizer = "tsd",
    jobs: Jobs = None,
    overwrite: Overwrite = False,
) -> None:
    """A folder of piano MIDI. Files that cannot be read are skipped, counted and named."""
    from dsmr.data import prepare as work

    console().print(work.prepare_midi(folder, out, tokenizer=tokenizer, jobs=jobs, overwrite=overwrite).table())


@prepare.command("maestro")
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
    from dsmr.data import prepare as work

    if source is None and not download:
        raise UserError("name the folder or archive that holds MAESTRO, or add --download to fetch it")
    report = work.prepare_maestro(source, out, tokenizer=tokenizer, jobs=jobs, download=download, overwrite=overwrite)
    console().print(report.table())


@prepare.command("composed")
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
    from dsmr.data import prepare as work

    report = work.prepare_composed(out, pieces=pieces, seed=seed, tokenizer=tokenizer, jobs=jobs, overwrite=overwrite)
    console().print(report.table())


@app.command()
@command
def pack(
    corpus: Annotated[Path, typer.Argument(help="A corpus directory written by `prepare`.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="The packed file to write (.dsmr).", show_default=False)],
) -> None:
    """Pack a prepared corpus into one compressed file; every command opens it like the directory."""
    from dsmr.data.pack import pack as work
    from dsmr_kernels.cost import human_bytes

    work(corpus, file)
    console().print(f"{file}: {human_bytes(file.stat().st_size)}")


app.command()(train)


# --- eval, generate, play -----------------------------------------------------------------------------------------


@app.command("eval")
@command
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory written by `train`.", show_default=False)],
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    data: Annotated[
        Path | None, typer.Option(help="Another corpus of the same tokeniser.", show_default="the run's own")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="'trigram': also count trigrams of the training split.", show_default="none")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces read at once.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "float32",
    memory_dtype: Annotated[
        str, typer.Option(help="Of the memory: float32, bfloat16, int8, or auto: as computed in.")
    ] = "auto",
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for eval-SPLIT.json and .png.", show_default="the run")
    ] = None,
) -> None:
    """Stream every piece of a split whole and report nats a note, nats a second, perplexity, loss by position."""
    from dsmr.evaluation import evaluate_run
    from dsmr.progress import ProgressLine, duration

    if baseline not in (None, "trigram"):
        raise UserError(f"unknown baseline {baseline!r}: the one there is is 'trigram'")
    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r}: use train, validation or test")
    started = time.monotonic()
    with ProgressLine() as line:

        def progress(done: int, total: int) -> None:
            elapsed = max(time.monotonic() - started, 1e-9)
            line.update(
                f"{done:,} of {total:,} tokens, {done / elapsed:,.0f} tokens/s, "
                f"{duration(elapsed / max(done, 1) * (total - done))} to go"
            )

        report = evaluate_run(
            run,
            data,
            split,
            out=out,
            batch_size=batch_size,
            dtype=dtype,
            memory_dtype=memory_dtype,
            device=device,
            progress=progress,
        )
    console().print(report.table())
    if baseline:
        compare_with_trigram(report, run, data, split)


def compare_with_trigram(report: Any, run: Path, data: Path | None, split: str) -> None:
    """Print the trigram's figures and who is ahead."""
    from dsmr.data.corpus import Corpus
    from dsmr.ngram import evaluate_trigram
    from dsmr.settings import TrainConfig

    trigram = evaluate_trigram(Corpus.open(data or TrainConfig.of_run(run).data), split)
    ahead = trigram.nats_per_note - report.nats_per_note
    out = console()
    out.print(trigram.table())
    out.print(f"the model is {abs(ahead):.4f} nats a note {'better' if ahead > 0 else 'worse'} than the trigram")


app.command()(generate)
app.command()(play)


# --- budget, profile, demo --------------------------------------------------------------------------------------------


@app.command()
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
    from dsmr.budget import budget_of
    from dsmr.files import write_json

    found = budget_of(
        parse_schedule(schedule),
        n_heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        batch=batch,
        segment_length=segment_length,
    )
    if json is not None:
        write_json(json, found.to_json())
    console().print(found.table())


app.command()(profile)


@app.command()
@command
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that the demo makes.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(min=0.05, help="Minutes of computing, about.")] = 3.5,
    seed: Seed = 0,
) -> None:
    """Compose a corpus, train with and without long memory, compare on refrain returns, continue a piece, draw."""
    from dsmr.demo import run_demo

    run_demo(out, minutes=minutes, seed=seed, console=console())
