"""Continue a piece with a trained model: the start of a MIDI file in; the whole, the continuation and a picture out.

Whatever ends the playing early (numbers that are not finite, Ctrl-C), what has been played until then is written: the
music first, then the saved stream, then the pictures, each of them whether or not the others could be.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dsmr.console.errors import UserError
from dsmr.console.files import check_apart, check_writable
from dsmr.console.results import Results
from dsmr.console.stopping import Interruption, graceful_stop, signal_of
from dsmr.exported.about import FILES
from dsmr.generation.engines import RUN_FILES, check_memory_dtype, load_run, resolve_precision
from dsmr.generation.heard import Heard
from dsmr.generation.pieces import Pieces, output_paths
from dsmr.generation.player import Limits, Player, Sampling
from dsmr.generation.prompts import FilePrompt, read_prompt, whole_notes
from dsmr.generation.recorder import Recorder
from dsmr.generation.saved_stream import check_stream_place, load_player, save_player
from dsmr.music.sounding import ON, Event, Sounding
from dsmr.music.vocabulary import Vocabulary

DEFAULT_SECONDS = 60.0


@dataclass(frozen=True)
class Played:
    """How far the playing has come: music made, and the seconds that it took."""

    tokens: int = 0
    notes: int = 0  # that are complete
    seconds: float = 0.0
    elapsed: float = 0.0
    behind: float = 0.0  # the most that computing has lain behind the music, had both begun with the first token

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def times_real_time(self) -> float:
        """Seconds of music for every second of computing: above 1, the model keeps up with its own playing."""
        return self.seconds / self.elapsed if self.elapsed > 0 else 0.0


@dataclass(frozen=True)
class Continuation:
    """What `continue_piece` wrote, and how it went."""

    whole: Path
    continuation: Path
    picture: Path
    prompt_seconds: float
    prompt_notes: int
    prompt: FilePrompt | None  # None = played on from a saved stream
    played: Played
    state_bytes: int
    precision: str  # of the weights
    signal: int | None = None  # the number of the one that ended it before the asked length: Ctrl-C, SIGTERM, SIGHUP

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended it before the asked length."""
        return self.signal is not None


class Unwritten(UserError):
    """Some of the results are not there; `done` tells of the others, and `missing` are those."""

    def __init__(self, results: Results, done: list[Continuation]) -> None:
        super().__init__(results.sentence)
        self.done, self.missing = done, {path for path, _ in results.missing}


class Take:
    """One variation while it is played: how far it came, and the file that grows with it."""

    def __init__(self, prompt: np.ndarray, vocabulary: Vocabulary, recorder: Recorder | None) -> None:
        self.prompt, self.vocabulary, self.recorder = prompt, vocabulary, recorder
        self.played = Played()
        self._sounding = Sounding(vocabulary)
        for token in prompt.tolist():
            self._record(self._sounding.push(token))
        self._began, self._started = self._sounding.clock.seconds, time.perf_counter()

    def _record(self, events: list[Event]) -> list[Event]:
        if self.recorder is not None:
            self.recorder.add(events, self._sounding.clock.seconds)
        return events

    def push(self, token: int) -> list[Event]:
        """Take the next token; the events that it settles."""
        events = self._record(self._sounding.push(token))
        seconds, elapsed = self._sounding.clock.seconds - self._began, time.perf_counter() - self._started
        if not self.played.tokens:  # reading the prompt is no part of keeping up
            self._latency = elapsed
        behind = max(self.played.behind, elapsed - self._latency - seconds)
        notes = self.played.notes + sum(event.kind == ON for event in events)
        self.played = Played(self.played.tokens + 1, notes, seconds, elapsed, behind)
        if self.recorder is not None and self.played.notes:
            with contextlib.suppress(UserError):  # a disk that is full now; it tries again, and the whole comes last
                self.recorder.save()
        return events

    def score(self, heard: Heard) -> Pieces:
        """What is to be written of the stream's tokens, without a note that is unfinished."""
        made = np.array(heard, dtype=np.int64)[len(self.prompt) :][: self.played.tokens]
        return Pieces(self.prompt, whole_notes(made, self.vocabulary), self.vocabulary)


def continue_piece(
    run_dir: str | os.PathLike[str],
    prompt_midi: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    **options: Any,
) -> Continuation:
    """`continue_variations` with one variation, written to `out` itself."""
    return continue_variations(run_dir, prompt_midi, out, **options)[0]


def continue_variations(
    run_dir: str | os.PathLike[str],
    prompt_midi: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    prompt_seconds: float | None = None,
    seconds: float | None = None,
    notes: int | None = None,
    tokens: int | None = None,
    sampling: Sampling | None = None,
    stop_at_end: bool = False,
    device: str = "auto",
    variations: int = 1,
    dtype: str | None = None,
    memory_dtype: str | None = None,
    growing: bool = False,
    save_state: str | os.PathLike[str] | None = None,
    load_state: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    threads: int | None = None,
    on_progress: Callable[[Played], None] | None = None,
    on_event: Callable[[int, Event], None] | None = None,
) -> list[Continuation]:
    """Continue the first `prompt_seconds` of a MIDI file (all of it by default) with the model of a run directory, or
    with one that was exported.

    Writes `out` (prompt and continuation), `<out's stem>-continuation.mid` (the continuation alone, from its own
    second 0) and `<out's stem>.png` (piano roll); several `variations` get a number each, `<out's stem>-1.mid` and so
    on. The continuation is `seconds` or `notes` or `tokens` long, whichever comes first; 60 seconds where none is said.

    Args:
        sampling, dtype: None = the defaults, or with `load_state` those of the saved stream.
        memory_dtype: as in `Player.begin`; a saved stream keeps its own.
        growing: write `out` while it is played, valid at any moment.
        save_state: file to keep the stream in, to be played on later.
        load_state: such a file, in place of a prompt.
        engine, threads: as in `load_run`.
        on_progress: told after every token how far the first variation is.
        on_event: told of every event (variation from 0, event) as it is made.

    Raises `UserError` if the run, the prompt or the state cannot be used, or if the prompt is shorter than asked for.
    What has been played until then is written, whatever ends the playing; where one of the files cannot be, the others
    are, and the `UserError` says which (an `Unwritten`, if nothing else went wrong).
    """
    out = Path(out)
    if seconds is None and notes is None and tokens is None:
        seconds = DEFAULT_SECONDS
    for name, value in (("prompt seconds", prompt_seconds), ("seconds", seconds), ("notes", notes), ("tokens", tokens)):
        if value is not None and not value > 0:
            raise UserError(f"{name} must be more than 0, got {value}")
    if (prompt_midi is None) == (load_state is None):
        raise UserError("name either a MIDI file to continue (--prompt) or a saved stream to play on (--load-state)")
    check_resumed(memory_dtype, load_state)
    if save_state is not None and variations > 1 and (seconds is not None or notes is not None or stop_at_end):
        raise UserError("several variations are saved in step: give their length in tokens alone")
    outs = [out] if variations == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(variations)]
    written = [path for one in outs for path in output_paths(one)]
    check_apart([*written, save_state], inputs_of(run_dir, prompt_midi, load_state))
    for one in outs:
        _check_output(one)
    if save_state is not None:
        check_stream_place(save_state)
        check_writable(save_state)
    model, vocabulary = load_run(run_dir, device, engine=engine, threads=threads)
    check_memory_dtype(memory_dtype or "auto", model)
    prompt: FilePrompt | None = None
    if load_state is not None:
        player = load_player(load_state, model, vocabulary, sampling=sampling, dtype=dtype, streams=variations)
    else:
        assert prompt_midi is not None
        prompt = read_prompt(prompt_midi, vocabulary, prompt_seconds)
        dtype = resolve_precision(dtype, model)
        player = Player.begin(
            model,
            prompt.tokens,
            sampling,
            vocabulary,
            variations=variations,
            dtype=dtype,
            memory_dtype=memory_dtype or "auto",
        )
    prompts = [np.array(heard, dtype=np.int64) for heard in player.tokens]
    takes = [
        Take(prompt, vocabulary, Recorder(one) if growing else None) for prompt, one in zip(prompts, outs, strict=True)
    ]
    trouble = play(player, takes, Limits(seconds, notes), tokens, stop_at_end, on_progress, on_event)
    if trouble is not None and not any(take.played.notes for take in takes):
        raise trouble
    scores = [take.score(heard) for take, heard in zip(takes, player.tokens, strict=True)]
    results = Results()
    for one, score in zip(outs, scores, strict=True):
        score.write_music(one, results)
    if save_state is not None:
        _save_stream(save_state, player, trouble, results)
    for one, score in zip(outs, scores, strict=True):
        results.write(output_paths(one)[2], partial(score.draw, one))
    if trouble is not None and not isinstance(trouble, KeyboardInterrupt):
        _fail(trouble, f"the {takes[0].played.seconds:.1f} s played until then are in {outs[0]}", results)
    done = [
        Continuation(
            *output_paths(one),
            prompt_seconds=score.join,
            prompt_notes=score.prompt_notes,
            prompt=prompt,
            played=take.played,
            state_bytes=player.state.nbytes,
            precision=player.dtype,
            signal=signal_of(trouble) if isinstance(trouble, KeyboardInterrupt) else None,
        )
        for one, take, score in zip(outs, takes, scores, strict=True)
    ]
    if results.missing:
        raise Unwritten(results, done) from results.cause
    return done


def _save_stream(path: str | os.PathLike[str], player: Player, trouble: BaseException | None, results: Results) -> None:
    """Keep the stream, unless the playing broke off within a step, which leaves nothing to go on from."""
    if trouble is None or isinstance(trouble, Interruption):
        results.write(path, partial(save_player, path, player))
    else:
        results.fail(path, f"{path} is not written, because the playing broke off within a step")


def _fail(trouble: BaseException, played: str, results: Results) -> NoReturn:
    """Raise what ended the playing, with what has become of the music."""
    said = results.sentence or played
    if isinstance(trouble, UserError):
        raise UserError(f"{trouble}; {said}") from trouble
    trouble.add_note(said)
    raise trouble


def check_resumed(memory_dtype: str | None, load_state: str | os.PathLike[str] | None) -> None:
    """`UserError` for a memory dtype that is asked of a stream which has one already."""
    if memory_dtype is not None and load_state is not None:
        raise UserError("--memory-dtype cannot be given with --load-state: the saved stream keeps its own")


def play(
    player: Player,
    takes: list[Take],
    limits: Limits,
    max_tokens: int | None,
    stop_at_end: bool,
    on_progress: Callable[[Played], None] | None = None,
    on_event: Callable[[int, Event], None] | None = None,
) -> BaseException | None:
    """Play until the streams end or there is trouble, which is returned: signals (`Interruption` between two tokens)
    and whatever was raised."""
    try:
        with graceful_stop() as stop:
            for tokens in player.play(max_tokens, limits, stop_at_end):
                for row, (take, token) in enumerate(zip(takes, tokens, strict=True)):
                    for event in [] if token is None else take.push(token):
                        if on_event is not None:
                            on_event(row, event)
                if on_progress is not None:
                    on_progress(takes[0].played)
                if stop.signal is not None:
                    return Interruption(stop.signal)
    except (Exception, KeyboardInterrupt) as error:
        return error
    return None


def inputs_of(
    run_dir: str | os.PathLike[str], prompt: str | os.PathLike[str] | None, load_state: str | os.PathLike[str] | None
) -> dict[str, str | os.PathLike[str] | None]:
    """What playing on reads, which none of its results may overwrite (see `dsmr.console.files.check_apart`)."""
    names = dict.fromkeys((*RUN_FILES, "last.pt", "train.json", "metrics.jsonl", *FILES))
    run = {f"the run's {name}": Path(run_dir) / name for name in names}
    return {"the prompt": prompt, "the saved stream": load_state, **run}


def _check_output(out: Path) -> None:
    """Fail before the work rather than after it: `out` can be written."""
    if out.is_dir():
        raise UserError(f"cannot write {out}: it is a folder, not a file name")
    if out.suffix.lower() not in (".mid", ".midi"):
        raise UserError(f"{out} must end in .mid, as the music is written as MIDI")
    for path in output_paths(out):
        check_writable(path)
