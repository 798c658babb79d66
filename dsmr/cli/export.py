"""`dsmr export`: a run as a model that plays without PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import Out, Overwrite
from dsmr.console.shown import shown
from dsmr.console.terminal import command, console


@command
def export(
    run: Annotated[Path, typer.Argument(help="A run directory written by `train`.", show_default=False)],
    out: Out,
    weights: Annotated[
        str, typer.Option(help="Of the layers' matrices: float32, or int8 (a quarter of the bytes).")
    ] = "float32",
    memory_dtype: Annotated[str, typer.Option(help="Of keys and values: float32, float16 or int8.")] = "float32",
    portable: Annotated[
        bool, typer.Option("--portable", help="For other runtimes: operators of the ONNX standard only, slower.")
    ] = False,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="MIDI file that an int8 memory must have room for; may be given several times."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model that ONNX Runtime plays, also where PyTorch is not installed: model.onnx, export.json and
    tokenizer.json in --out, for `generate` and `play`."""
    from dsmr.console.progress import ProgressLine
    from dsmr.console.words import human_bytes
    from dsmr.export.write import export_run

    with ProgressLine() as line:
        done = export_run(
            run,
            out,
            weights=weights,
            memory_dtype=memory_dtype,
            portable=portable,
            calibrate=calibrate or (),
            overwrite=overwrite,
            say=line.update,
        )
    kind = "portable, " if done.portable else ""
    found = "not compared with PyTorch, as ONNX Runtime is not installed"
    if done.error is not None:
        found = f"logits within {done.error:.1e} of PyTorch's in float32, of the largest"
    console().print(
        f"{shown(done.folder)}: {kind}weights in {done.weights}, memory in {done.memory}, {human_bytes(done.nbytes)}; "
        f"{found}",
        soft_wrap=True,
    )
