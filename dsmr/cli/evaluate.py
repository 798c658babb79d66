"""`dsmr eval`: how well a run predicts a split, beside a trigram if asked."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dsmr.cli.options import Device
from dsmr.console.errors import UserError
from dsmr.console.terminal import command, console


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
    from dsmr.console.progress import ProgressLine, duration
    from dsmr.evaluation.losses import evaluate_run

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
    from dsmr.corpus.store import Corpus
    from dsmr.evaluation.trigram import evaluate_trigram
    from dsmr.runs.settings import TrainConfig

    trigram = evaluate_trigram(Corpus.open(data or TrainConfig.of_run(run).data), split)
    ahead = trigram.nats_per_note - report.nats_per_note
    out = console()
    out.print(trigram.table())
    out.print(f"the model is {abs(ahead):.4f} nats a note {'better' if ahead > 0 else 'worse'} than the trigram")
