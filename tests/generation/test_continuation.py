"""Playing on with the real model: the same as one whole pass, in bounded memory, from MIDI file to MIDI file."""

import math
import os
import shutil
import signal

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.generation.continuation import continue_piece, continue_variations
from dsmr.generation.player import Sampling, stream
from dsmr.generation.stepping import Step
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

TWO_SCALE = "two_scale(layers=3, long=40, short=9, n_long=1)"


@pytest.fixture(scope="module")
def tsd():
    pytest.importorskip("miditok")
    from dsmr.music.tokenizer import vocabulary_of

    return vocabulary_of("tsd")


def small_model(size: int) -> DSMRModel:
    torch.manual_seed(0)
    config = DSMRConfig(size, TWO_SCALE, d_model=16, n_heads=2, segment_length=12)
    return DSMRModel(config).eval()


def test_playing_on_follows_the_whole_piece_pass():
    """Greedy tokens, long after every ring has wrapped, are those that one call over the same tokens likes best."""
    model = small_model(23)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    prompt = torch.arange(31) % 23
    made = list(model.generate(prompt, sampling=Sampling(temperature=0), max_tokens=150))
    whole = torch.cat([prompt, torch.tensor(made)])[None]
    with torch.no_grad():
        logits = model(whole).logits[0]
    likes = logits[len(prompt) - 1 : -1]
    chosen = likes.gather(-1, torch.tensor(made)[:, None])[:, 0]
    torch.testing.assert_close(chosen, likes.amax(-1), atol=1e-4, rtol=1e-4)


def test_memory_stays_at_the_budget_however_long_it_plays():
    model = small_model(23)
    state = model.new_state(1)
    held = state.nbytes
    storage = [memory.k.data_ptr() for memory in state.memories]
    for _ in stream(model, [1], Sampling(seed=0), max_tokens=400, state=state):
        pass
    assert state.nbytes == held
    assert [memory.k.data_ptr() for memory in state.memories] == storage
    # A state for calls of any size has room for the segment in progress beside each horizon.
    assert held == 2 * 4 * 16 * sum(horizon + 12 for horizon in model.config.schedule.horizons)


def test_a_stream_goes_on_from_a_state():
    model = small_model(23)
    sampling = Sampling(temperature=0)
    at_once = list(stream(model, [1, 2, 3], sampling, max_tokens=40))
    state = model.new_state(1)
    first = list(stream(model, [1, 2, 3], sampling, max_tokens=25, state=state))
    assert first + list(stream(model, first[-1:], sampling, max_tokens=15, state=state)) == at_once


@pytest.fixture(scope="module")
def run_directory(tsd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small_model(tsd.size).save_pretrained(folder)
    tsd.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def piece(tmp_path_factory):
    """A minute of music as a MIDI file."""
    pytest.importorskip("symusic")
    from dsmr.composer.compose import compose

    path = tmp_path_factory.mktemp("piece") / "piece.mid"
    compose(3, minutes=1.0).write_midi(path)
    return path


def notes_of(path) -> list[tuple[float, int]]:
    from dsmr.music.pianoroll import score_notes
    from dsmr.music.tokenizer import read_midi

    return [(round(float(note["onset"]), 2), int(note["pitch"])) for note in score_notes(read_midi(path))]


def test_a_piece_is_continued_into_three_files(run_directory, piece, tmp_path):
    seen = []
    done = continue_piece(
        run_directory,
        piece,
        tmp_path / "on.mid",
        prompt_seconds=8,
        notes=20,
        sampling=Sampling(seed=1),
        on_progress=seen.append,
    )
    assert (done.whole, done.continuation, done.picture) == (
        tmp_path / "on.mid",
        tmp_path / "on-continuation.mid",
        tmp_path / "on.png",
    )
    assert done.picture.stat().st_size > 1000
    whole, alone = notes_of(done.whole), notes_of(done.continuation)
    given = [note for note in notes_of(piece) if note[0] < 7.9]
    assert done.prompt_seconds == 8  # its last note before that begins earlier: a rest is written up to there
    assert set(given) <= set(whole)
    assert len(alone) == done.played.notes == 20
    assert len(whole) == done.prompt_notes + 20
    shift = done.prompt_seconds
    assert all(any(abs(onset + shift - o) < 0.02 and pitch == p for o, p in whole) for onset, pitch in alone)
    assert seen[-1] == done.played
    assert done.state_bytes > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_seed_repeats_the_piece(run_directory, piece, tmp_path):
    for name in ("a", "b"):
        continue_piece(
            run_directory, piece, tmp_path / f"{name}.mid", prompt_seconds=3, tokens=60, sampling=Sampling(seed=4)
        )
    assert notes_of(tmp_path / "a.mid") == notes_of(tmp_path / "b.mid")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt_seconds": 500}, r"piece\.mid is \d+\.\d s long, shorter than the prompt of 500 s asked for"),
        ({"prompt_seconds": 0}, "prompt seconds must be more than 0"),
        ({"prompt_seconds": 0.001}, "has no note"),
        ({"seconds": -1}, "seconds must be more than 0"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_a_prompt_that_cannot_be_is_a_sentence_and_nothing_is_written(
    arguments, sentence, run_directory, piece, tmp_path
):
    from dsmr.composer.compose import compose

    if "no note" in sentence:  # a piece that begins with a rest
        composition = compose(3, minutes=1.0)
        composition.notes["onset"] += 1.0
        piece = tmp_path.parent / "late.mid"
        composition.write_midi(piece)
    with pytest.raises(UserError, match=sentence):
        continue_piece(run_directory, piece, tmp_path / "on.mid", **{"tokens": 5, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_is_never_overwritten(run_directory, piece, tmp_path):
    for prompt, out in (("on.mid", "on.mid"), ("on-continuation.mid", "on.mid")):
        shutil.copy(piece, tmp_path / prompt)
        with pytest.raises(UserError, match=rf"{prompt} is the prompt itself"):
            continue_piece(run_directory, tmp_path / prompt, tmp_path / out, tokens=5)
        assert (tmp_path / prompt).read_bytes() == piece.read_bytes()
        (tmp_path / prompt).unlink()
    assert list(tmp_path.iterdir()) == []


def test_notes_that_the_model_cannot_be_told_are_counted_and_a_silent_prompt_is_named(run_directory, tmp_path):
    from small_scores import score_of

    from dsmr.music.tokenizer import write_midi

    write_midi(tmp_path / "deep.mid", score_of([(0.0, 1.0, 60), (1.0, 1.0, 5), (2.0, 1.0, 64)]))
    done = continue_piece(run_directory, tmp_path / "deep.mid", tmp_path / "on.mid", tokens=5)
    assert done.prompt.report.dropped == {"pitch outside 21 to 108": 1}
    write_midi(tmp_path / "silent.mid", score_of([]))
    with pytest.raises(UserError, match=r"silent\.mid has no notes"):
        continue_piece(run_directory, tmp_path / "silent.mid", tmp_path / "new" / "on.mid", tokens=5)
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_tokeniser_is_refused(run_directory, piece, tmp_path):
    from dsmr.music.tokenizer import vocabulary_of

    shutil.copytree(run_directory, tmp_path / "run")
    vocabulary_of("remi").save(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(UserError, match="belong to different runs"):
        continue_piece(tmp_path / "run", piece, tmp_path / "on.mid", tokens=5)
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        continue_piece(tmp_path / "run", piece, tmp_path / "on.mid", tokens=5)


@pytest.mark.parametrize("trouble", ["not finite", "ctrl-c"])
def test_what_was_played_before_trouble_is_written(trouble, run_directory, piece, tmp_path, monkeypatch):
    honest, calls = Step.__call__, []

    def step(self, tokens):
        calls.append(tokens)
        if len(calls) < 60:
            return honest(self, tokens)
        if trouble == "ctrl-c":
            raise KeyboardInterrupt
        return honest(self, tokens) * math.nan

    monkeypatch.setattr(Step, "__call__", step)
    arguments = {"prompt_seconds": 3.0, "tokens": 500, "sampling": Sampling(seed=4)}
    if trouble == "ctrl-c":
        assert continue_piece(run_directory, piece, tmp_path / "on.mid", **arguments).interrupted
    else:
        with pytest.raises(UserError, match=r"not finite.*played until then are in .*on\.mid"):
            continue_piece(run_directory, piece, tmp_path / "on.mid", **arguments)
    assert len(notes_of(tmp_path / "on-continuation.mid")) > 5


# --- streams: files that grow, several at once, kept for another day ------------------------------------------------


@pytest.mark.slow
def test_a_file_grows_while_it_is_played_and_ends_as_the_whole(run_directory, piece, tmp_path):
    from dsmr.music.sounding import ON

    out, sizes, heard = tmp_path / "on.mid", [], []

    def watch(played):
        sizes.append(len(notes_of(out)) if out.exists() and played.tokens % 20 == 0 else 0)

    done = continue_piece(
        run_directory,
        piece,
        out,
        prompt_seconds=3,
        notes=40,
        sampling=Sampling(seed=1),
        growing=True,
        on_progress=watch,
        on_event=lambda row, event: heard.append(event),
    )
    assert max(sizes) >= done.prompt_notes
    assert sum(event.kind == ON for event in heard) == 40
    assert len(notes_of(out)) == done.prompt_notes + 40


@pytest.mark.slow
def test_several_variations_are_those_of_their_seeds(run_directory, piece, tmp_path):
    arguments = {"prompt_seconds": 3.0, "tokens": 60}
    done = continue_variations(
        run_directory, piece, tmp_path / "on.mid", variations=3, sampling=Sampling(seed=4), **arguments
    )
    assert [one.whole.name for one in done] == ["on-1.mid", "on-2.mid", "on-3.mid"]
    assert len(list(tmp_path.iterdir())) == 9
    for row, one in enumerate(done):
        alone = continue_piece(
            run_directory, piece, tmp_path / "alone.mid", sampling=Sampling(seed=4 + row), **arguments
        )
        assert notes_of(one.whole) == notes_of(alone.whole)


@pytest.mark.slow
@pytest.mark.parametrize("memory_dtype", ["float32", "int8"])
def test_a_stream_kept_plays_on_as_if_never_stopped(memory_dtype, run_directory, piece, tmp_path):
    arguments = {"sampling": Sampling(seed=4), "dtype": "int8", "memory_dtype": memory_dtype}
    whole = continue_piece(run_directory, piece, tmp_path / "whole.mid", prompt_seconds=3, tokens=120, **arguments)
    kept = tmp_path / "kept.stream"
    continue_piece(
        run_directory, piece, tmp_path / "first.mid", prompt_seconds=3, tokens=70, save_state=kept, **arguments
    )
    then = continue_piece(run_directory, None, tmp_path / "then.mid", tokens=50, load_state=kept)
    assert notes_of(then.whole) == notes_of(whole.whole)
    assert (then.played.tokens, then.precision) == (50, "int8")
    assert then.state_bytes == whole.state_bytes
    with pytest.raises(UserError, match="--memory-dtype cannot be given with --load-state"):
        continue_piece(run_directory, None, tmp_path / "x.mid", tokens=5, load_state=kept, memory_dtype=memory_dtype)
    with pytest.raises(UserError, match="holds 1 streams, but 2 were asked for"):
        continue_variations(run_directory, None, tmp_path / "x.mid", tokens=5, load_state=kept, variations=2)
    with pytest.raises(UserError, match=r"either a MIDI file .* or a saved stream"):
        continue_piece(run_directory, piece, tmp_path / "x.mid", tokens=5, load_state=kept)
    with pytest.raises(UserError, match="give their length in tokens alone"):
        continue_variations(run_directory, piece, tmp_path / "x.mid", seconds=5, save_state=kept, variations=2)


@pytest.mark.slow
def test_a_memory_of_lower_precision_takes_less(run_directory, piece, tmp_path):
    done = {
        name: continue_piece(run_directory, piece, tmp_path / f"{name}.mid", tokens=40, memory_dtype=name)
        for name in ("float32", "bfloat16", "int8")
    }
    sizes = {name: one.state_bytes for name, one in done.items()}
    assert sizes["bfloat16"] * 2 == sizes["float32"]
    assert sizes["int8"] < 0.4 * sizes["float32"]  # heads of 16, whose scale weighs more than beside 64
    with pytest.raises(UserError, match="unknown memory dtype 'int4'"):
        continue_piece(run_directory, piece, tmp_path / "x.mid", tokens=5, memory_dtype="int4")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_playing_and_keeps_it(number, run_directory, piece, tmp_path):
    def interrupt(played):
        if played.tokens == 40:
            os.kill(os.getpid(), number)

    kept = tmp_path / "kept.stream"
    done = continue_piece(
        run_directory,
        piece,
        tmp_path / "on.mid",
        prompt_seconds=3,
        tokens=500,
        sampling=Sampling(seed=4),
        on_progress=interrupt,
        save_state=kept,
    )
    assert done.interrupted
    assert done.played.tokens == 40
    assert len(notes_of(done.continuation)) > 3
    assert continue_piece(run_directory, None, tmp_path / "then.mid", tokens=5, load_state=kept).played.tokens == 5


@pytest.mark.slow
def test_memory_does_not_grow_with_the_music():
    """5,000 tokens; `python -m benchmarks.decode --long 200000` plays more, with a model of full size."""
    from benchmarks.decode import resident_bytes

    model = DSMRModel(DSMRConfig(23, "uniform(layers=1, horizon=8)", d_model=16, n_heads=2, segment_length=12))
    playing = stream(model, [1], Sampling(seed=0))
    for _ in range(1000):
        next(playing)
    before = resident_bytes()
    for _ in range(4000):
        next(playing)
    assert resident_bytes() < 1.01 * before


def test_nothing_that_is_read_is_written_over(run_directory, piece, tmp_path):
    """Nor is one result by another, whatever their names; said before anything is played."""
    from dsmr.live.performance import play_live

    whole, again = piece.read_bytes(), tmp_path / "again.mid"
    again.symlink_to(piece)
    for options, said in (
        ({"out": tmp_path / "a.mid", "save_state": again}, "again.mid is the prompt itself"),
        ({"out": tmp_path / "a.mid", "save_state": tmp_path / "a.png"}, "is named for two results"),
        ({"out": tmp_path / "a.mid", "save_state": run_directory / "model.safetensors"}, "the run's model.safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            continue_variations(run_directory, piece, tokens=5, **options)
    for options, said in (
        ({"out": piece}, "is the prompt itself"),
        ({"save_state": again}, "again.mid is the prompt itself"),
        ({"out": tmp_path / "b.mid", "save_state": tmp_path / "b.mid"}, "is named for two results"),
    ):
        with pytest.raises(UserError, match=said):
            play_live(run_directory, prompt=piece, tokens=5, **options)
    assert piece.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.mid"]


# --- results that cannot be written take no other with them ---------------------------------------------------------


@pytest.mark.parametrize("lost", ["kept.stream", "on.mid", "on-continuation.mid", "on.png"])
def test_a_result_that_cannot_be_written_takes_no_other_with_it(lost, run_directory, piece, tmp_path):
    """The place of one is taken while the music is played: as late as a disk fills up."""
    folder, kept = tmp_path / "there", tmp_path / "there" / "kept.stream"
    names = ["on.mid", "on-continuation.mid", "kept.stream", "on.png"]

    def take_its_place(played):
        if played.tokens == 30:
            (folder / lost / "in the way").mkdir(parents=True)

    options = {"prompt_seconds": 3.0, "tokens": 40, "sampling": Sampling(seed=4), "save_state": kept}
    with pytest.raises(UserError) as said:
        continue_piece(run_directory, piece, folder / "on.mid", on_progress=take_its_place, **options)
    text = str(said.value)
    assert text.startswith(f"cannot write {folder / lost}: ")
    assert f"; not written: {folder / lost}; written: " in text
    for name in names:
        assert (folder / name).is_file() == (name != lost)
        assert (str(folder / name) in text.partition("; written: ")[2]) == (name != lost)


def test_trouble_says_that_the_stream_is_not_kept_and_unknown_trouble_keeps_the_music(
    run_directory, piece, tmp_path, monkeypatch
):
    honest, calls = Step.__call__, []

    def step(self, tokens):
        calls.append(tokens)
        if len(calls) > 60:
            raise failure
        return honest(self, tokens)

    monkeypatch.setattr(Step, "__call__", step)
    options = {"prompt_seconds": 3.0, "tokens": 500, "sampling": Sampling(seed=4), "save_state": tmp_path / "kept"}
    for failure in (UserError("broken weights"), ZeroDivisionError("of nobody's making"), MemoryError()):
        calls.clear()
        out = tmp_path / type(failure).__name__ / "on.mid"
        with pytest.raises(type(failure)) as said:
            continue_piece(run_directory, piece, out, **options)
        words = str(said.value) + " ".join(getattr(said.value, "__notes__", []))
        assert "kept is not written, because the playing broke off" in words
        assert len(notes_of(out)) > 5
        assert not (tmp_path / "kept").exists()


def test_a_growing_file_outlives_a_disk_that_is_full_for_a_while(run_directory, piece, tmp_path, monkeypatch):
    from dsmr.generation.recorder import Recorder

    def full(self, force=False):
        raise UserError("no space left on device")

    monkeypatch.setattr(Recorder, "save", full)
    options = {"prompt_seconds": 3.0, "tokens": 40, "sampling": Sampling(seed=4), "growing": True}
    assert continue_piece(run_directory, piece, tmp_path / "on.mid", **options).played.tokens == 40
    assert len(notes_of(tmp_path / "on.mid")) > 5


def test_a_picture_that_fails_in_a_way_nobody_foresaw_takes_nothing_with_it(
    run_directory, piece, tmp_path, monkeypatch
):
    """Matplotlib raises what it likes; the music and the stream are there, and so is the report."""
    from dsmr.generation.continuation import Unwritten
    from dsmr.generation.pieces import Pieces

    def fail(self, out):
        raise UnicodeEncodeError("utf-8", "bad", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(Pieces, "draw", fail)
    options = {"prompt_seconds": 3.0, "tokens": 40, "sampling": Sampling(seed=4), "save_state": tmp_path / "kept"}
    with pytest.raises(Unwritten, match=r"on\.png: UnicodeEncodeError: .*; not written: .*on\.png; written: ") as said:
        continue_piece(run_directory, piece, tmp_path / "on.mid", **options)
    assert isinstance(said.value.__cause__, UnicodeEncodeError)
    assert said.value.missing == {tmp_path / "on.png"}
    (done,) = said.value.done
    assert len(notes_of(done.continuation)) == done.played.notes > 3
    assert (tmp_path / "kept").is_file()


def test_more_threads_than_a_machine_serves_are_refused(run_directory, piece, tmp_path):
    """20,000 ended the process in libgomp, 100,000 by a signal."""
    for threads in (0, 20_000, 100_000):
        with pytest.raises(UserError, match=r"threads must be 1 to \d+ on this machine, got "):
            continue_piece(run_directory, piece, tmp_path / "on.mid", tokens=5, threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_is_kept_over_a_stream_and_over_nothing_else(run_directory, piece, tmp_path):
    """`--save-state song.mid` replaced a song."""
    from dsmr.live.performance import play_live

    song, kept, empty = tmp_path / "song.mid", tmp_path / "kept", tmp_path / "empty"
    shutil.copy(piece, song)
    options = {"prompt_seconds": 3.0, "tokens": 10, "sampling": Sampling(seed=4)}
    with pytest.raises(UserError, match=r"song\.mid is there already and is not a saved stream"):
        continue_piece(run_directory, piece, tmp_path / "on.mid", save_state=song, **options)
    with pytest.raises(UserError, match=r"song\.mid is there already and is not a saved stream"):
        play_live(run_directory, prompt=piece, tokens=5, save_state=song)
    shutil.copy(run_directory / "model.safetensors", tmp_path / "weights")
    with pytest.raises(UserError, match=r"weights is there already and is not a saved stream"):
        continue_piece(run_directory, piece, tmp_path / "on.mid", save_state=tmp_path / "weights", **options)
    assert song.read_bytes() == piece.read_bytes()
    assert not (tmp_path / "on.mid").exists()
    empty.touch()
    for path in (empty, kept, kept):
        continue_piece(run_directory, piece, tmp_path / "on.mid", save_state=path, **options)
        assert path.stat().st_size > 1000
