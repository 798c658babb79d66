"""`dsmr play`: a model's music through a MIDI port, in real time."""

from pathlib import Path
from typing import Annotated

import typer

from dsmr.cli.options import (
    Device,
    Dtype,
    Engine,
    LoadState,
    MemoryDtype,
    MinP,
    Notes,
    PlaySeed,
    Prompt,
    PromptSeconds,
    SaveState,
    StopAtEnd,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    sampling_of,
)
from dsmr.console.errors import UserError
from dsmr.console.shown import shown
from dsmr.console.terminal import command, console, interrupted


@command
def play(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run directory written by `train`, or a folder of `export`.", show_default=False),
    ] = None,
    port: Annotated[
        str | None, typer.Option(help="Output port, or a part of its name.", show_default="the first one")
    ] = None,
    virtual: Annotated[
        bool, typer.Option("--virtual", help="Open a port of our own that a synthesiser can connect to.")
    ] = False,
    list_ports: Annotated[bool, typer.Option("--list-ports", help="Name the MIDI ports and leave.")] = False,
    prompt: Prompt = None,
    prompt_seconds: PromptSeconds = None,
    listen: Annotated[
        float | None,
        typer.Option(help="Listen to an input port for at most so many seconds: the prompt.", show_default=False),
    ] = None,
    input_port: Annotated[
        str | None, typer.Option("--input", help="The port to listen to.", show_default="the first one")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Length in seconds.", show_default="until Ctrl-C")] = None,
    notes: Notes = None,
    tokens: Tokens = None,
    look_ahead: Annotated[float, typer.Option(help="Seconds of music made before they sound.")] = 0.5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also keep what is played, as MIDI.", show_default="no")
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: PlaySeed = None,
    stop_at_end: StopAtEnd = False,
    save_state: SaveState = None,
    load_state: LoadState = None,
    dtype: Dtype = None,
    memory_dtype: MemoryDtype = None,
    threads: Threads = 1,
    device: Device = "auto",
    engine: Engine = "auto",
) -> None:
    """Play in real time through a MIDI port: from nothing, a MIDI file, live input, or a saved stream."""
    if list_ports:
        from dsmr.live.ports import port_names

        for kind, names in zip(("output", "input"), port_names(), strict=True):
            console().print("\n".join(f"{kind}: {shown(name)}" for name in names) or f"no {kind} port")
        return
    if run is None:
        raise UserError("name the run directory that holds the model")
    if sum(source is not None for source in (prompt, listen, load_state)) > 1:
        raise UserError("give one of --prompt, --listen and --load-state")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = sampling_of(given, load_state is not None)
    from dsmr.live.performance import play_live

    done = play_live(
        run,
        port=port,
        virtual=virtual,
        prompt=prompt,
        prompt_seconds=prompt_seconds,
        listen_seconds=listen,
        input_port=input_port,
        seconds=seconds,
        notes=notes,
        tokens=tokens,
        look_ahead=look_ahead,
        out=out,
        sampling=sampling,
        stop_at_end=stop_at_end,
        save_state=save_state,
        load_state=load_state,
        dtype=dtype,
        memory_dtype=memory_dtype,
        device=device,
        engine=engine,
        threads=threads,
        say=console().print,
    )
    console().print(
        f"{done.seconds:.1f} s played ({done.notes:,} notes, {done.tokens:,} tokens), under-runs: {done.under_runs}",
        soft_wrap=True,
    )
    if done.signal is not None:
        interrupted(done.signal, "every note is ended")
