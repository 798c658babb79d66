"""A stream kept in a file plays on as if it had never stopped; another model's file is refused in a sentence."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsmr.console.errors import UserError
from dsmr.generation.player import Limits, Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.saved_stream import fingerprint, load_player, save_player
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel


@pytest.fixture(scope="module")
def tsd():
    pytest.importorskip("miditok")
    from dsmr.music.tokenizer import vocabulary_of

    return vocabulary_of("tsd")


def small_model(size: int, seed: int = 0) -> DSMRModel:
    torch.manual_seed(seed)
    schedule = "two_scale(layers=3, long=40, short=9, n_long=1)"
    return DSMRModel(
        DSMRConfig(size, schedule, d_model=16, n_heads=2, segment_length=12, recall=2, init_std=0.2)
    ).eval()


STOPS = {
    "tokens": {"max_tokens": 61},
    "seconds": {"limits": Limits(seconds=60.0)},  # a token is drawn and waits
    "notes": {"limits": Limits(notes=5)},
    "at once": {"max_tokens": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_playing_on_after_loading_gives_the_tokens_that_would_have_come(stop, dtype, tsd, tmp_path):
    model, sampling = small_model(tsd.size), Sampling(seed=3, top_p=0.95)
    never_stopped = Player.begin(model, [tsd.bos_id], sampling, tsd, dtype=dtype)
    whole = [token for (token,) in never_stopped.play(200)]
    player = Player.begin(model, [tsd.bos_id], sampling, tsd, dtype=dtype)
    first = [token for (token,) in player.play(**STOPS[stop])]
    save_player(tmp_path / "stream", player)
    loaded = load_player(tmp_path / "stream", model, tsd)
    assert (loaded.sampling, loaded.dtype) == (sampling, dtype)
    rest = [token for (token,) in loaded.play(200 - len(first))]
    assert 0 < len(first) < 200
    assert first + rest == whole
    assert list(loaded.tokens[0]) == [tsd.bos_id, *whole]


def test_several_streams_are_kept_together(tmp_path):
    model = small_model(23)
    never_stopped = list(Player.begin(model, [1, 2], Sampling(seed=5), variations=3).play(90))
    player = Player.begin(model, [1, 2], Sampling(seed=5), variations=3)
    first = list(player.play(40))
    save_player(tmp_path / "streams", player)
    assert first + list(load_player(tmp_path / "streams", model, streams=3).play(50)) == never_stopped
    with pytest.raises(UserError, match="streams holds 3 streams, but 1 were asked for"):
        load_player(tmp_path / "streams", model, streams=1)


def test_a_variation_is_the_stream_of_its_own_seed():
    model = small_model(23)
    together = list(Player.begin(model, [1, 2], Sampling(seed=5), variations=3).play(60))
    for row in range(3):
        alone = Player.begin(model, [1, 2], Sampling(seed=5 + row)).play(60)
        assert [token for (token,) in alone] == [tokens[row] for tokens in together]
    assert len({tuple(tokens[row] for tokens in together) for row in range(3)}) == 3


def test_streams_that_end_at_different_times_end_each_for_itself(tsd, tmp_path):
    model = small_model(tsd.size)
    player = Player.begin(model, [tsd.bos_id], Sampling(seed=5), tsd, variations=3)
    made = list(player.play(limits=Limits(seconds=5.0)))
    lengths = [sum(tokens[row] is not None for tokens in made) for row in range(3)]
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        assert all(tokens[row] is None for tokens in made[length:])
        alone = Player.begin(model, [tsd.bos_id], Sampling(seed=5 + row), tsd)
        assert [token for (token,) in alone.play(limits=Limits(seconds=5.0))] == [t[row] for t in made[:length]]
    with pytest.raises(UserError, match="ended before the others"):
        save_player(tmp_path / "streams", player)


def test_what_does_not_belong_together_is_refused_in_a_sentence(tsd, tmp_path):
    model = small_model(tsd.size)
    player = Player.begin(model, [tsd.bos_id], Sampling(seed=3), tsd)
    with pytest.raises(UserError, match="nothing has been played yet"):
        save_player(tmp_path / "early", player)
    list(player.play(9))
    save_player(tmp_path / "stream", player)
    with pytest.raises(UserError, match="stream is the state of another model"):
        load_player(tmp_path / "stream", small_model(tsd.size, seed=1), tsd)
    with pytest.raises(UserError, match="stream is the state of another tokeniser"):
        load_player(tmp_path / "stream", model, None)
    with pytest.raises(UserError, match="missing is not a saved state"):
        load_player(tmp_path / "missing", model, tsd)
    (tmp_path / "noise").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="noise is not a saved state"):
        load_player(tmp_path / "noise", model, tsd)
    player.state.save(tmp_path / "bare")
    with pytest.raises(UserError, match="bare is not a stream saved by"):
        load_player(tmp_path / "bare", model, tsd)
    with safe_open(tmp_path / "stream", "pt") as file:
        about = {key: value for key, value in file.metadata().items() if key != "seal"}
    save_file(load_file(tmp_path / "stream"), tmp_path / "typeless", about | {"dtype": "float33"})
    with pytest.raises(UserError, match="typeless is not a saved stream: unknown dtype 'float33'"):
        load_player(tmp_path / "typeless", model, tsd)
    player.state.aligned = True
    save_player(tmp_path / "segments", player)
    with pytest.raises(
        UserError, match="segments cannot be played on: its memories have no room for a segment in progress"
    ):
        load_player(tmp_path / "segments", model, tsd)
    player.state.aligned, player.state.offset = False, 12
    save_player(tmp_path / "beyond", player)
    with pytest.raises(UserError, match="beyond does not fit this model: it is 12 tokens into a segment of 12"):
        load_player(tmp_path / "beyond", model, tsd)
    with pytest.raises(ValueError, match="the state holds 2 streams, but 1 are to be played"):
        Player.begin(model, [1], state=model.new_state(2))


def test_a_fingerprint_tells_weights_and_configurations_apart():
    model = small_model(23)
    assert fingerprint(model) == fingerprint(small_model(23))
    with torch.no_grad():
        model.norm.weight[3] += 1e-6
    assert fingerprint(model) != fingerprint(small_model(23))


def test_an_ended_piece_has_nothing_to_play_on(tsd):
    model = small_model(tsd.size)
    with torch.no_grad():
        model.embedding.weight[tsd.eos_id] *= 30
    player = Player.begin(model, [tsd.bos_id], Sampling(seed=3), tsd)
    list(player.play(3000, stop_at_end=True))
    assert player.drawn is not None
    assert player.drawn.tolist() == [tsd.eos_id]
    with pytest.raises(UserError, match="has ended this piece"):
        next(player.play(1))
