"""`dsmr train`: its many options, each a field of `TrainConfig`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dsmr.cli.options import parse_schedule
from dsmr.console.errors import UserError
from dsmr.console.terminal import command

# Options of `train` are None where they are not given: then the run's own settings (--resume) or the defaults hold.
Number = float | None
Whole = int | None


def setting(help_text: str, name: str) -> Any:
    """An option of `train` that shows the default of the `TrainConfig` field `name`."""
    return typer.Option(help=help_text, show_default=TRAIN_DEFAULTS[name])


# The defaults of `TrainConfig`, which imports torch; tests hold them against it.
TRAIN_DEFAULTS = {
    "schedule": "two_scale(layers=8, long=4096, short=512, n_long=2)",
    "d_model": "512",
    "n_heads": "8",
    "d_ff": "4 × d_model",
    "segment_length": "1024",
    "visibility": "segment",
    "position": "rope",
    "ffn": "gelu",
    "dropout": "0.1",
    "rope_base": "10000.0",
    "init_std": "0.02",
    "recall": "0",
    "batch_size": "4",
    "segments_per_step": "1",
    "augment": "augment",
    "curriculum": "0.0",
    "returns": "0.0",
    "returns_nearest": "1000",
    "returns_farthest": "16000",
    "seed": "0",
    "steps": "no limit",
    "epochs": "10, if no length is given",
    "minutes": "no limit",
    "lr": "0.0005",
    "warmup": "3 % of the run",
    "weight_decay": "0.1",
    "clip": "1.0",
    "device": "auto",
    "dtype": "auto",
    "threads": "all cores",
    "checkpoint_layers": "no",
    "compile": "no",
    "graph": "no",
    "eval_every": "20 times a run",
    "save_minutes": "5.0",
}


@command
def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run directory.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="A prepared corpus (directory or packed file).", show_default="with --resume, the run's own"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the run in --out was stopped or killed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a former run in --out first.")] = False,
    schedule: Annotated[str | None, setting("Memory of every layer, in tokens; a layer an entry.", "schedule")] = None,
    d_model: Annotated[Whole, setting("Width of the model.", "d_model")] = None,
    n_heads: Annotated[Whole, setting("Query heads.", "n_heads")] = None,
    d_ff: Annotated[Whole, setting("Width of the feed-forward layers.", "d_ff")] = None,
    segment_length: Annotated[Whole, setting("Tokens of a segment.", "segment_length")] = None,
    visibility: Annotated[str | None, setting("segment (the paper) or sliding.", "visibility")] = None,
    position: Annotated[str | None, setting("rope, sinusoidal, alibi or none.", "position")] = None,
    ffn: Annotated[str | None, setting("Kind of the feed-forward layers.", "ffn")] = None,
    dropout: Annotated[Number, setting("Share of the residual stream dropped in training.", "dropout")] = None,
    rope_base: Annotated[Number, setting("Base of the rotary frequencies.", "rope_base")] = None,
    init_std: Annotated[Number, setting("Standard deviation of the initial weights.", "init_std")] = None,
    recall: Annotated[Whole, setting("Label keys and queries with the last so many tokens.", "recall")] = None,
    batch_size: Annotated[Whole, setting("Pieces read side by side.", "batch_size")] = None,
    segments_per_step: Annotated[Whole, setting("Segments of each piece in a step.", "segments_per_step")] = None,
    augment: Annotated[bool | None, setting("Transpose and stretch the training pieces on the fly.", "augment")] = None,
    curriculum: Annotated[
        Number,
        setting(
            "Part of the run in which stretches that are remembered grow, from a segment to the piece.", "curriculum"
        ),
    ] = None,
    returns: Annotated[
        Number, setting("Share of tokens in planted returns of earlier passages (tsd only); ours.", "returns")
    ] = None,
    returns_nearest: Annotated[Whole, setting("Least distance of a planted return, tokens.", "returns_nearest")] = None,
    returns_farthest: Annotated[
        Whole, setting("Greatest distance of a planted return, tokens.", "returns_farthest")
    ] = None,
    seed: Annotated[Whole, setting("The same seed trains the same model.", "seed")] = None,
    steps: Annotated[Whole, setting("Length in steps.", "steps")] = None,
    epochs: Annotated[Number, setting("Length in passes over the training split.", "epochs")] = None,
    minutes: Annotated[Number, setting("Length in minutes.", "minutes")] = None,
    lr: Annotated[Number, setting("Highest learning rate.", "lr")] = None,
    warmup: Annotated[Whole, setting("Steps in which the learning rate rises.", "warmup")] = None,
    weight_decay: Annotated[Number, setting("AdamW's weight decay.", "weight_decay")] = None,
    clip: Annotated[Number, setting("Longest gradient let through; 0 lets every one.", "clip")] = None,
    device: Annotated[str | None, setting("auto (the GPU where there is one), cpu, cuda, cuda:N.", "device")] = None,
    dtype: Annotated[
        str | None, setting("float32, bfloat16, or auto (bfloat16 where the hardware has it).", "dtype")
    ] = None,
    threads: Annotated[Whole, setting("CPU threads.", "threads")] = None,
    checkpoint_layers: Annotated[
        bool | None,
        setting("Compute each layer again in the backward: less memory, more time, same result.", "checkpoint_layers"),
    ] = None,
    compile: Annotated[
        bool | None, setting("Fuse the layers with torch.compile; needs a C++ compiler (on a GPU Triton).", "compile")
    ] = None,
    graph: Annotated[
        bool | None, setting("Replay the step as a CUDA graph: for small models, which Python keeps waiting.", "graph")
    ] = None,
    eval_every: Annotated[Whole, setting("Steps between validations.", "eval_every")] = None,
    save_minutes: Annotated[Number, setting("Minutes between checkpoints.", "save_minutes")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="ddp or fsdp: the processes that torchrun started train together, each on its rows of the batch, with "
            "the whole model (ddp) or a part of it.",
            show_default="one process",
        ),
    ] = None,
) -> None:
    """Train on streams of whole pieces. The run ends when the first of --steps, --epochs, --minutes is reached."""
    given = {name: value for name, value in locals().items() if name in TRAIN_DEFAULTS and value is not None}
    from dataclasses import replace

    from dsmr.runs.settings import TrainConfig
    from dsmr.training.loop import train as work

    if schedule is not None:
        parse_schedule(schedule)
    if data is not None:
        given["data"] = str(data)
    if resume:
        config = replace(TrainConfig.of_run(out), **given)
    elif data is None:
        raise UserError("name the corpus with --data (or go on with a former run with --resume)")
    else:
        config = TrainConfig(out=str(out), **given)
    result = work(config, resume=resume, overwrite=overwrite, parallel=parallel)
    if result.exit_code:
        raise SystemExit(result.exit_code)
