"""Every note-on of a file is in the tokens, or counted as left out with its reason, or the file is refused with one.

The files are written byte by byte: what real programs and damage make, and what readers lose in silence.
"""

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damaging import damaged
from raw_midi import melody, midi, off, on, tempo, track
from small_scores import random_score

from dsmr.console.errors import UserError
from dsmr.music.midi_file import count_begun
from dsmr.music.tokenizer import (
    SCHEMES,
    EmptyScoreError,
    ScoreReport,
    build_tokenizer,
    decode,
    encode_midi,
    encode_score,
    read_midi,
    vocabulary_of,
)


def notes_of(path: Path, data: bytes) -> list[tuple[float, float, int]]:
    """(seconds, seconds long, pitch) of the notes that are read of a file."""
    path.write_bytes(data)
    (piano,) = read_midi(path).tracks
    return sorted((note.time / 10_000, note.duration / 10_000, note.pitch) for note in piano.notes)


def report_of(path: Path, data: bytes, name: str = "tsd") -> ScoreReport:
    path.write_bytes(data)
    tokens, report = encode_score(path, build_tokenizer(name))
    assert len(decode(tokens, vocabulary_of(name)).tracks[0].notes) == report.n_notes
    return report


@pytest.mark.parametrize("name", list(SCHEMES))
def test_notes_that_never_end_are_kept(tmp_path: Path, name: str) -> None:
    """16 begun: symusic keeps 13 of them and says nothing."""
    events = [*melody(*range(60, 72)), (480, on(40)), (0, on(43)), (480, on(40)), (480, on(50)), (960, off(50))]
    report = report_of(tmp_path / "a.mid", midi(track(*events)), name)
    assert (report.n_begun, report.n_notes, report.dropped) == (16, 16, {})
    assert report.changed == {"without an end (ended by the next of their pitch, or with the piece)": 3}


def test_a_note_without_an_end_lasts_to_the_next_of_its_pitch_or_to_the_end(tmp_path: Path) -> None:
    three = midi(track((0, on(60)), (960, on(60)), (960, on(60)), (960, off(60))))
    assert notes_of(tmp_path / "a.mid", three) == [(0, 1, 60), (1, 1, 60), (2, 1, 60)]
    to_the_end = midi(track((0, on(60)), *melody(62, 64), (960, b"\xff\x01\0")))
    assert notes_of(tmp_path / "a.mid", to_the_end) == [(0, 0.5, 62), (0, 2, 60), (0.5, 0.5, 64)]
    # What follows in order is not carried away by one lost end.
    lost = midi(track((0, on(60)), (960, on(60)), (480, off(60)), (480, on(60)), (480, off(60))))
    assert notes_of(tmp_path / "a.mid", lost) == [(0, 1, 60), (1, 0.5, 60), (2, 0.5, 60)]
    silenced = midi(track((0, on(60)), (960, bytes([0xB0, 123, 0])), *melody(62)))
    assert notes_of(tmp_path / "a.mid", silenced) == [(0, 1, 60), (1, 0.5, 62)]


def test_overlapping_notes_of_a_pitch_still_end_in_the_order_in_which_they_began(tmp_path: Path) -> None:
    both = [(0, on(60)), (480, on(60)), (480, off(60)), (480, off(60))]
    assert notes_of(tmp_path / "a.mid", midi(track(*both))) == [(0, 1, 60), (0.5, 1, 60)]
    # The same beside a note that never ends, which takes the other way through the reader.
    beside = midi(track(*both, (0, on(30))))
    assert notes_of(tmp_path / "a.mid", beside)[:2] == [(0, 1, 60), (0.5, 1, 60)]


def test_running_status_goes_on_behind_system_exclusive_messages(tmp_path: Path) -> None:
    for between in (b"\xf0\x03\x01\x02\xf7", b"\xf7\x02\x01\x02", b"\xff\x01\x02hi"):
        data = midi(track((0, on(60)), (480, between), (0, bytes([62, 64])), (480, off(60)), (0, off(62))))
        assert notes_of(tmp_path / "a.mid", data) == [(0, 1, 60), (0.5, 0.5, 62)]


def test_system_messages_that_have_no_business_in_a_file_are_passed_over_whole(tmp_path: Path) -> None:
    """A quarter frame, a song position, a song select, a tune request: of one, two, one and no bytes (MIDI 1.0)."""
    for between in (b"\xf1\x05", b"\xf2\x3c\x40", b"\xf3\x3c", b"\xf6"):
        data = midi(track((0, on(60)), (480, between), (0, on(62)), (480, off(60)), (0, off(62))))
        assert notes_of(tmp_path / "a.mid", data) == [(0, 1, 60), (0.5, 0.5, 62)]


def test_all_tracks_are_read_whatever_the_header_counts(tmp_path: Path) -> None:
    tracks = [track((0, tempo(1_000_000))), track(*melody(60)), track(*melody(64)), track(*melody(67))]
    for kind, count in ((1, 2), (1, 1), (0, 1), (1, 0)):
        data = midi(*tracks, kind=kind, count=count)
        assert notes_of(tmp_path / "a.mid", data) == [(0, 1, 60), (0, 1, 64), (0, 1, 67)]
    alien = tracks[1] + b"XFIH\0\0\0\3abc" + tracks[2]
    assert len(notes_of(tmp_path / "a.mid", midi(alien, count=1))) == 2
    assert len(notes_of(tmp_path / "a.mid", midi(*tracks) + b"\0\0\0")) == 3  # what some programs leave at the end


def test_frames_a_second_are_time_that_no_tempo_changes(tmp_path: Path) -> None:
    """A header of SMPTE frames: the standard says that a tick is so many parts of a frame."""
    for rate, parts, seconds in ((25, 40, 0.48), (24, 80, 0.25), (30, 80, 0.2), (29, 80, 0.2002)):
        data = midi(track((0, tempo(100_000)), *melody(60, 62)), division=(256 - rate) << 8 | parts)
        found = notes_of(tmp_path / "a.mid", data)
        assert [round(onset, 4) for onset, _, _ in found] == [0, seconds]


def test_notes_behind_the_end_of_a_track_are_counted(tmp_path: Path) -> None:
    report = report_of(tmp_path / "a.mid", midi(track(*melody(60), (0, b"\xff\x2f\0"), *melody(62, 64))))
    assert report.n_begun == 3
    assert report.dropped == {"behind the end of their track": 2}


far = [(2**28 - 1, b"\xff\x01\0")] * 9
REFUSED: dict[str, tuple[bytes, str]] = {
    "later than 2^31": (midi(track(*melody(60), *far, *melody(62))), "runs to tick 2,41"),
    "type 2": (midi(track(*melody(60)), track(*melody(62)), kind=2), "not one piece: it is of type 2, 2 sequences"),
    "a header too long": (b"MThd\1" + midi(track(*melody(60)))[5:], "its header claims 16,777,222 bytes"),
    "type 3": (midi(track(*melody(60)), kind=3), "of type 3"),
    "no division": (midi(track(*melody(60)), division=0), "0 ticks to a quarter note"),
    "no frames": (midi(track(*melody(60)), division=0xE700), "25 frames a second of 0 ticks"),
    "no tempo": (midi(track((0, tempo(0)), *melody(60))), "from tick 0 on its tempo is 0"),
    "no tempo later": (midi(track(*melody(60), (480, tempo(0)), *melody(62))), "from tick 960 on its tempo is 0"),
    "a tempo cut short": (midi(track((0, b"\xff\x51\x01\x07"), *melody(60))), "change of tempo"),
    "a pitch above 127": (midi(track((0, bytes([0x90, 200, 64])))), "status byte stands where a pitch"),
    "no status": (midi(track((0, bytes([60, 64])), *melody(62))), "holds data where an event should begin"),
    "a length too short": (midi(track(*melody(60, 62, 64)).replace(b"\x1f", b"\x08")), "where its length says"),
    "a track cut short": (midi(track(*melody(60, 62)))[:-9], "track 1 is cut short"),
    "a number too long": (midi(b"MTrk\0\0\0\x0c\x81\x81\x81\x81\x81\0" + on(60) + b"\0\0\0"), "four bytes"),
    "a day": (midi(track(*melody(60), (2**27, on(62)), (9, off(62)))), "hours, more than 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_read_right_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    data, said = REFUSED[case]
    (tmp_path / "a.mid").write_bytes(data)
    for name in ("tsd", "remi"):
        with pytest.raises(UserError, match=said) as caught:
            encode_midi(tmp_path / "a.mid", vocabulary_of(name))
        assert str(tmp_path / "a.mid") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_type_2_file_of_one_sequence_and_a_tempo_of_0_that_lasts_no_time_are_read(tmp_path: Path) -> None:
    assert notes_of(tmp_path / "a.mid", midi(track(*melody(60)), kind=2)) == [(0, 0.5, 60)]
    assert notes_of(tmp_path / "a.mid", midi(track((0, tempo(0)), (0, tempo(500_000)), *melody(60)))) == [(0, 0.5, 60)]
    late = track(*melody(60), (0, tempo(0)), (0, tempo(500_000)), *melody(62))
    assert notes_of(tmp_path / "b.mid", midi(late)) == [(0, 0.5, 60), (0.5, 0.5, 62)]


@pytest.mark.parametrize("limit", ["midi_bytes.LARGEST", "midi_file.MOST_NOTES"])
def test_a_file_too_large_for_a_piece_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    (tmp_path / "a.mid").write_bytes(midi(track(*melody(*range(40, 60)))))
    monkeypatch.setattr(f"dsmr.music.{limit}", 19)
    with pytest.raises(UserError, match=r"a\.mid is too large for one piece"):
        read_midi(tmp_path / "a.mid")
    monkeypatch.setattr(f"dsmr.music.{limit}", 1000)
    read_midi(tmp_path / "a.mid")


def test_a_file_of_just_the_size_that_is_read_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (tmp_path / "a.mid").write_bytes(midi(track(*melody(*range(40, 60)))))
    whole = notes_of(tmp_path / "a.mid", (tmp_path / "a.mid").read_bytes())
    for module in ("midi_bytes", "midi_file"):
        monkeypatch.setattr(f"dsmr.music.{module}.LARGEST", size)
    assert notes_of(tmp_path / "a.mid", (tmp_path / "a.mid").read_bytes()) == whole
    assert count_begun(tmp_path / "a.mid") == len(whole) == 20
    (tmp_path / "a.mid").write_bytes((tmp_path / "a.mid").read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"a\.mid is too large for one piece"):
        read_midi(tmp_path / "a.mid")


@pytest.mark.slow
def test_a_file_made_to_take_long_does_not(tmp_path: Path) -> None:
    """Of "all notes off", of ends, of pedals, of tracks, of tempos: a file grows them as fast as it is read."""
    pitches = [(0, on(pitch)) for pitch in range(128)]
    for many in (
        track(*pitches, (0, bytes([0xB0, 123, 0])), (0, b"\x7b\0" + b"\0\x7b\0" * 200_000)),
        track(*pitches, (0, off(60)), (0, b"\x3c\0" + b"\0\x3c\0" * 200_000)),
        track(*pitches, (0, bytes([0xB0, 64, 127])), (0, b"\x40\0" + b"\0\x40\x7f\0\x40\0" * 100_000)),
        track(*pitches) + track() * 60_000,
        track(*pitches, *[(1, tempo(500_000 + i)) for i in range(90_000)]),
    ):
        data = midi(many, count=1)
        started = time.process_time()
        (tmp_path / "a.mid").write_bytes(data)
        with contextlib.suppress(UserError):
            report = encode_midi(tmp_path / "a.mid", vocabulary_of())[1]
            assert report.n_begun == 128
        assert time.process_time() - started < 10


def test_whatever_a_library_raises_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mid").write_bytes(midi(track(*melody(60))))
    for error, said in ((KeyError("Bar_-1"), "KeyError: 'Bar_-1'"), (MemoryError(), "more memory than there is")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("dsmr.music.tokenizer.rewrite", fail)
        with pytest.raises(UserError, match=said):
            encode_midi(tmp_path / "a.mid", vocabulary_of())


@pytest.mark.slow
def test_of_damaged_files_every_note_is_accounted_for(tmp_path: Path) -> None:
    rng, tokenizer = random.Random(0), build_tokenizer()
    whole = [bytes(random_score(seed, 30).dumps_midi()) for seed in range(8)]
    words, kept = vocabulary_of(), 0
    for _ in range(1500):
        (tmp_path / "a.mid").write_bytes(damaged(rng, rng.choice(whole)))
        try:
            tokens, report = encode_score(tmp_path / "a.mid", tokenizer)
        except (UserError, EmptyScoreError, ValueError):
            continue
        kept += 1
        assert report.n_begun == report.n_notes + sum(report.dropped.values())
        assert words.count_notes(tokens) == report.n_notes
        assert np.diff(words.clock(tokens)).min() >= 0
    assert kept > 300
