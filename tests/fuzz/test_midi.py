"""Of damaged MIDI files that are kept every note-on is accounted for: some hundred; ten thousand by `midi.py`."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("miditok")
from midi import Account, account, note_ons, pieces
from raw_midi import melody, midi, off, on, track


def test_the_count_of_its_own_reads_the_bytes_by_the_standard() -> None:
    running = track((0, on(60)), (480, b"\xf0\x03\x01\x02\xf7"), (0, bytes([62, 64])), (480, off(60)), (0, off(62)))
    assert note_ons(midi(running, track(*melody(60, 64)), count=1)) == 4
    silent = track((0, bytes([0x90, 60, 0])), (0, b"\xc0\x05"), (0, b"\xff\x51\x03\x07\xa1\x20"), *melody(70))
    assert note_ons(midi(silent)) == 1


@pytest.mark.slow
def test_every_note_on_of_what_is_kept_is_accounted_for(tmp_path: Path) -> None:
    made, rng = Account(), random.Random(5)
    whole = pieces(3)
    for turn in range(2):
        account(tmp_path / str(turn), whole, 60, rng, made)
    assert not made.wrong
    assert made.files == 120
    assert made.kept > 30
    assert made.begun == made.in_corpus + sum(made.left_out.values())


@pytest.mark.slow
def test_a_note_that_is_lost_in_silence_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check, checked: a reader that leaves a note out and does not count it, which no other sum can tell."""
    import dsmr.corpus.prepare as prepare

    honest = prepare.encode_score

    def lossy(*given: object) -> object:
        tokens, report = honest(*given)
        return tokens[:-4], replace(report, n_notes=report.n_notes - 1, n_begun=report.n_begun - 1)

    monkeypatch.setattr(prepare, "encode_score", lossy)
    made = Account()
    account(tmp_path, pieces(2), 10, random.Random(0), made)
    assert made.wrong
