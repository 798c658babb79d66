"""The vocabulary says the same as MidiTok about every token, and its grammar lets nothing pass that cannot decode."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_scores import random_score, score_of

from dsmr.console.errors import UserError
from dsmr.music.tokenizer import SCHEMES, build_tokenizer, decode, encode_score, vocabulary_of
from dsmr.music.vocabulary import StreamClock, Vocabulary

ALL = pytest.mark.parametrize("name", list(SCHEMES))


def whole(tokens: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    return np.concatenate([[vocabulary.bos_id], tokens, [vocabulary.eos_id]]).astype(np.int64)


@ALL
def test_a_vocabulary_survives_its_file(name: str, tmp_path: Path) -> None:
    words = vocabulary_of(name)
    words.save(tmp_path / "tokenizer.json")
    again = Vocabulary.load(tmp_path / "tokenizer.json")
    assert again == words
    assert again.hash == words.hash
    assert again.tokens == words.tokens
    assert len({vocabulary_of(other).hash for other in SCHEMES}) == len(SCHEMES)


def test_a_changed_or_foreign_file_is_refused(tmp_path: Path) -> None:
    value = vocabulary_of("tsd").to_json()
    value["tokens"][10], value["tokens"][11] = value["tokens"][11], value["tokens"][10]
    path = tmp_path / "tokenizer.json"
    for content, said in (
        (json.dumps(value), "was changed"),
        ('{"a": 1}', "not a dsmr vocabulary"),
        ("{", "not a JSON"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said) as caught:
            Vocabulary.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        Vocabulary.load(tmp_path / "absent.json")


def test_the_default_is_the_ten_millisecond_grid_of_the_design() -> None:
    words = vocabulary_of("tsd")
    assert words.tokens[:3] == ("PAD_None", "BOS_None", "EOS_None")
    assert (words.pad_id, words.bos_id, words.eos_id) == (0, 1, 2)
    assert words.ticks_per_second == 100
    assert words.of_type("Velocity").sum() == 32
    assert words.of_type("Pitch").sum() == 88
    assert words.of_type("Duration").sum() == words.of_type("TimeShift").sum() == 99 + 18 * 10 + 1
    assert words.ticks[words.ids["TimeShift_1.2.50"]] == 52
    assert words.ticks[words.ids["Duration_19.9.10"]] == 995
    assert words.pitch[words.ids["Pitch_60"]] == 60
    assert words.pitch[words.ids["Velocity_63"]] == -1


def test_nothing_needs_miditok_to_read_a_prepared_corpus() -> None:
    code = (
        "import sys, dsmr.corpus.pack, dsmr.corpus.prepare, dsmr.corpus.store, dsmr.music.augment, dsmr.music.grammar\n"
        "loaded = {'miditok', 'symusic', 'torch', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@ALL
def test_the_clock_gives_the_onsets_that_miditok_decodes(name: str) -> None:
    words = vocabulary_of(name)
    tokens, report = encode_score(random_score(3), build_tokenizer(name))
    piece = whole(tokens, words)
    clock = words.clock(piece)
    decoded = sorted(note.time / 100 for note in decode(piece, words).tracks[0].notes)
    np.testing.assert_allclose(clock[words.is_note[piece]], decoded, atol=1e-9)
    assert np.all(np.diff(clock) >= 0)
    assert words.count_notes(piece) == report.n_notes == len(decoded)
    stream = StreamClock(words)
    np.testing.assert_array_equal(clock, [stream.push(int(token)) for token in piece])


@ALL
def test_the_clock_starts_again_at_every_piece(name: str) -> None:
    words, tokenizer = vocabulary_of(name), build_tokenizer(name)
    pieces = [whole(encode_score(random_score(seed, 30), tokenizer)[0], words) for seed in (1, 2)]
    both = words.clock(np.concatenate(pieces))
    np.testing.assert_array_equal(both, np.concatenate([words.clock(piece) for piece in pieces]))
    stream = StreamClock(words)
    assert stream.extend(np.concatenate(pieces).tolist()) == words.clock(pieces[1])[-1]


def test_the_clock_of_nothing_is_nothing() -> None:
    assert vocabulary_of("tsd").clock([]).shape == (0,)


@ALL
@pytest.mark.parametrize("strict", [False, True])
def test_every_sampled_sequence_decodes_and_keeps_its_notes(name: str, strict: bool) -> None:
    words = vocabulary_of(name)
    complete = words.of_type("Duration") if "Duration" in words.type_names else words.of_type("Velocity")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        grammar, tokens = words.grammar(), [words.bos_id]
        while len(tokens) < 1500 or not complete[tokens[-1]]:
            allowed = (grammar.allowed() if strict else words.allowed_after(tokens[-1])).copy()
            allowed[words.eos_id] = False
            tokens.append(int(rng.choice(np.flatnonzero(allowed))))
            grammar.push(tokens[-1])
        score = decode(tokens, words)
        assert len(score.tracks[0].notes) == words.count_notes(tokens) > 100
        assert all(note.duration > 0 and note.time >= 0 for note in score.tracks[0].notes)


@ALL
def test_every_encoded_piece_keeps_to_both_grammars(name: str) -> None:
    words, tokenizer = vocabulary_of(name), build_tokenizer(name)
    repeated = score_of([(0.0, 3.0, 60), (1.0, 1.0, 60), (1.0, 1.0, 60), (25.0, 30.0, 61), (25.5, 0.0, 61)])
    for score in (random_score(0), random_score(1), repeated, score_of([(7.0, 0.001, 21)])):
        piece = whole(encode_score(score, tokenizer)[0], words)
        grammar = words.grammar()
        for previous, token in itertools.pairwise(piece):
            names = f"{words.tokens[token]} after {words.tokens[previous]}"
            assert words.allowed_after(int(previous))[token], names
            assert grammar.allowed()[token], names
            grammar.push(int(token))


@ALL
def test_no_token_is_a_dead_end_and_none_leads_to_padding(name: str) -> None:
    words = vocabulary_of(name)
    for token in range(words.size):
        allowed = words.allowed_after(token)
        assert allowed.shape == (words.size,)
        assert not allowed[words.pad_id]
        assert not allowed[words.bos_id]
        assert allowed.any() == (token not in (words.pad_id, words.eos_id))
    with pytest.raises(ValueError, match=f"{words.size}"):
        words.allowed_after(words.size)


def test_the_strict_grammar_ends_only_what_sounds() -> None:
    words = vocabulary_of("midilike")
    on, off, shift = words.ids["NoteOn_60"], words.ids["NoteOff_60"], words.ids["TimeShift_0.1.50"]
    grammar = words.grammar()
    grammar.extend([words.bos_id, shift])
    assert not grammar.allowed()[words.of_type("NoteOff")].any()
    grammar.extend([on, words.ids["Velocity_63"], shift])
    assert np.flatnonzero(grammar.allowed() & words.of_type("NoteOff")).tolist() == [off]
    grammar.extend([words.ids["NoteOn_62"], words.ids["Velocity_63"], shift, off])
    assert not grammar.allowed()[words.eos_id]
    grammar.push(words.ids["NoteOff_62"])
    assert grammar.allowed()[words.eos_id]


def test_the_strict_grammar_moves_remi_only_forward() -> None:
    words = vocabulary_of("remi")
    grammar = words.grammar()
    grammar.extend(words.ids[t] for t in ("BOS_None", "Bar_None", "Position_150", "Pitch_60", "Velocity_63"))
    grammar.push(words.ids["Duration_1.0.50"])
    positions = grammar.allowed() & words.of_type("Position")
    assert np.flatnonzero(positions).min() == words.ids["Position_151"]
    grammar.push(words.ids["Bar_None"])
    assert grammar.allowed()[words.ids["Position_0"]]


def test_the_strict_grammar_knows_the_pedal() -> None:
    words = vocabulary_of("tsd_pedal")
    grammar = words.grammar()
    down, up = words.ids["Pedal_0"], words.ids["PedalOff_0"]
    assert grammar.allowed()[[down, up]].tolist() == [True, False]
    grammar.push(down)
    grammar.push(words.ids["TimeShift_1.0.50"])
    assert grammar.allowed()[[down, up]].tolist() == [False, True]


def test_a_vocabulary_without_padding_first_is_refused() -> None:
    with pytest.raises(ValueError, match="PAD_None"):
        Vocabulary("TSD", ("BOS_None", "PAD_None", "EOS_None"), 100, {})
    with pytest.raises(ValueError, match="once"):
        Vocabulary("TSD", ("PAD_None", "BOS_None", "EOS_None", "Pitch_60", "Pitch_60"), 100, {})
    with pytest.raises(ValueError, match="Chord"):
        Vocabulary("TSD", ("PAD_None", "BOS_None", "EOS_None", "Chord_min"), 100, {}).allowed_after(1)
