"""What our own reader takes from the bytes of a MIDI file, event by event, as the standard says; and its limits."""

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import symusic
from raw_midi import melody, midi, off, on, tempo, track

from dsmr.console.errors import UserError
from dsmr.music import midi_bytes, midi_file
from dsmr.music.midi_bytes import MidiBytes, MidiBytesError, pair, read_bytes
from dsmr.music.midi_file import count_begun, read_data, read_file

END = b"\xff\x2f\0"


def control(number: int, value: int = 0, channel: int = 0) -> bytes:
    return bytes([0xB0 | channel, number, value])


def rows(*events: tuple[int, bytes], ends: bool = True) -> list[list[int]]:
    return read_bytes(midi(track(*events)), ends=ends).events.tolist()


def notes(*events: tuple[int, bytes]) -> list[list[int]]:
    """Tick, ticks long, pitch, velocity, whether it is percussion."""
    return pair(read_bytes(midi(track(*events)))).notes.tolist()


def pedals(*events: tuple[int, bytes]) -> list[list[int]]:
    return pair(read_bytes(midi(track(*events)))).pedals.tolist()


def refused(data: bytes, said: str) -> None:
    with pytest.raises(MidiBytesError, match=said):
        read_bytes(data)


# Events.


def test_the_events_are_strikes_ends_and_what_ends_notes_or_moves_the_pedal() -> None:
    every = [
        (1, on(60, 1)),
        (2, off(60)),
        (3, on(61, 0)),
        (4, control(64, 127)),
        (5, control(119, 1)),
        (6, control(120, 0)),
        (7, control(127, 5)),
        (8, control(63, 5)),
        (9, control(65, 5)),
    ]
    strikes = [[1, 0, 0x90, 60, 1], [6, 0, 0x90, 61, 0]]
    ends = [[3, 0, 0x80, 60, 0], [10, 0, 0xB0, 64, 127], [21, 0, 0xB0, 120, 0], [28, 0, 0xB0, 127, 5]]
    assert rows(*every) == sorted(strikes + ends)
    assert rows(*every, ends=False) == strikes


def test_a_strike_without_velocity_is_none() -> None:
    assert read_bytes(midi(track((1, on(60)), (1, on(60, 0)), (1, off(60))))).is_strike.sum() == 1


def test_every_kind_of_event_has_its_length_on_every_channel() -> None:
    """Two data bytes, but one of a change of program and of a channel's pressure (MIDI 1.0)."""
    for status in range(0x80, 0xF0):
        passed = bytes([status, 1] if 0xC0 <= status < 0xE0 else [status, 1, 2])
        found = rows((5, passed), (7, passed[1:]), (9, on(60, 3)), (11, bytes([62, 4])))
        assert found[-2:] == [[21, 0, 0x90, 60, 3], [32, 0, 0x90, 62, 4]], status
        assert len(found) == 2 + 2 * (status < 0xA0), status


def test_numbers_are_of_one_to_four_bytes_whatever_zeros_they_begin_with() -> None:
    for written, ticks in {
        b"\0": 0,
        b"\x7f": 127,
        b"\x80\x05": 5,
        b"\x81\x00": 128,
        b"\xff\x7f": 2**14 - 1,
        b"\x81\x80\x00": 2**14,
        b"\x83\x85\x07": (3 << 14) + (5 << 7) + 7,
        b"\x81\x80\x80\x00": 2**21,
        b"\xff\xff\xff\x7f": 2**28 - 1,
    }.items():
        body = written + on(60) + b"\0" + END
        (event,) = read_bytes(midi(b"MTrk" + len(body).to_bytes(4, "big") + body)).events.tolist()
        assert event[0] == ticks
    body = b"\x81\x81\x81\x81\0" + on(60) + b"\0" + END
    refused(midi(b"MTrk" + len(body).to_bytes(4, "big") + body), "more than the four bytes")


def test_a_track_ends_with_the_event_that_says_so_and_not_with_a_text_that_looks_like_it() -> None:
    for looks_like in (b"\xff\x01\x02\x2f\0", b"\xf0\x02\x2f\0", b"\xff\x01\x03\xff\x2f\0"):
        midi = read_bytes(_file((0, on(60)), (9, looks_like), (0, on(62))))
        assert (len(midi.events), midi.behind_the_end) == (2, 0)


def _file(*events: tuple[int, bytes]) -> bytes:
    return midi(track(*events))


def test_what_stands_behind_the_end_is_counted_and_nothing_else_of_it_matters() -> None:
    behind = [(5, on(62, 0)), (7, on(64, 0)), (0, off(62)), (0, on(65, 1)), (0, on(66, 127))]
    found = read_bytes(_file((3, on(60)), (4, END), (0, tempo(1)), *behind, (0, END), (9, on(67))))
    assert found.behind_the_end == 3
    assert (found.last_tick, found.tempos.tolist(), len(found.events)) == (7, [], 1)
    for junk in (b"\x05\x06", b"\x90", b"\xff", b"\x81\x81\x81\x81\x81"):
        assert len(read_bytes(_file((3, on(60)), (4, END), (0, junk))).events) == 1


def test_the_notes_of_a_refused_file_are_counted_behind_the_end_too(tmp_path: Path) -> None:
    (tmp_path / "a.mid").write_bytes(_file((0, tempo(0)), *melody(60, 62, 64), (0, END), *melody(65, 67)))
    with pytest.raises(UserError, match="its tempo is 0"):
        read_file(tmp_path / "a.mid")
    assert count_begun(tmp_path / "a.mid") == 5
    (tmp_path / "a.mid").write_bytes(b"junk")
    assert count_begun(tmp_path / "a.mid") == count_begun(tmp_path / "none.mid") == 0


def test_a_track_that_is_cut_short_is_refused() -> None:
    whole = on(60) + b"\x05\xff\x51\x03\1\2\3"
    for left in range(1, len(whole)):
        if left != 3:
            body = b"\0" + whole[:left]
            refused(midi(b"MTrk" + len(body).to_bytes(4, "big") + body), "its track 1 is cut short|tempo in it is cut")


def test_tempos_are_the_first_three_bytes_of_their_event_at_its_tick() -> None:
    found = read_bytes(_file((5, tempo(0x010203)), (7, b"\xff\x51\x04\x04\x05\x06\x07"), (0, on(60))))
    assert found.tempos.tolist() == [[5, 0x010203], [12, 0x040506]]
    refused(_file((0, b"\xff\x51\x02\x04\x05"), (0, on(60))), "tempo in it is cut short")


# The header and the chunks.


def test_a_header_is_read_whole() -> None:
    empty = read_bytes(midi(division=481))
    assert (empty.kind, empty.tracks, empty.ticks_per_quarter, empty.per_second) == (1, 0, 481, None)
    assert (empty.events.shape, empty.tempos.shape) == ((0, 5), (0, 2))
    assert (empty.last_tick, empty.behind_the_end) == (0, 0)
    one = track((9, on(60, 3)))
    longer = b"MThd\0\0\0\x08" + midi(one)[8:14] + b"ab" + one
    assert read_bytes(longer).events.tolist() == [[9, 0, 0x90, 60, 3]]
    refused(midi()[:13], "does not begin with a MIDI header")
    refused(b"RIFF" + midi()[4:], "does not begin with a MIDI header")
    refused(b"MThd\0\0\0\5" + midi(one)[8:], "its header claims 5 bytes")
    refused(b"MThd\0\0\0\7" + midi()[8:], "its header claims 7 bytes")
    refused(midi(one, kind=256), "of type 256")


@pytest.mark.parametrize(
    ("rate", "exact"), [(24, Fraction(24)), (25, Fraction(25)), (29, Fraction(30_000, 1001)), (30, Fraction(30))]
)
def test_a_frame_has_the_length_of_its_standard(rate: int, exact: Fraction) -> None:
    assert read_bytes(midi(division=(256 - rate) << 8 | 80)).per_second == exact * 80
    assert read_bytes(midi(division=(256 - rate) << 8 | 1)).per_second == exact
    for other in (23, 26, 28, 31):
        refused(midi(division=(256 - other) << 8 | 80), f"claims {other} frames a second of 80 ticks")


def test_only_what_can_be_a_name_begins_a_chunk() -> None:
    one, other = track((0, on(60))), track((0, on(62)))
    for letter in (b" ", b"~"):
        assert read_bytes(midi(one + b"abc" + letter + b"\0\0\0\1x" + other)).tracks == 2
    for letter in (b"\x1f", b"\x7f"):
        refused(midi(one + b"abc" + letter + b"\0\0\0\1x" + other), "its track 1 does not end where its length says")
    assert read_bytes(midi(b"\0\0\0")).tracks == 0
    assert read_bytes(midi(one + b"\0\0\0")).tracks == 1
    refused(midi(track((0, on(60)), end=False) + b"\0\0\0"), "its track 1 does not end where its length says")
    assert read_bytes(midi(track((0, on(60)), end=False))).tracks == 1
    refused(midi(one + other[:-1]), "its track 2 is cut short")


def test_a_length_that_hides_music_behind_a_text_that_looks_like_the_end_is_damage() -> None:
    whole = track((0, on(60)), (0, b"\xff\x01\x03\xff\x2f\0"), (5, on(62)))
    assert len(read_bytes(midi(whole)).events) == 2
    shorter = whole.index(b"\x01\x03\xff\x2f\0") + 5 - 8
    refused(midi(whole[:4] + shorter.to_bytes(4, "big") + whole[8:]), "its track 1 does not end where its length says")


def test_sequences_of_type_2_that_hold_nothing_do_not_count() -> None:
    assert read_bytes(midi(track(), track((0, on(60))), track(), kind=2)).tracks == 3
    refused(midi(track((0, on(60))), track((0, on(60))), kind=2), "of type 2, 2 sequences")
    assert read_bytes(midi(track((0, on(60))), track((0, on(60))), kind=1)).tracks == 2


# Limits.


def test_the_limits_are_those_that_are_said() -> None:
    refused(bytes(8 << 20), "does not begin with a MIDI header")
    refused(bytes((8 << 20) + 1), "more than 8 MiB")
    chunk = track()
    assert len(midi_bytes._tracks(chunk * 65_535, 0)[0]) == 65_535
    with pytest.raises(MidiBytesError, match="more than 65,535 tracks"):
        midi_bytes._tracks(chunk * 65_536, 0)
    far = [(2**28 - 1, b"\xff\x01\0")] * 8
    assert read_bytes(_file(*far, (7, on(60)))).last_tick == 2**31 - 1
    refused(_file(*far, (8, on(60))), "it runs to tick 2,147,483,648")
    assert rows((0, on(127, 127))) == [[0, 0, 0x90, 127, 127]]
    refused(_file((0, on(128))), "a status byte stands where")
    refused(_file((0, bytes([0x90, 60, 128]))), "a status byte stands where")


def test_a_piece_of_as_many_notes_or_pedals_as_are_allowed_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    down_and_up = [(1, control(64, 127)), (1, control(64, 0))]
    for beside in ([], [(0, on(30))]):  # a note that never ends takes the other way through the reader
        many = _file(*melody(60, 62, 64), *beside, *down_and_up * 5)
        monkeypatch.setattr(midi_file, "MOST_NOTES", 5)
        assert read_data(many).n_begun == 3 + len(beside)
        monkeypatch.setattr(midi_file, "MOST_NOTES", 4)
        with pytest.raises(MidiBytesError, match="holds the pedal 5 times, more than 4"):
            read_data(many)
        monkeypatch.setattr(midi_file, "MOST_NOTES", 2)
        with pytest.raises(MidiBytesError, match=f"holds {3 + len(beside)} notes, more than 2"):
            read_data(many)


# Where notes and pedals end.


@pytest.mark.parametrize("number", range(116, 128))
def test_the_controllers_that_silence_a_channel_do_and_no_others(number: int) -> None:
    """All sound off, all notes off, and the four modes that imply it: 120 and 123 to 127 (MIDI 1.0)."""
    silences = number == 120 or number >= 123
    found = pair(
        read_bytes(
            _file(
                (0, on(60)),
                (0, on(64)),
                (0, on(60, channel=1)),
                (5, off(64)),
                (5, control(number)),
                (10, off(60)),
                (0, off(60, channel=1)),
            )
        )
    )
    assert found.never_ended == 0
    assert found.notes[:, :3].tolist() == [[0, 10 if silences else 20, 60], [0, 5, 64], [0, 20, 60]]


def test_what_is_silenced_may_be_struck_again() -> None:
    silenced = [(0, on(60)), (0, on(60, 65)), (5, control(123)), (5, control(123)), (2, on(60, 66)), (3, off(60))]
    assert notes(*silenced) == [[0, 0, 60, 64, 0], [0, 5, 60, 65, 0], [12, 3, 60, 66, 0]]
    assert pair(read_bytes(_file(*silenced))).never_ended == 0


def test_notes_end_on_their_own_channel_and_track_the_first_struck_first() -> None:
    assert notes((1, on(60, 1)), (2, on(60, 2, channel=9)), (4, off(60, channel=9)), (8, off(60))) == [
        [1, 14, 60, 1, 0],
        [3, 4, 60, 2, 1],
    ]
    two = read_bytes(midi(track((1, on(60)), (9, off(60))), track((2, on(60)), (3, off(60)))))
    assert pair(two).notes[:, :2].tolist() == [[1, 9], [2, 3]]
    assert notes((0, off(60)), (1, on(60, 1)), (0, on(60, 0)), (4, off(60)), (3, on(60, 2)), (1, off(60))) == [
        [1, 0, 60, 1, 0],
        [8, 1, 60, 2, 0],
    ]
    overlapping = [(0, on(60, 1)), (1, on(60, 2)), (2, off(60)), (4, on(60, 3)), (8, off(60)), (16, off(60))]
    assert notes(*overlapping) == [[0, 3, 60, 1, 0], [1, 14, 60, 2, 0], [7, 24, 60, 3, 0]]


def test_notes_that_nothing_ends_are_counted_each() -> None:
    found = pair(read_bytes(_file((0, on(60)), (5, on(60)), (5, on(62)), (10, b"\xff\x01\0"))))
    assert found.notes[:, :3].tolist() == [[0, 5, 60], [5, 15, 60], [10, 10, 62]]
    assert found.never_ended == 3
    lost_one = pair(read_bytes(_file((0, on(60)), (5, on(60)), (5, off(60)), (10, b"\xff\x01\0"))))
    assert lost_one.notes[:, :2].tolist() == [[0, 5], [5, 5]]
    assert lost_one.never_ended == 1


def test_the_pedal_is_down_from_64_on_from_its_first_push_to_its_release_or_the_end() -> None:
    down, half, up = control(64, 64), control(64, 63), control(64, 0)
    assert pedals((1, down), (2, half), (4, on(60))) == [[1, 2]]
    assert pedals((1, down), (2, down), (4, up), (8, up)) == [[1, 6]]
    assert pedals((1, up), (2, half), (4, on(60))) == []
    assert pedals((0, down), (2, up), (4, down), (8, on(60))) == [[0, 2], [6, 8]]
    assert pedals((1, on(60)), (4, down)) == []  # at the very end: it holds nothing
    other = control(64, 0, channel=1)
    assert pedals((1, down), (2, other), (4, up)) == [[1, 6]]
    assert pedals((1, control(66, 127)), (2, control(66, 0)), (4, on(60))) == []


def test_a_long_piece_is_paired_as_a_short_one() -> None:
    many = np.arange(5 * 70_000).reshape(-1, 5)
    assert list(midi_bytes._rows(many)) == many.tolist()


# Against symusic.


def test_where_symusic_finds_the_same_its_score_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own score is made only where the two differ, because it knows less: of programs, names and texts."""

    def never(_: MidiBytes) -> None:
        raise AssertionError("the notes were paired")

    monkeypatch.setattr(midi_file, "pair", never)
    same = [
        track((0, tempo(400_000)), (960, tempo(700_000)), (0, tempo(600_000)), *melody(60)),
        track(*melody(60, 62, 62, rest=3), (0, on(40, channel=9)), (5, off(40, channel=9))),
        track((0, on(60)), (0, on(64)), (7, off(60)), (0, off(64))),
    ]
    score = read_data(midi(*same)).score
    assert sum(len(one.notes) for one in score.tracks) == 7
    assert read_data(midi(*same, division=96)).score.ticks_per_quarter == 96
    assert read_data(midi(track())).n_begun == 0
    assert read_data(midi(track((0, tempo(400_000)), (9, tempo(300_000)), (0, on(60)), (1, off(60))))).n_begun == 1


def test_a_score_of_other_ticks_does_not_stand() -> None:
    ours = read_bytes(midi(track(*melody(60)), division=96))
    for division in (96, 97):
        theirs = symusic.Score.from_midi(midi(track(*melody(60)), division=division))
        assert midi_file._agree(theirs, ours) == (division == 96)


def test_a_strike_is_told_from_every_other() -> None:
    values = ([0, 1, 2, 2**30], [0, 1, 64, 127], [0, 1, 64, 127], [0, 1])
    columns = np.array(list(itertools.product(*values))).T
    packed = midi_file._packed(*columns)
    assert len(set(packed.tolist())) == len(packed)
    assert (np.argsort(packed[::8]) == np.arange(len(packed) // 8)).all()


def test_frames_keep_their_seconds_in_a_score_of_our_own() -> None:
    score = read_data(midi(track((0, tempo(0)), (100, on(60)), (50, off(60))), division=(256 - 25) << 8 | 40)).score
    (note,) = score.to("second").tracks[0].notes
    assert (note.time, note.duration) == pytest.approx((0.1, 0.05))


def test_a_pedal_that_is_never_let_up_is_in_the_score_of_either_reader() -> None:
    """To the end of the piece; whether a note happens to have no end decides who reads."""
    down, up = control(64, 127), control(64, 0)
    events = [(0, on(60)), (100, down), (800, up), (100, down), (10, off(60))]
    for music in (events, events[:-1]):
        data = midi(track(*music, (90, b"\xff\x01\0")))
        last = sum(tick for tick, _ in music) + 90
        found = [(one.time, one.duration) for one in read_data(data).score.tracks[0].pedals]
        assert found == [(100, 800), (1000, last - 1000)]
    (only,) = read_data(midi(track((0, down), (5, on(60)), (10, off(60))))).score.tracks[0].pedals
    assert (only.time, only.duration) == (0, 15)
    two = [(0, on(60)), (5, down), (5, off(60))], [(0, on(72, channel=1)), (20, off(72, channel=1))]
    score = read_data(midi(*(track(*one) for one in two), kind=1)).score
    assert [[(one.time, one.duration) for one in found.pedals] for found in score.tracks] == [[(5, 15)], []]


def test_percussion_moves_no_pedal() -> None:
    drums = [(0, control(64, 127, channel=9)), (0, on(36, channel=9)), (5, off(36, channel=9))]
    assert pedals(*drums, (0, on(60)), (5, off(60))) == []
    score = read_data(midi(track(*drums, (0, on(60)), (5, off(60))))).score
    assert not any(len(one.pedals) for one in score.tracks if not one.is_drum)


def test_a_score_of_our_own_has_the_piano_with_its_pedals_and_percussion_apart() -> None:
    drum = [(0, on(36, channel=9)), (5, off(36, channel=9))]
    pedal = [(0, control(64, 127)), (10, control(64, 0)), (5, b"\xff\x01\0")]
    for events, is_drum in ((drum, [False, True]), ([], [False])):
        file = read_data(midi(track((0, tempo(400_000)), (0, on(60, 1)), *events, *pedal), division=100))
        assert file.changed == {midi_file.NO_END: 1}
        score = file.score
        assert score.ticks_per_quarter == 100
        assert [(one.time, one.mspq) for one in score.tempos] == [(0, 400_000)]
        assert [(one.is_drum, one.program) for one in score.tracks] == [(each, 0) for each in is_drum]
        last = 15 + 5 * bool(events)
        assert [(note.time, note.duration, note.pitch, note.velocity) for note in score.tracks[0].notes] == [
            (0, last, 60, 1)
        ]
        assert [(one.time, one.duration) for one in score.tracks[0].pedals] == [(last - 15, 10)]
        assert not any(len(one.pedals) for one in score.tracks[1:])
