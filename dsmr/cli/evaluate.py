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
    batch_size: Annotated[int, typer.Option(min=1, help="Pieces read at once, by each rank.")] = 4,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "float32",
    memory_dtype: Annotated[
        str, typer.Option(help="Of the memory: float32, bfloat16, int8, or auto: as computed in.")
    ] = "auto",
    device: Device = "auto",
    krcu: Annotated[
        bool, typer.Option("--krcu", help="What a reset of all memory costs from there on, in bins of tokens.")
    ] = False,
    retain: Annotated[
        str | None,
        typer.Option(help="What it costs to keep only the last tokens, such as 1k,4k,8k,16k.", show_default="no"),
    ] = None,
    reset: Annotated[int, typer.Option(min=1, help="Of --krcu: the token of each piece at which to reset.")] = 8192,
    bin_tokens: Annotated[int, typer.Option("--bin", min=1, help="Of --krcu: tokens of a bin.")] = 1024,
    bins: Annotated[int, typer.Option(min=1, help="Of --krcu: how many bins.")] = 22,
    returns: Annotated[
        bool, typer.Option("--returns", help="Plant returns of earlier passages and tell the loss there (tsd only).")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for eval-SPLIT.json and .png.", show_default="the run"),
    ] = None,
) -> None:
    """Stream every piece of a split whole and report nats a note, nats a second, perplexity, loss by position.

    --krcu and --retain also tell what the model remembers (memory-SPLIT.json and .png), --returns how far back it finds
    a passage that comes again (returns-SPLIT.json and .png). Under torchrun the processes share the pieces, each on a
    GPU of its own.
    """
    from dsmr.console.progress import ProgressLine, duration
    from dsmr.console.ranks import LONG, Ranks, together
    from dsmr.evaluation.losses import evaluate_run

    if baseline not in (None, "trigram"):
        raise UserError(f"unknown baseline {baseline!r}: the one there is is 'trigram'")
    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r}: use train, validation or test")
    started = time.monotonic()
    with together(Ranks, device, nccl=False, patience=LONG) as ranks, ProgressLine(ranks.console(None)) as line:
        whose = "" if ranks.alone else f" of the first of {ranks.world} ranks"

        def progress(done: int, total: int) -> None:
            elapsed = max(time.monotonic() - started, 1e-9)
            line.update(
                f"{done:,} of {total:,} tokens{whose}, {done / elapsed:,.0f} tokens/s, "
                f"{duration(elapsed / max(done, 1) * (total - done))} to go"
            )

        how: dict[str, Any] = {
            "out": out,
            "batch_size": batch_size,
            "dtype": dtype,
            "memory_dtype": memory_dtype,
            "device": ranks.device,
            "progress": progress,
            "ranks": ranks,
        }
        if krcu or retain is not None:
            from dsmr.evaluation.memory_use import Bins, parse_tokens, run_memory_use

            where = Bins(reset, bin_tokens, bins) if krcu else None
            kept = () if retain is None else parse_tokens(retain)
            report, use = run_memory_use(run, data, split, bins=where, retain=kept, **how)
            tables = [report.table(), use.table()]
        else:
            report = evaluate_run(run, data, split, **how)
            tables = [report.table()]
        if returns:
            from dsmr.evaluation.returns import run_returns

            tables.append(run_returns(run, data, split, **how).table())
    if not ranks.first:
        return
    for table in tables:
        console().print(table)
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
