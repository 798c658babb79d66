"""`dsmr play`, from its arguments to the last note: model, prompt, port, recording, saved stream."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.files import check_apart, check_writable
from dsmr.console.results import Results
from dsmr.console.shown import shown
from dsmr.generation.continuation import check_resumed, inputs_of
from dsmr.generation.drawing import Sampling
from dsmr.generation.engines import check_memory_dtype, load_run, resolve_precision
from dsmr.generation.player import Limits, Player
from dsmr.generation.prompts import read_prompt
from dsmr.generation.recorder import Recorder
from dsmr.generation.saved_stream import check_stream_place, load_player, save_player
from dsmr.live.play import Performance, perform
from dsmr.live.ports import OutputPort, listen, prompt_of

if TYPE_CHECKING:
    PathLike = str | os.PathLike[str]


def play_live(
    run_dir: PathLike,
    *,
    port: str | None = None,
    virtual: bool = False,
    prompt: PathLike | None = None,
    prompt_seconds: float | None = None,
    listen_seconds: float | None = None,
    input_port: str | None = None,
    seconds: float | None = None,
    notes: int | None = None,
    tokens: int | None = None,
    look_ahead: float = 0.5,
    out: PathLike | None = None,
    sampling: Sampling | None = None,
    stop_at_end: bool = False,
    save_state: PathLike | None = None,
    load_state: PathLike | None = None,
    dtype: str | None = None,
    memory_dtype: str | None = None,
    device: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = print,
) -> Performance:
    """Play through a MIDI port until the first length is reached, or Ctrl-C; see `dsmr play --help`.

    Raises `UserError` in one sentence for what cannot be: everything is checked before the first note. The recording
    and the saved stream are written each on its own; the sentence says which of them could not be.
    """
    for name, value in (("seconds", seconds), ("notes", notes), ("tokens", tokens), ("listen", listen_seconds)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be more than 0, got {value}")
    check_apart([out, save_state], inputs_of(run_dir, prompt, load_state))
    for path in (out, save_state):
        if path is not None:
            check_writable(path)
    if save_state is not None:
        check_stream_place(save_state)
    if out is not None and Path(out).suffix.lower() not in (".mid", ".midi"):
        raise UserError(f"{out} must end in .mid, as the music is written as MIDI")
    check_resumed(memory_dtype, load_state)
    model, vocabulary = load_run(run_dir, device, engine=engine, threads=threads)
    check_memory_dtype(memory_dtype or "auto", model)
    outlet = OutputPort(port, virtual)
    try:
        if load_state is not None:
            player = load_player(load_state, model, vocabulary, sampling=sampling, dtype=dtype, streams=1)
        else:
            if listen_seconds is not None:
                say(f"listening for {listen_seconds:g} s, or until 2 s of silence: play something")
                heard = prompt_of(listen(input_port, listen_seconds), vocabulary)
            elif prompt is not None:
                given = read_prompt(prompt, vocabulary, prompt_seconds)
                for line in given.notices(prompt):
                    say(line)
                heard = given.tokens
            else:
                heard = np.array([vocabulary.bos_id])
            precision = resolve_precision(dtype, model, "auto")
            remembering = memory_dtype or "auto"
            player = Player.begin(model, heard, sampling, vocabulary, dtype=precision, memory_dtype=remembering)
        say(f"playing to {shown(outlet.name)}, weights in {player.dtype}")
        done = perform(
            player,
            outlet,
            Limits(seconds, notes),
            max_tokens=tokens,
            stop_at_end=stop_at_end,
            look_ahead=look_ahead,
            recorder=None if out is None else Recorder(out),
        )
        results = Results()
        if out is not None and done.unrecorded is not None:
            results.fail(out, str(done.unrecorded))
        elif out is not None and done.notes:
            results.written.append(Path(out))
        if save_state is not None:
            results.write(save_state, partial(save_player, save_state, player))
        results.check()
        return done
    finally:
        outlet.close()
