"""What is written of a continuation: every note of the model's is in it, and none of the prompt's."""

import numpy as np
import pytest

pytest.importorskip("miditok")

from dsmr.generation import pieces
from dsmr.generation.continuation import Take
from dsmr.generation.pieces import Pieces, of_prompt, without
from dsmr.music.tokenizer import decode, vocabulary_of

LASTS = {"1.0.50": 0.5, "0.10.50": 0.1, "2.0.10": 1.0}  # seconds


def note(vocabulary, pitch: int, velocity: int, duration: str) -> list[int]:
    return [vocabulary.ids[name] for name in (f"Pitch_{pitch}", f"Velocity_{velocity}", f"Duration_{duration}")]


@pytest.mark.parametrize("own", [(60, 63, "1.0.50"), (60, 127, "0.10.50"), (60, 31, "2.0.10")])
def test_a_note_of_the_models_own_at_the_join_is_its_own(own, tmp_path, monkeypatch):
    """On a pitch that the prompt strikes at that moment, alike or not: it was left out, and drawn as the prompt's."""
    tsd = vocabulary_of("tsd")
    prompt = [tsd.bos_id, *note(tsd, 48, 63, "1.0.50"), tsd.ids["TimeShift_1.0.50"], *note(tsd, 60, 63, "1.0.50")]
    made = [*note(tsd, *own), *note(tsd, 64, 63, "1.0.50")]
    written = Pieces(np.array(prompt), np.array(made), tsd)
    tick = 1 / (2 * written.whole.ticks_per_quarter)
    alone = without(written.whole, written.given, round(written.join / tick)).tracks[0].notes
    assert len(written.whole.tracks[0].notes) == 4
    assert sorted((n.time, n.pitch, n.velocity) for n in alone) == [(0, 60, own[1]), (0, 64, 63)]
    assert sorted(round(n.duration * tick, 3) for n in alone) == sorted([LASTS[own[2]], 0.5])
    drawn = {}
    monkeypatch.setattr(pieces, "draw_pianoroll", lambda path, notes, **given: drawn.update(given, prompt=notes))
    written.draw(tmp_path / "on.mid")
    assert drawn["prompt"]["pitch"].tolist() == [48, 60]
    assert drawn["prompt"]["velocity"].tolist() == [63, 63]
    assert drawn["continuation"][["pitch", "velocity"]].tolist() == [(60, own[1]), (64, 63)]


@pytest.mark.parametrize("ended", [[], ["NoteOn_48", "Velocity_63", "TimeShift_1.0.50", "NoteOff_48"]])
def test_a_note_of_the_prompt_that_ends_in_the_continuation_stays_the_prompts(ended):
    """MIDILike: the prompt breaks off while 60 sounds, and the model strikes it again before it ends."""
    words = vocabulary_of("midilike")
    half = "TimeShift_1.0.50"
    prompt = ["BOS_None", *ended, "NoteOn_60", "Velocity_63"]
    made = ["NoteOn_60", "Velocity_127", half, "NoteOff_60", half, "NoteOff_60"]
    written = Pieces(*(np.array([words.ids[name] for name in names]) for names in (prompt, made)), words)
    (own,) = without(written.whole, written.given, 0).tracks[0].notes
    assert own.velocity == 127
    assert written.prompt_notes == 1 + bool(ended)


def test_a_note_within_which_a_saved_stream_was_cut_is_the_continuations():
    tsd = vocabulary_of("tsd")
    whole = [tsd.bos_id, *note(tsd, 48, 63, "1.0.50"), *note(tsd, 60, 63, "1.0.50")]
    for cut in (4, 5, 6):
        written = Pieces(np.array(whole[:cut]), np.array(whole[cut:]), tsd)
        assert written.prompt_notes == 1
        assert [n.pitch for n in without(written.whole, written.given, 0).tracks[0].notes] == [60]


def test_as_many_notes_are_the_prompts_as_it_has():
    chord = [(0, 60, 64, 10), (0, 60, 64, 10), (0, 60, 64, 20), (0, 60, 70, 10), (5, 60, 64, 10)]
    assert of_prompt(chord, []) == [False] * 5
    assert of_prompt(chord, chord) == [True] * 5
    assert of_prompt(chord, chord[:1]) == [True, False, False, False, False]
    assert of_prompt(chord, [chord[2], chord[0]]) == [True, False, True, False, False]
    assert of_prompt(chord, [chord[3], (5, 60, 64, 99)]) == [False, False, False, True, True]


def test_a_note_that_playing_breaks_off_in_is_neither_written_nor_counted():
    tsd = vocabulary_of("tsd")
    ids = tsd.ids
    take = Take(np.array([tsd.bos_id]), tsd, None)
    made = [ids[name] for name in ("Pitch_60", "Velocity_63", "Duration_1.0.50", "Pitch_64", "Velocity_63")]
    counted = []
    for token in made:
        take.push(token)
        counted.append(take.played.notes)
    assert counted == [0, 0, 1, 1, 1]
    assert len(take.score([tsd.bos_id, *made]).whole.tracks[0].notes) == 1


def test_the_pedal_of_the_prompt_is_held_over_the_seam_and_let_up_where_it_is() -> None:
    """Down at 0 s, the seam at 1 s, up at 1.5 s, down again at 2 s to the end: in the whole and in the continuation."""
    vocabulary = vocabulary_of("tsd_pedal")
    ids = vocabulary.ids
    half = ids["TimeShift_1.0.50"]

    def half_second(pitch: int) -> list[int]:
        return [ids[f"Pitch_{pitch}"], vocabulary.ids["Velocity_63"], ids["Duration_1.0.50"]]

    prompt = [ids["BOS_None"], ids["Pedal_0"], *half_second(60), half, *half_second(64), half]
    made = [*half_second(67), half, ids["PedalOff_0"], half, ids["Pedal_0"], *half_second(60), half]
    written = Pieces(np.array(prompt), np.array(made), vocabulary)
    tick = 1 / (2 * written.whole.ticks_per_quarter)

    def seconds(score) -> list[tuple[float, float]]:
        return [(pedal.time * tick, pedal.duration * tick) for pedal in score.tracks[0].pedals]

    assert seconds(decode(prompt, vocabulary)) == [(0, 1)]  # nothing lets it up, so it is held as long as the notes
    assert seconds(written.whole) == [(0, 1.5), (2, 0.5)]
    alone = without(written.whole, written.given, round(1 / tick))
    assert seconds(alone) == [(0, 0.5), (1, 0.5)]
    assert [(n.time * tick, n.duration * tick, n.pitch) for n in alone.tracks[0].notes] == [(0, 0.5, 67), (1, 0.5, 60)]
