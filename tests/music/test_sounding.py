"""What sounds when: events from tokens agree with the decoder, and a growing MIDI file is valid at any moment."""

import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("miditok")

from dsmr.composer.compose import compose
from dsmr.console.errors import UserError
from dsmr.generation.recorder import Recorder, variable_length
from dsmr.music.pianoroll import score_notes
from dsmr.music.sounding import OFF, ON, PEDAL, Event, Sounding
from dsmr.music.tokenizer import build_tokenizer, decode, encode_score, read_midi, vocabulary_of

SCHEMES = ["tsd", "tsd_pedal", "midilike", "remi"]


@pytest.fixture(scope="module")
def score():
    return compose(3, minutes=1.0).to_score()


def piece(scheme: str, score) -> tuple[list[int], object]:
    vocabulary = vocabulary_of(scheme)
    tokens, _ = encode_score(score, build_tokenizer(scheme))
    return [vocabulary.bos_id, *tokens.tolist()], vocabulary


def rounded(notes: np.ndarray) -> list[tuple[float, float, int, int]]:
    return sorted(
        (round(float(n["onset"]), 3), round(float(n["duration"]), 3), int(n["pitch"]), int(n["velocity"]))
        for n in notes
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_growing_file_ends_as_what_the_decoder_says(scheme, score, tmp_path):
    tokens, vocabulary = piece(scheme, score)
    sounding, recorder = Sounding(vocabulary), Recorder(tmp_path / "grown.mid", every=0.0)
    for token in tokens:
        recorder.add(sounding.push(token), sounding.clock.seconds)
    recorder.save(force=True)
    grown, whole = (
        rounded(score_notes(read_midi(tmp_path / "grown.mid"))),
        rounded(score_notes(decode(tokens, vocabulary))),
    )
    assert len(whole) > 50
    assert grown == whole


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_of_many_tracks_holds_the_same_music(scheme, score, tmp_path):
    """Notes that begin in one track and end when others have begun keep their length."""
    tokens, vocabulary = piece(scheme, score)
    sounding, recorder = Sounding(vocabulary), Recorder(tmp_path / "grown.mid", every=0.0, chunk=100)
    for count, token in enumerate(tokens):
        recorder.add(sounding.push(token), sounding.clock.seconds)
        if count % 50 == 49:
            recorder.save()
    recorder.save(force=True)
    content = (tmp_path / "grown.mid").read_bytes()
    assert content.count(b"MTrk") == int.from_bytes(content[10:12], "big") > 5
    assert rounded(score_notes(read_midi(tmp_path / "grown.mid"))) == rounded(score_notes(decode(tokens, vocabulary)))


def test_writing_costs_the_same_after_an_hour_and_memory_does_not_grow(tmp_path, monkeypatch):
    recorder, written, kept = Recorder(tmp_path / "long.mid", every=0.0, chunk=1000), [], []
    patch = recorder._patch
    monkeypatch.setattr(recorder, "_patch", lambda tail, sync: (written.append(len(tail)), patch(tail, sync)))
    for note in range(20_000):
        at = 0.1 * note
        pitch = 21 + note % 88
        recorder.add([Event(at, ON, pitch, 64, 2.0), Event(at + 2.0, OFF, pitch)], at)
        if note % 100 == 99:
            recorder.save()
            kept.append(sum(len(track.events) for track in recorder._open) + len(recorder._ahead))
    recorder.save(force=True)
    assert max(written[100:]) <= 1.2 * max(written[:50])
    assert max(kept[100:]) <= 1.2 * max(kept[:50])
    notes = score_notes(read_midi(tmp_path / "long.mid"))
    assert len(notes) == 20_000
    assert float(notes["duration"].min()) == pytest.approx(2.0, abs=0.002)


def test_a_note_that_never_ends_does_not_hold_up_what_follows(tmp_path):
    recorder = Recorder(tmp_path / "drone.mid", every=0.0, chunk=50)
    recorder.add([Event(0.0, ON, 30, 64)], 0.0)
    for note in range(200):
        recorder.add([Event(1.0 + note, ON, 60, 64), Event(1.5 + note, OFF, 60)], 1.0 + note)
    recorder.save(force=True)
    assert len(recorder._open) <= 2
    assert len(score_notes(read_midi(tmp_path / "drone.mid"))) == 201


KILLED = """
import os, sys, threading, time
from dsmr.generation.recorder import Recorder
from dsmr.music.sounding import OFF, ON, Event
recorder = Recorder(sys.argv[1], every=0.0, chunk=200)
for note in range(10 ** 9):
    recorder.add([Event(0.1 * note, ON, 60, 64), Event(0.1 * note + 0.05, OFF, 60)], 0.1 * note)
    recorder.save()
    if note == 20:
        print("playing", flush=True)
"""


@pytest.mark.slow
def test_a_killed_recorder_leaves_a_file_that_can_be_read(tmp_path):
    for turn in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path / "a.mid")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "playing\n"
        time.sleep(0.01 * turn)
        process.kill()
        process.wait()
        assert len(score_notes(read_midi(tmp_path / "a.mid"))) >= 20
        (tmp_path / "a.mid").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_growing_file_can_be_read_at_any_moment(scheme, score, tmp_path):
    tokens, vocabulary = piece(scheme, score)
    sounding, recorder = Sounding(vocabulary), Recorder(tmp_path / "grown.mid", every=0.0)
    before = 0
    for count, token in enumerate(tokens[:400]):
        recorder.add(sounding.push(token), sounding.clock.seconds)
        recorder.save()
        if count % 40 == 39:
            notes = score_notes(read_midi(tmp_path / "grown.mid"))
            assert before <= len(notes) <= vocabulary.count_notes(tokens[: count + 1])
            before = len(notes)
    assert before > 30
    assert [path.name for path in tmp_path.iterdir()] == ["grown.mid"]


def test_pedals_go_down_and_up(score):
    tokens, vocabulary = piece("tsd_pedal", score)
    sounding = Sounding(vocabulary)
    moves = [event for token in tokens for event in sounding.push(token) if event.kind == PEDAL]
    assert {event.velocity for event in moves} == {0, 127}
    assert [event.velocity > 0 for event in moves[:4]] == [True, False, True, False]


def test_notes_that_no_token_ends_can_be_released():
    vocabulary = vocabulary_of("midilike")
    ids = vocabulary.ids
    sounding = Sounding(vocabulary)
    made = [event for name in ("NoteOn_60", "Velocity_63") for event in sounding.push(ids[name])]
    assert [(event.kind, event.pitch) for event in made] == [(ON, 60)]
    assert sounding.push(ids["NoteOff_72"]) == []  # nothing of that pitch sounds
    assert sounding.release(2.0) == [Event(2.0, OFF, 60)]
    assert sounding.release(3.0) == []


@pytest.mark.parametrize(
    ("value", "written"), [(0, "00"), (127, "7f"), (128, "8100"), (0x3FFF, "ff7f"), (1 << 14, "818000")]
)
def test_delta_times_are_written_as_the_standard_says(value, written):
    assert variable_length(value).hex() == written


def test_a_file_is_not_written_for_every_note(tmp_path):
    recorder = Recorder(tmp_path / "a.mid", every=1000.0)
    recorder.add([Event(0.0, ON, 60, 64), Event(1.0, OFF, 60)], 0.0)
    recorder.save()
    first = (tmp_path / "a.mid").read_bytes()
    recorder.add([Event(2.0, ON, 62, 64), Event(3.0, OFF, 62)], 2.0)
    recorder.save()
    assert (tmp_path / "a.mid").read_bytes() == first
    recorder.save(force=True)
    assert len(score_notes(read_midi(tmp_path / "a.mid"))) == 2


def test_a_file_that_another_program_changed_is_left_alone(tmp_path):
    ways = {
        "taken away": lambda path: path.unlink(),
        "replaced": lambda path: Recorder(path, every=0.0).save(force=True),
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    }
    for number, change in enumerate(ways.values()):
        path = tmp_path / f"{number}.mid"
        recorder = Recorder(path, every=0.0)
        recorder.add([Event(0.0, ON, 60, 64), Event(1.0, OFF, 60)], 0.0)
        recorder.save()
        change(path)
        before = path.read_bytes() if path.exists() else None
        recorder.add([Event(2.0, ON, 60, 64), Event(3.0, OFF, 60)], 2.0)
        with pytest.raises(UserError, match=r"\.mid: no such file|was changed by another program while it was written"):
            recorder.save()
        assert (path.read_bytes() if path.exists() else None) == before


FULL = """
import os, resource, signal, sys
from dsmr.console.errors import UserError
from dsmr.generation.recorder import Recorder
from dsmr.music.sounding import OFF, ON, Event
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
recorder = Recorder(sys.argv[1], every=0.0)
def play(first):
    for note in range(first, first + 60):
        recorder.add([Event(0.1 * note, ON, 60, 64), Event(0.1 * note + 0.05, OFF, 60)], 0.1 * note)
    recorder.save()
play(0)
limit = os.path.getsize(sys.argv[1]) + 40
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    play(60)
except UserError as error:
    print(error)
"""


def test_a_full_disk_leaves_what_was_written(tmp_path):
    path = tmp_path / "a.mid"
    ended = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert ended.stdout.startswith(f"cannot write {path}: "), ended.stderr
    assert len(score_notes(read_midi(path))) == 60
