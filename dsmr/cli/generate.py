"""`dsmr generate`: a model's music into files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Run,
    SaveState,
    SoundFont,
    StopAtEnd,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    Wav,
    check_sound,
    sampling_of,
)
from dsmr.console.shown import shown
from dsmr.console.terminal import command, console, interrupted

if TYPE_CHECKING:
    from dsmr.generation.continuation import Continuation
    from dsmr.music.sounding import Event


def _line(event: "Event", since: float) -> str:
    """A note as `--stream` prints it."""
    from dsmr.music.pianoroll import pitch_name

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
        int,
        typer.Option(min=1, max=1024, help="Continuations at once, X-1.mid, X-2.mid …; the i-th as of seed + i - 1."),
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
    seed: PlaySeed = None,
    stop_at_end: StopAtEnd = False,
    save_state: SaveState = None,
    load_state: LoadState = None,
    dtype: Dtype = None,
    memory_dtype: MemoryDtype = None,
    threads: Threads = 1,
    device: Device = "auto",
    engine: Engine = "auto",
    wav: Wav = False,
    soundfont: SoundFont = None,
) -> None:
    """Continue the beginning of a piece: MIDI of the whole, MIDI of the continuation alone, and a piano roll."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampling = sampling_of(given, load_state is not None)
    from dsmr.console.progress import ProgressLine, duration
    from dsmr.generation.continuation import Played, Unwritten, continue_variations
    from dsmr.music.sounding import ON

    wholes = [out] if variations == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(variations)]
    others = {"the prompt": prompt, "the saved stream": load_state, "where the stream is saved": save_state}
    font = check_sound(wav, soundfont, [path.with_suffix(".wav") for path in wholes], others)
    with ProgressLine() as line:

        def show(played: Played) -> None:
            if played.tokens % 16 == 0 and not stream:
                line.update(
                    f"{duration(played.seconds)} played, {played.notes:,} notes, "
                    f"{played.tokens_a_second:,.0f} tokens/s, {played.times_real_time:.1f} × real time"
                )

        unread: list[OSError] = []  # what ended the printing, which does not end the playing

        def say(row: int, event: "Event") -> None:
            if event.kind == ON and not unread:
                try:
                    print(f"{row + 1}: {_line(event, 0)}" if variations > 1 else _line(event, 0), flush=True)
                except OSError as error:
                    unread.append(error)

        unwritten: Unwritten | None = None
        try:
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
                engine=engine,
                threads=threads,
                variations=variations,
                dtype=dtype or ("auto" if load_state is None else None),
                memory_dtype=memory_dtype,
                growing=stream,
                save_state=save_state,
                load_state=load_state,
                on_progress=show,
                on_event=say if stream else None,
            )
        except Unwritten as error:  # what is there is told of first
            done, unwritten = error.done, error
    if unread:
        raise unread[0]
    print_to = console()
    missing = set() if unwritten is None else unwritten.missing
    if done[0].prompt is not None and prompt is not None:
        for notice in done[0].prompt.notices(prompt):
            print_to.print(notice, soft_wrap=True)
    for one in done:
        print_to.print(_report(one, missing), soft_wrap=True)
    if font is not None:
        for one in done:
            if one.whole not in missing:
                print_to.print(_sound(one.whole, font), soft_wrap=True, markup=False)
    if realtime:
        print_to.print(_realtime(done[0]), soft_wrap=True)
    if save_state is not None and save_state not in missing:
        print_to.print(f"{shown(save_state)}: the stream, to be played on with --load-state", soft_wrap=True)
    if unwritten is not None:
        raise unwritten
    if done[0].signal is not None:
        interrupted(done[0].signal, "what was played until then is written")


def _sound(midi: Path, font: Path) -> str:
    from dsmr.music.sound import render
    from dsmr.music.tokenizer import load_midi

    return shown(render(load_midi(midi), midi.with_suffix(".wav"), font).sentence)


def _report(done: "Continuation", missing: set[Path]) -> str:
    """How it went, and the files that are there."""
    from dsmr.console.words import human_bytes

    played = done.played
    not_there = " (not written)" if done.whole in missing else ""
    lines = [
        f"{shown(done.whole)}{not_there}: {done.prompt_seconds:.1f} s of prompt ({done.prompt_notes:,} notes), "
        f"then {played.seconds:.1f} s ({played.notes:,} notes, {played.tokens:,} tokens)"
    ]
    for path, what in ((done.continuation, "the continuation alone"), (done.picture, "piano roll")):
        if path not in missing:
            lines.append(f"{shown(path)}: {what}")
    lines.append(
        f"{played.tokens_a_second:,.0f} tokens/s, {played.times_real_time:.1f} × real time, "
        f"weights in {done.precision}, memory {human_bytes(done.state_bytes)}"
    )
    return "\n".join(lines)


def _realtime(done: "Continuation") -> str:
    played = done.played
    music = played.tokens / played.seconds if played.seconds else 0.0
    return (
        f"real time: {played.times_real_time:.2f} × the music's own tempo: it asks for {music:.1f} tokens/s and "
        f"{played.tokens_a_second:.1f} were made; played live, a look-ahead of {max(played.behind, 0):.2f} s would "
        "have sufficed"
    )
