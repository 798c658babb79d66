"""The prompt: where it ends, and what is said of what the tokens do not tell of its file."""

import pytest
from small_scores import score_of

pytest.importorskip("miditok")

from dsmr.generation.prompts import read_prompt, wait_until
from dsmr.music.tokenizer import decode, encode_midi, vocabulary_of, write_midi


def midi(folder, notes):
    write_midi(folder / "p.mid", score_of(notes))
    return folder / "p.mid"


@pytest.mark.parametrize("scheme", ["tsd", "midilike", "tsd_pedal"])
@pytest.mark.parametrize("asked", [1.5, 14.51, 20.0, 33.333])
def test_a_prompt_ends_in_the_second_asked_for_also_within_a_rest(scheme, asked, tmp_path):
    """`--prompt-seconds 20` in a rest went on at the note before it, at 14.5 s."""
    vocabulary = vocabulary_of(scheme)
    path = midi(tmp_path, [(0.0, 0.5, 60), (1.0, 0.5, 64), (14.5, 0.25, 67), (40.0, 1.0, 60)])
    prompt = read_prompt(path, vocabulary, asked)
    assert prompt.seconds == vocabulary.clock(prompt.tokens)[-1] == pytest.approx(asked, abs=0.01)
    assert prompt.seconds <= asked
    assert prompt.notices(path) == []
    assert len(decode(prompt.tokens, vocabulary).tracks[0].notes) == (2 if asked < 14 else 3)
    grammar = vocabulary.grammar()
    for token in prompt.tokens[1:].tolist():
        assert grammar.allowed()[token]
        grammar.push(token)
    assert grammar.allowed().any()


def test_a_rest_is_written_as_the_tokeniser_writes_it(tmp_path):
    vocabulary = vocabulary_of("tsd")
    encoded, _ = encode_midi(midi(tmp_path, [(0.0, 0.5, 60), (23.46, 0.5, 60)]), vocabulary)
    piece = [vocabulary.bos_id, *encoded.tolist()]
    rest = read_prompt(tmp_path / "p.mid", vocabulary, 23.46).tokens.tolist()
    assert piece[: len(rest)] == rest
    assert len(piece) == len(rest) + 3  # the second note


def test_remi_waits_for_whole_bars_and_says_where_it_goes_on(tmp_path):
    vocabulary = vocabulary_of("remi")
    path = midi(tmp_path, [(0.0, 0.5, 60), (1.0, 0.5, 64), (30.0, 1.0, 60)])
    assert read_prompt(path, vocabulary, 4.0).seconds == 4.0
    assert read_prompt(path, vocabulary, 4.0).notices(path) == []
    early = read_prompt(path, vocabulary, 5.0)
    assert early.seconds == 4.0
    assert len(decode(early.tokens, vocabulary).tracks[0].notes) == 2
    assert early.notices("a\nb.mid") == [
        "a\\nb.mid: the continuation begins at 4.00 s, not at 5 s, as this model's tokens name no moment between two "
        "bars without a note."
    ]


def test_a_rest_of_a_day_is_written_at_once_and_one_into_the_past_not_at_all(tmp_path):
    vocabulary = vocabulary_of("tsd")
    prompt = read_prompt(midi(tmp_path, [(0.0, 0.5, 60), (1.0, 0.5, 64)]), vocabulary, None).tokens
    assert vocabulary.clock(wait_until(prompt, vocabulary, 86_400))[-1] == 86_400
    assert wait_until(prompt, vocabulary, 0.5).tolist() == prompt.tolist()


def test_what_the_tokens_tell_otherwise_is_said(tmp_path):
    """Fifty notes of half a minute were ten seconds long, and nobody was told."""
    path = midi(tmp_path, [(0.5 * place, 30.0, 60 + place % 12) for place in range(50)] + [(1.0, 1.0, 5)])
    prompt = read_prompt(path, vocabulary_of("tsd"), None)
    assert len(prompt.report.changed) == 1
    left_out, changed = prompt.notices(path)
    assert left_out == f"{path}: 1 notes left out: pitch outside 21 to 108."
    assert changed == f"{path}: 50 notes changed: longer than 10 s (cut to it)."
