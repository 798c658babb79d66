"""`dsmr generate` and `dsmr play`: a model's music into files and through a MIDI port."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsmr.errors import UserError
from dsmr.terminal import command, console, fail

if TYPE_CHECKING:
    from dsmr.continuation import Continuation
    from dsmr.sampling import Sampling
    from dsmr.sounding import Event

Run = Annotated[Path, typer.Argument(help="A run directory written by `train`.", show_default=False)]
Prompt = Annotated[Path | None, typer.Option(help="The MIDI file to continue.", show_default=False)]
PromptSeconds = Annotated[
    float | None, typer.Option(help="Continue from here, in seconds.", show_default="the end of the file")
]
Notes = Annotated[int | None, typer.Option(help="Length in notes.", show_default="no limit")]
Tokens = Annotated[int | None, typer.Option(help="Length in tokens.", show_default="no limit")]
Temperature = Annotated[
    float | None, typer.Option(help="Below 1 safer, above 1 wilder; 0 always the likeliest.", show_default="1.0")
]
TopK = Annotated[int | None, typer.Option(help="Draw among the k likeliest.", show_default="all")]
TopP = Annotated[
    float | None,
    typer.Option(help="Draw among the fewest that reach this probability; 1 is all.", show_default="0.98"),
]
MinP = Annotated[
    float | None,
    typer.Option(help="Drop what is so many times less likely than the likeliest.", show_default="0.0"),
]
Seed = Annotated[int | None, typer.Option(help="The same seed plays the same.", show_default="a new one")]
StopAtEnd = Annotated[bool, typer.Option("--stop-at-end", help="Let the model end the piece earlier.")]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda, or cuda:N.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Of the weights: float32, bfloat16, int8, or auto (int8 on a CPU where they outgrow its cache).",
        show_default="auto, or the saved stream's",
    ),
]
MemoryDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the memory: float32, bfloat16, or int8 (a quarter of the bytes).",
        show_default="float32, or the saved stream's",
    ),
]
Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads. One is not disturbed by other programs; more may be faster.")
]
SaveState = Annotated[Path | None, typer.Option(help="Keep the stream in this file when it ends.", show_default="no")]
LoadState = Annotated[Path | None, typer.Option(help="Play on from this file instead of a prompt.", show_default=False)]


def _sampling(given: dict[str, Any], resumed: bool) -> "Sampling | None":
    """The sampling asked for; None = the saved stream's own."""
    from dsmr.sampling import Sampling

    asked = {name: value for name, value in given.items() if value is not None}
    if resumed and not asked:
        return None
    if resumed and "seed" in asked:
        raise UserError("--seed cannot be given with --load-state: the saved stream goes on with its own draws")
    return Sampling(**{"top_p": 0.98, **asked})


def _line(event: "Event", since: float) -> str:
    """A note as `--stream` prints it."""
    from dsmr.pianoroll import pitch_name

    lasts = "" if event.seconds is None else f"  {event.seconds:.2f} s"
    return f"{event.at - since:8.2f} s  {pitch_name(event.pitch):<4} velocity {event.velocity:3d}{lasts}"


@command
def generate(
    run: Run,
    prompt: Prompt = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="MIDI file of the whole; X-continuation.mid and X.png beside it.")
    ] = Path("continued.mid"),
    prompt_seconds: PromptSeconds = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Length of the continuation in seconds.", show_default="60, if no length is given"),
    ] = None,
    notes: Notes = None,
    tokens: Tokens = None,
    variations: Annotated[
        int, typer.Option(min=1, help="Continuations at once, X-1.mid, X-2.mid …; the i-th as of seed + i - 1.")
    ] = 1,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print notes as they come, and write --out while it grows.")
    ] = False,
    realtime: Annotated[
        bool, typer.Option("--realtime", help="Report whether the model keeps up with its own music.")
    ] = False,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop_at_end: StopAtEnd = False,
    save_state: SaveState = None,
    load_state: LoadState = None,
    dtype: Dtype = None,
    memory_dtype: MemoryDtype = None,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Continue the beginning of a piece: MIDI of the whole, MIDI of the continuation alone, and a piano roll."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = _sampling(given, load_state is not None)
    import torch

    from dsmr.continuation import Played, continue_variations
    from dsmr.progress import ProgressLine, duration
    from dsmr.sounding import ON

    torch.set_num_threads(threads)
    with ProgressLine() as line:

        def show(played: Played) -> None:
            if played.tokens % 16 == 0 and not stream:
                line.update(
                    f"{duration(played.seconds)} played, {played.notes:,} notes, "
                    f"{played.tokens_a_second:,.0f} tokens/s, {played.times_real_time:.1f} × real time"
                )

        def say(row: int, event: "Event") -> None:
            if event.kind == ON:
                print(f"{row + 1}: {_line(event, 0)}" if variations > 1 else _line(event, 0), flush=True)

        done = continue_variations(
            run,
            prompt,
            out,
            prompt_seconds=prompt_seconds,
            seconds=seconds,
            notes=notes,
            tokens=tokens,
            sampling=sampling,
            stop_at_end=stop_at_end,
            device=device,
            variations=variations,
            dtype=dtype or ("auto" if load_state is None else None),
            memory_dtype=memory_dtype,
            growing=stream,
            save_state=save_state,
            load_state=load_state,
            on_progress=show,
            on_event=say if stream else None,
        )
    print_to = console()
    for reason, count in done[0].left_out.items():
        print_to.print(f"{prompt}: {count:,} notes left out: {reason}", soft_wrap=True)
    for one in done:
        print_to.print(_report(one), soft_wrap=True)
    if realtime:
        print_to.print(_realtime(done[0]), soft_wrap=True)
    if save_state is not None:
        print_to.print(f"{save_state}: the stream, to be played on with --load-state", soft_wrap=True)
    if done[0].interrupted:
        fail("interrupted; what was played until then is written", 130)


def _report(done: "Continuation") -> str:
    from dsmr_kernels.cost import human_bytes

    played = done.played
    return (
        f"{done.whole}: {done.prompt_seconds:.1f} s of prompt ({done.prompt_notes:,} notes), "
        f"then {played.seconds:.1f} s ({played.notes:,} notes, {played.tokens:,} tokens)\n"
        f"{done.continuation}: the continuation alone\n{done.picture}: piano roll\n"
        f"{played.tokens_a_second:,.0f} tokens/s, {played.times_real_time:.1f} × real time, "
        f"weights in {done.precision}, memory {human_bytes(done.state_bytes)}"
    )


def _realtime(done: "Continuation") -> str:
    played = done.played
    music = played.tokens / played.seconds if played.seconds else 0.0
    return (
        f"real time: {played.times_real_time:.2f} × the music's own tempo: it asks for {music:.1f} tokens/s and "
        f"{played.tokens_a_second:.1f} were made; played live, a look-ahead of {max(played.behind, 0):.2f} s would "
        "have sufficed"
    )


@command
def play(
    run: Annotated[Path | None, typer.Argument(help="A run directory written by `train`.", show_default=False)] = None,
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
    seed: Seed = None,
    stop_at_end: StopAtEnd = False,
    save_state: SaveState = None,
    load_state: LoadState = None,
    dtype: Dtype = None,
    memory_dtype: MemoryDtype = None,
    threads: Threads = 1,
    device: Device = "auto",
) -> None:
    """Play in real time through a MIDI port: from nothing, a MIDI file, live input, or a saved stream."""
    if list_ports:
        from dsmr.ports import port_names

        for kind, names in zip(("output", "input"), port_names(), strict=True):
            console().print("\n".join(f"{kind}: {name}" for name in names) or f"no {kind} port")
        return
    if run is None:
        raise UserError("name the run directory that holds the model")
    if sum(source is not None for source in (prompt, listen, load_state)) > 1:
        raise UserError("give one of --prompt, --listen and --load-state")
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = _sampling(given, load_state is not None)
    import torch

    from dsmr.performance import play_live

    torch.set_num_threads(threads)
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
        say=console().print,
    )
    console().print(
        f"{done.seconds:.1f} s played ({done.notes:,} notes, {done.tokens:,} tokens), under-runs: {done.under_runs}",
        soft_wrap=True,
    )
    if done.interrupted:
        fail("interrupted; every note is ended", 130)
