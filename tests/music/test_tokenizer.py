"""Reading MIDI loses nothing in silence, and the known traps of MidiTok 3.1.0 are not stepped into."""

import dataclasses
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import symusic
from small_scores import onsets_and_pitches, random_score, score_of

from dsmr.console.errors import UserError
from dsmr.music import tokenizer as module
from dsmr.music.tokenizer import (
    SCHEMES,
    EmptyScoreError,
    build_tokenizer,
    decode,
    encode_midi,
    encode_score,
    load_midi,
    read_midi,
    rebuild,
    vocabulary_of,
    write_midi,
)
from dsmr.music.vocabulary import Vocabulary

ALL = pytest.mark.parametrize("name", list(SCHEMES))


@ALL
def test_a_decoded_piece_encodes_to_the_same_tokens(name: str) -> None:
    tokens, _ = encode_score(random_score(5), build_tokenizer(name))
    again, report = encode_score(decode(tokens, vocabulary_of(name)), build_tokenizer(name))
    assert report.dropped == {}
    if name != "midilike":  # overlapping notes of one pitch may have swapped ends there
        np.testing.assert_array_equal(tokens, again)


@ALL
def test_tempo_changes_keep_the_seconds_of_notes(name: str, tmp_path: Path) -> None:
    """MidiTok without tempo tokens ignores tempi: notes at 60 qpm would last half as long."""
    score = symusic.Score(480)
    for tick, qpm in ((0, 60), (960, 240), (1920, 97)):
        score.tempos.append(symusic.Tempo(tick, qpm))
    track = symusic.Track(program=0, is_drum=False)
    for i in range(8):
        track.notes.append(symusic.Note(i * 480, 240, 60 + i, 64))
    score.tracks.append(track)
    score.dump_midi(str(tmp_path / "a.mid"))
    beat = 60 / 97
    expected = [0, 1, 2, 2.25, 2.5, 2.5 + beat, 2.5 + 2 * beat, 2.5 + 3 * beat]
    lengths = [0.5, 0.5, 0.125, 0.125, *([beat / 2] * 4)]

    tokens, report = encode_score(tmp_path / "a.mid", build_tokenizer(name))
    notes = sorted(decode(tokens, vocabulary_of(name)).tracks[0].notes, key=lambda note: note.pitch)
    np.testing.assert_allclose([note.time / 100 for note in notes], expected, atol=0.0051)
    np.testing.assert_allclose([note.duration / 100 for note in notes], lengths, atol=0.0101)
    assert report.seconds == pytest.approx(expected[-1] + beat / 2, abs=0.01)

    fine = read_midi(tmp_path / "a.mid")
    assert [(tempo.time, tempo.qpm) for tempo in fine.tempos] == [(0, 120)]
    np.testing.assert_allclose([note.time / 10_000 for note in fine.tracks[0].notes], expected, atol=0.0001)


def test_a_file_without_a_tempo_plays_at_120() -> None:
    score = score_of([(1.0, 1.0, 60)])
    score.tempos = type(score.tempos)()
    tokens, report = encode_score(score, build_tokenizer())
    assert report.seconds == 2.0
    assert vocabulary_of().clock(tokens)[-1] == 1.0


def test_the_pedal_keeps_its_seconds_under_a_tempo_change(tmp_path: Path) -> None:
    score = symusic.Score(480)
    score.tempos.append(symusic.Tempo(0, 60))
    track = symusic.Track(program=0, is_drum=False)
    track.notes.append(symusic.Note(0, 480, 60, 64))
    track.controls.append(symusic.ControlChange(480, 64, 127))
    track.controls.append(symusic.ControlChange(1440, 64, 0))
    score.tracks.append(track)
    score.dump_midi(str(tmp_path / "a.mid"))
    tokens, _ = encode_score(tmp_path / "a.mid", build_tokenizer("tsd_pedal"))
    words = vocabulary_of("tsd_pedal")
    clock = words.clock(tokens)
    assert clock[tokens == words.ids["Pedal_0"]].tolist() == [1.0]
    assert clock[tokens == words.ids["PedalOff_0"]].tolist() == [3.0]
    decode(tokens, words).dump_midi(str(tmp_path / "b.mid"))
    assert [(p.time, p.duration) for p in read_midi(tmp_path / "b.mid").tracks[0].pedals] == [(10_000, 20_000)]


@pytest.mark.parametrize(
    ("name", "begins"), [("tsd", "40090f71"), ("midilike", "b8882ecb"), ("remi", "edbe0d25"), ("tsd_pedal", "287a18ad")]
)
def test_the_vocabularies_are_those_of_the_corpora_and_models_that_there_are(name: str, begins: str) -> None:
    """A token more, less or elsewhere, and nothing that was prepared or trained before could be read."""
    assert vocabulary_of(name).hash.startswith(begins)


def test_of_several_tempos_at_one_moment_the_last_counts_and_before_the_first_it_is_120() -> None:
    score = symusic.Score(100)
    for tick, qpm in ((200, 30), (200, 60), (400, 240), (400, 120)):
        score.tempos.append(symusic.Tempo(tick, qpm))
    track = symusic.Track(program=0, is_drum=False)
    for tick in (0, 100, 200, 300, 400, 500):
        track.notes.append(symusic.Note(tick, 100, 60, 64))
    score.tracks.append(track)
    (piano,) = module.rewrite(score)[0].tracks
    assert [note.time / 10_000 for note in piano.notes] == [0, 0.5, 1, 2, 3, 3.5]
    assert [note.duration / 10_000 for note in piano.notes] == [0.5, 0.5, 1, 1, 0.5, 0.5]


def test_a_tempo_from_tick_0_on_replaces_120_and_one_from_tick_1_on_does_not() -> None:
    for begins, seconds in ((0, 2.0), (1, 1.85)):
        score = symusic.Score(10)
        score.tempos.append(symusic.Tempo(begins, 30))
        track = symusic.Track(program=0, is_drum=False)
        track.notes.append(symusic.Note(0, 10, 60, 64))
        score.tracks.append(track)
        (note,) = module.rewrite(score)[0].tracks[0].notes
        assert (note.time, note.duration) == (0, round(seconds * 10_000))


def test_notes_come_by_onset_pitch_length_and_strength_and_last_a_tick_at_least() -> None:
    score = score_of([])
    wanted = [(0, 1, 60, 9), (0, 10, 60, 3), (0, 10, 60, 5), (0, 20, 60, 1), (0, 5, 61, 1), (10, 5, 59, 1)]
    for tick, length, pitch, velocity in [wanted[place] for place in (5, 3, 1, 4, 2)]:
        score.tracks[0].notes.append(symusic.Note(tick, length, pitch, velocity))
    score.tracks[0].notes.append(symusic.Note(0, 0, 60, 9))
    found, _ = module.rewrite(score, 500)
    notes = [(note.time, note.duration, note.pitch, note.velocity) for note in found.tracks[0].notes]
    assert notes == wanted
    assert (found.ticks_per_quarter, found.tracks[0].program, found.tracks[0].is_drum) == (500, 0, False)


def test_pedals_of_all_tracks_are_kept_and_written_as_controllers() -> None:
    score = score_of([(0.0, 1.0, 60)])
    score.tracks.append(score_of([(0.0, 1.0, 62)]).tracks[0])
    score.tracks[0].pedals.append(symusic.Pedal(100, 400))
    for start, length in ((200, 100), (100, 300), (700, 0)):
        score.tracks[1].pedals.append(symusic.Pedal(start, length))
    piano = module.rewrite(score, 50)[0].tracks[0]
    assert [(pedal.time, pedal.duration) for pedal in piano.pedals] == [(10, 30), (10, 40), (20, 10), (70, 1)]
    moves = [(move.time, move.number, move.value) for move in piano.controls]
    down, up = ([move for move in moves if move[2] == value] for value in (127, 0))
    assert down == [(10, 64, 127), (10, 64, 127), (20, 64, 127), (70, 64, 127)]
    assert up == [(30, 64, 0), (40, 64, 0), (50, 64, 0), (71, 64, 0)]
    assert [move[0] for move in moves] == sorted(move[0] for move in moves)


def test_pedals_that_the_tokeniser_has_no_tokens_for_are_told() -> None:
    score = symusic.Score(480)
    track = symusic.Track(program=0, is_drum=False)
    track.notes.append(symusic.Note(0, 480, 60, 64))
    track.pedals.extend([symusic.Pedal(0, 240), symusic.Pedal(300, 100)])
    score.tracks.append(track)
    _, report = encode_score(score, build_tokenizer("tsd"))
    assert report.lines() == ["2 pedals left out: the tokeniser has none (tsd_pedal does)."]
    _, report = encode_score(score, build_tokenizer("tsd_pedal"))
    assert report.lines() == []


def test_a_piece_lasts_a_day_at_most() -> None:
    day = 24 * 3600.0
    assert module.rewrite(score_of([(day - 1, 1.0, 60)]))[1] == {}
    with pytest.raises(ValueError, match=r"lasts 24\.0 hours, more than 24"):
        module.rewrite(score_of([(day - 1, 1.001, 60)]))


def test_a_pedal_that_nothing_lets_up_is_held_from_its_first_push_to_the_end_of_the_last_note() -> None:
    words, tokenizer = vocabulary_of("tsd_pedal"), build_tokenizer("tsd_pedal")
    score = score_of([(0.0, 3.0, 60), (1.5, 1.0, 62)])
    for start, length in ((0, 250), (500, 250), (1000, 250), (2000, 250)):
        score.tracks[0].pedals.append(symusic.Pedal(start, length))
    tokens, _ = encode_score(score, tokenizer)
    ups = np.flatnonzero(tokens == words.ids["PedalOff_0"])
    assert len(ups) == 4

    def held(*without: int) -> list[tuple[float, float]]:
        piano = decode(np.delete(tokens, ups[list(without)]), words).tracks[0]
        return [(pedal.time / 100, pedal.duration / 100) for pedal in piano.pedals]

    four = [(0.0, 0.25), (0.5, 0.25), (1.0, 0.25), (2.0, 0.25)]
    assert held() == four
    assert held(3) == [*four[:3], (2.0, 1.0)]
    assert held(2, 3) == [*four[:2], (1.0, 2.0)]
    assert held(0, 1, 2, 3) == [(0.0, 3.0)]
    late = score_of([(0.0, 1.0, 60)])
    late.tracks[0].pedals.append(symusic.Pedal(1000, 500))
    tokens, _ = encode_score(late, tokenizer)
    ups = np.flatnonzero(tokens == words.ids["PedalOff_0"])
    assert held(0) == []  # nothing sounds that it could hold


@ALL
def test_long_pauses_keep_their_length(name: str) -> None:
    tokens, _ = encode_score(score_of([(0.0, 0.5, 60), (71.23, 0.5, 62), (200.0, 1.0, 64)]), build_tokenizer(name))
    found = onsets_and_pitches(decode(tokens, vocabulary_of(name)))
    assert found == [(0.0, 60), (71.23, 62), (200.0, 64)]


@ALL
def test_repeated_overlapping_and_empty_notes_are_all_kept(name: str) -> None:
    notes = [(0.0, 2.0, 60), (0.0, 2.0, 60), (0.5, 0.2, 60), (1.0, 0.0, 60), (1.001, 0.001, 60), (2.0, 1.0, 60)]
    tokens, report = encode_score(score_of(notes), build_tokenizer(name))
    assert report.n_notes == len(notes)
    assert len(decode(tokens, vocabulary_of(name)).tracks[0].notes) == len(notes)


def test_notes_off_the_keyboard_and_drums_are_counted() -> None:
    score = score_of([(0.0, 1.0, 20), (0.0, 1.0, 109), (0.0, 1.0, 21), (0.0, 1.0, 108)])
    drums = symusic.Track(program=0, is_drum=True)
    drums.notes.append(symusic.Note(0, 100, 36, 64))
    score.tracks.append(drums)
    tokens, report = encode_score(score, build_tokenizer())
    assert report.n_notes == 2
    assert report.dropped == {"on a drum track": 1, "pitch outside 21 to 108": 2}
    assert (report.n_begun, report.seconds) == (5, 1.0)
    assert vocabulary_of().count_notes(tokens) == 2
    for track in (score_of([(0.0, 9.0, 20)]).tracks[0], drums):  # what is left out does not make it longer
        score.tracks.append(track)
    report = encode_score(score, build_tokenizer())[1]
    assert (report.dropped, report.seconds) == ({"on a drum track": 2, "pitch outside 21 to 108": 3}, 1.0)


def test_what_the_tokeniser_loses_is_counted_and_a_count_that_does_not_add_up_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer, score = build_tokenizer(), random_score(1, 9)
    encode = type(tokenizer).encode

    def forgetful(self, score):
        (sequence,) = encode(self, score)
        pitches = [place for place, token in enumerate(sequence.ids) if token in range(3, 3 + 88)]
        sequence.ids = sequence.ids[: pitches[-2]]
        return [sequence]

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", forgetful)
        report = encode_score(score, tokenizer)[1]
    assert (report.n_notes, report.dropped) == (7, {"lost by the tokeniser": 2})
    score.dump_midi(str(tmp_path / "a.mid"))
    read = module.read_file
    monkeypatch.setattr(
        module, "read_file", lambda path: dataclasses.replace(read(path), n_begun=10, dropped={"for a reason": 2})
    )
    with pytest.raises(ValueError, match=r"of its 10 notes 9 are in the tokens and .*'for a reason': 2. were"):
        encode_score(tmp_path / "a.mid", tokenizer)


def test_notes_longer_than_the_longest_duration_are_reported() -> None:
    _, report = encode_score(score_of([(0.0, 10.0, 60), (0.0, 10.02, 62), (0.0, 30.0, 64)]), build_tokenizer())
    assert report.changed == {"longer than 10 s (cut to it)": 2}
    _, report = encode_score(score_of([(0.0, 5.0, 60), (1.0, 1.0, 60)]), build_tokenizer("midilike"))
    assert list(report.changed.values()) == [1]
    late = [(0.0, 1.0, 60), (2.0, 3.0, 61), (3.0, 1.0, 61)]
    assert list(encode_score(score_of(late), build_tokenizer("midilike"))[1].changed.values()) == [1]
    inside = [(0.0, 5.0, 60), (1.0, 4.0, 60), (2.0, 1.0, 61), (9.0, 1.0, 61), (9.0, 0.5, 60)]
    assert encode_score(score_of(inside), build_tokenizer("midilike"))[1].changed == {}


def test_all_tracks_become_one_in_order_of_time() -> None:
    score = score_of([(0.0, 1.0, 72), (2.0, 1.0, 74)], program=0)
    score.tracks.append(score_of([(0.0, 1.0, 48), (1.0, 1.0, 50)], program=40).tracks[0])
    tokens, _ = encode_score(score, build_tokenizer())
    words = vocabulary_of()
    assert words.pitch[tokens[words.is_note[tokens]]].tolist() == [48, 72, 50, 74]
    merged, dropped = module.rewrite(score)
    assert len(merged.tracks) == 1
    assert dropped == {}


def test_the_order_within_a_chord_does_not_depend_on_less_than_a_tick() -> None:
    rolled = score_of([(1.002, 1.0, 72), (1.0, 1.0, 76), (1.004, 1.0, 60)])
    struck = score_of([(1.0, 1.0, 60), (1.0, 1.0, 72), (1.0, 1.0, 76)])
    tokenizer = build_tokenizer()
    np.testing.assert_array_equal(encode_score(rolled, tokenizer)[0], encode_score(struck, tokenizer)[0])


@ALL
def test_tokens_are_one_whole_piece(name: str) -> None:
    """MidiTok returns a list without programs, and its file splitter cuts pieces: we want one row, whole."""
    tokens, report = encode_score(random_score(2, 3000, pedals=False), build_tokenizer(name))
    assert tokens.ndim == 1
    assert tokens.dtype == np.uint16
    assert vocabulary_of(name).count_notes(tokens) == report.n_notes == 3000
    assert not np.isin(tokens, [0, 1, 2]).any()


@ALL
def test_a_vocabulary_file_alone_decodes_without_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MidiTok's own `from_pretrained` retries the network for half a minute when a path is missing."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    tokens, _ = encode_score(random_score(1), build_tokenizer(name))
    vocabulary_of(name).save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    module.rebuild.cache_clear()
    start = time.monotonic()
    words = Vocabulary.load(tmp_path / "tokenizer.json")
    piece = np.concatenate([[words.bos_id], tokens, [words.eos_id, words.pad_id]])
    assert len(decode(piece, words).tracks[0].notes) == 120
    assert time.monotonic() - start < 10


def test_a_tokeniser_that_changed_is_noticed() -> None:
    words = vocabulary_of("tsd")
    other = Vocabulary("TSD", (*words.tokens, "Pitch_109"), 100, words.tokenizer_params)
    with pytest.raises(UserError, match="makes other tokens"):
        rebuild(other)
    with pytest.raises(UserError, match="no tokeniser 'Nonsense'"):
        rebuild(Vocabulary("TSD", words.tokens, 100, {**words.tokenizer_params, "tokenization": "Nonsense"}))


def test_decoding_nothing_gives_an_empty_piano_track(tmp_path: Path) -> None:
    words = vocabulary_of()
    for tokens in ([], [words.bos_id, words.eos_id], [words.ids["Pitch_60"]]):
        score = decode(tokens, words)
        assert len(score.tracks) == 1
        assert len(score.tracks[0].notes) == 0
        score.dump_midi(str(tmp_path / "a.mid"))
    for token in (words.size, -1):
        with pytest.raises(ValueError, match=rf"\[0, {words.size}\), got {token} to {token}"):
            decode([token], words)
    with pytest.raises(ValueError, match=f"got 0 to {words.size}"):
        decode([0, words.size], words)
    assert decode([words.size - 1], words).tracks[0].name == "Piano"


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    random_score(0).dump_midi(str(tmp_path / "whole.mid"))
    cut = tmp_path / "cut.mid"
    cut.write_bytes((tmp_path / "whole.mid").read_bytes()[:200])
    junk = tmp_path / "junk.mid"
    junk.write_bytes(b"this is not music" * 10)
    for path in (cut, junk):
        with pytest.raises(UserError, match="not a readable MIDI file") as caught:
            read_midi(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"absent\.mid: no such file"):
        read_midi(tmp_path / "absent.mid")
    with pytest.raises(UserError, match="tsd, midilike"):
        build_tokenizer("nonsense")


def test_a_score_without_notes_says_so(tmp_path: Path) -> None:
    with pytest.raises(EmptyScoreError, match="no notes"):
        encode_score(score_of([]), build_tokenizer())
    with pytest.raises(EmptyScoreError, match=r"1 pitch outside 21 to 108"):
        encode_score(score_of([(0.0, 1.0, 5)]), build_tokenizer())
    score_of([]).dump_midi(str(tmp_path / "silent.mid"))
    with pytest.raises(UserError, match=r"silent\.mid has no notes"):
        encode_midi(tmp_path / "silent.mid", vocabulary_of())


def test_a_midi_file_on_a_full_disk_is_an_error_and_not_half_a_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    score, limits = random_score(0, 500), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*piece\.mid: file too large"):
            write_midi(tmp_path / "piece.mid", score)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    write_midi(tmp_path / "piece.mid", score)
    assert len(load_midi(tmp_path / "piece.mid").tracks[0].notes) == 500


def test_an_error_without_words_is_told_by_its_kind() -> None:
    for error, said in (
        (ValueError("it is blue"), "it is blue"),
        (ValueError(), "reading it fails (ValueError: )"),
        (UserError("a.mid is blue"), "a.mid is blue"),
        (KeyError("Bar_-1"), "reading it fails (KeyError: 'Bar_-1')"),
        (MemoryError("malloc"), "reading it takes more memory than there is"),
    ):
        assert module.reason_of(error) == said


def test_a_file_that_claims_to_last_for_days_is_refused() -> None:
    with pytest.raises(ValueError, match="hours"):
        encode_score(score_of([(0.0, 1.0, 60), (100_000.0, 1.0, 60)]), build_tokenizer())
