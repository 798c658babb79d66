"""An exported model plays what the model itself plays: the same tokens of the same seed, one stream or several, kept
for another day by the one and played on by the other."""

import shutil

import numpy as np
import pytest
from tiny_corpus import tiny_vocabulary

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from small_export import exported, small_run

from dsmr.console.errors import UserError
from dsmr.export.write import export_run
from dsmr.exported.model import ExportedModel
from dsmr.generation.drawing import Sampling
from dsmr.generation.engines import load_run
from dsmr.generation.player import Limits, Player
from dsmr.generation.saved_stream import load_player, save_player
from dsmr.live.play import perform
from dsmr.music.sounding import OFF, ON

WORDS = tiny_vocabulary()
PROMPT = [WORDS.bos_id, 5, 16, 20, 24, 7]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("pair"), {"recall": 2})


@pytest.mark.parametrize(
    "sampling", [Sampling(seed=1, top_p=0.98), Sampling(seed=2, top_k=5, min_p=0.02, temperature=0.8), Sampling(seed=3)]
)
def test_a_seed_gives_the_same_tokens(sampling, pair):
    played = [list(Player.begin(model, PROMPT, sampling, WORDS, variations=2).play(250)) for model in pair]
    assert played[0] == played[1]
    assert len({tokens for made in played[0] for tokens in made}) > 10


def test_limits_and_greed_are_the_same(pair):
    for sampling, limits in ((Sampling(temperature=0), Limits(notes=20)), (Sampling(seed=4), Limits(seconds=9.0))):
        played = [list(Player.begin(model, PROMPT, sampling, WORDS).play(limits=limits)) for model in pair]
        assert played[0] == played[1]
        assert len(played[0]) > 5


def test_without_a_vocabulary_and_with_a_long_prompt(pair):
    prompt = np.random.default_rng(0).integers(0, WORDS.size, 90)
    played = [list(Player.begin(model, prompt, Sampling(seed=5)).play(40)) for model in pair]
    assert played[0] == played[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1)])
def test_a_kept_stream_is_played_on_by_either(order, pair, tmp_path):
    whole = list(Player.begin(pair[0], PROMPT, Sampling(seed=3), WORDS, variations=2).play(120))
    player = Player.begin(pair[order[0]], PROMPT, Sampling(seed=3), WORDS, variations=2)
    first = list(player.play(50))
    save_player(tmp_path / "stream", player)
    assert first + list(load_player(tmp_path / "stream", pair[order[1]], WORDS, dtype="float32").play(70)) == whole


def test_an_int8_memory_is_kept_with_its_export(pair, tmp_path):
    options = {"weights": "int8", "memory_dtype": "int8"}
    model, export = exported(tmp_path, {"recall": 2}, **options)
    whole = list(Player.begin(export, PROMPT, Sampling(seed=3), WORDS).play(120))
    player = Player.begin(export, PROMPT, Sampling(seed=3), WORDS)
    first = list(player.play(50))
    save_player(tmp_path / "stream", player)
    again = load_player(tmp_path / "stream", export, WORDS)
    assert again.dtype == "int8"
    assert first + list(again.play(70)) == whole
    for other in (model, pair[1]):
        with pytest.raises(UserError, match="stream"):
            load_player(tmp_path / "stream", other, WORDS)


@pytest.mark.slow
def test_an_export_plays_in_real_time(pair):
    """Through a port, each note ended, and the notes are those of the run."""

    class Port(list):
        send = list.append

    heard = []
    for model in pair:
        port = Port()
        done = perform(Player.begin(model, PROMPT, Sampling(seed=8), WORDS), port, Limits(notes=4), look_ahead=0.05)
        assert done.notes >= 4
        assert not done.interrupted
        assert sum(event.kind == ON for event in port) >= sum(event.kind == OFF for event in port) >= 4
        heard.append([(event.kind, event.pitch, event.velocity) for event in port])
    assert heard[0] == heard[1]


def test_an_export_of_another_model_is_refused(pair, tmp_path):
    player = Player.begin(pair[1], PROMPT, Sampling(seed=3), WORDS)
    list(player.play(9))
    save_player(tmp_path / "stream", player)
    _, other = exported(tmp_path, {"recall": 2, "rope_base": 9.0})
    with pytest.raises(UserError, match="stream is the state of another model"):
        load_player(tmp_path / "stream", other, WORDS)
    (tmp_path / "noise").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="noise is not a saved state"):
        load_player(tmp_path / "noise", other, WORDS)


def test_what_an_export_was_not_made_with_is_a_sentence(pair):
    with pytest.raises(UserError, match="remembers in float32, not in 'int8'"):
        Player.begin(pair[1], PROMPT, memory_dtype="int8")


def test_the_engine_is_chosen_by_what_the_folder_holds(tmp_path):
    small_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "export")
    assert isinstance(load_run(tmp_path / "export")[0], ExportedModel)
    assert not isinstance(load_run(tmp_path / "run")[0], ExportedModel)
    for folder, how, said in (
        ("run", {"engine": "onnx"}, "run holds no exported model: make one with dsmr export"),
        ("export", {"engine": "torch"}, "export holds an exported model, which ONNX Runtime plays"),
        ("export", {"engine": "abacus"}, "unknown engine 'abacus': use one of auto, torch, onnx"),
        ("export", {"device": "cuda"}, "plays on the CPU, not on 'cuda'"),
    ):
        with pytest.raises(UserError, match=said):
            load_run(tmp_path / folder, **how)


def test_an_export_is_not_made_of_one_nor_over_one_nor_over_a_run(tmp_path):
    small_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "export")
    before = (tmp_path / "export" / "export.json").read_bytes()
    small_run(tmp_path / "another")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.onnx").write_bytes(b"of somebody else")
    for run, out, options, said in (
        ("export", "other", {}, "export is an exported model already"),
        ("run", "export", {}, "already holds an exported model: give --overwrite"),
        ("run", "run", {}, r"run/model\.onnx is the run's"),
        ("run", "other", {"weights": "int4"}, "unknown weights 'int4' of an export: use one of float32, int8"),
        ("run", "other", {"memory_dtype": "bfloat16"}, "unknown memory dtype 'bfloat16'"),
        ("run", "other", {"portable": True, "memory_dtype": "int8"}, "--portable remembers in float32"),
        ("run", "other", {"calibrate": ["a.mid"]}, "--calibrate measures for an int8 memory"),
        ("nowhere", "other", {}, "nowhere is not a run directory"),
        ("run", "taken", {}, r"taken/model\.onnx is there already"),
        ("run", "taken", {"overwrite": True}, r"taken/model\.onnx is there already, of something else"),
        ("run", "another", {"overwrite": True}, r"another/tokenizer\.json is there already, of something else"),
    ):
        with pytest.raises(UserError, match=said):
            export_run(tmp_path / run, tmp_path / out, **options)
    assert not (tmp_path / "other").exists()
    export_run(tmp_path / "run", tmp_path / "export", overwrite=True)
    assert (tmp_path / "export" / "export.json").read_bytes() == before  # the same in, the same out


def test_foreign_and_mixed_files_are_sentences(tmp_path):
    small_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "export")
    small_run(tmp_path / "run", rope_base=9.0)
    export_run(tmp_path / "run", tmp_path / "other")

    def refused(**files: bytes) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "export", tmp_path / "copy")
        for name, content in files.items():
            (tmp_path / "copy" / name.replace("_", ".")).write_bytes(content)
        with pytest.raises(UserError) as caught:
            ExportedModel.load(tmp_path / "copy")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "model.onnx is damaged, or of another export" in refused(
        model_onnx=(tmp_path / "other" / "model.onnx").read_bytes()
    )
    assert "export.json does not describe an exported model" in refused(export_json=b'{"kind": "something"}')
    assert "is not a JSON file" in refused(export_json=b"PK")
    assert "tokenizer.json" in refused(tokenizer_json=b"{}")
    other = tiny_vocabulary(more="than the other")
    other.save(tmp_path / "words.json")
    assert "is not the tokeniser" in refused(tokenizer_json=(tmp_path / "words.json").read_bytes())
