"""Played token by token, a model whose layers keep other than the newest tokens sees what it saw in training."""

import pytest
import torch

from dsmr.generation.player import Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.saved_stream import load_player, save_player
from dsmr.generation.stepping import PlainStep, Step, stepper
from dsmr.generation.stepping.captured import CapturedStep
from dsmr.generation.stepping.rings import DeviceRings, HostRings
from dsmr.generation.stepping.step import attentions
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

LENGTH, TOKENS = 8, 90
SCHEDULES = ("explicit(horizons=[13, 5, 0], retention=uniform)", "explicit(horizons=[13, 5, 6], retention=random)")
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=["uniform", "random"])


def small_model(schedule: str, **changes) -> DSMRModel:
    torch.manual_seed(0)
    options = {"d_model": 32, "n_heads": 4, "segment_length": LENGTH, "init_std": 0.15}
    return DSMRModel(DSMRConfig(23, schedule, **(options | changes))).eval()


def some_tokens(rows: int = 2, count: int = TOKENS) -> torch.Tensor:
    return torch.randint(23, (rows, count), generator=torch.Generator().manual_seed(1))


def on_device(model, state):
    rings = DeviceRings(attentions(model), state)
    step = Step(model, state, rings, "float32")

    def call(tokens):
        rings.begin()
        found = step(tokens)
        state.offset = (state.offset + 1) % LENGTH  # as the captured step counts it
        return found

    return call


WAYS = {
    "fast": lambda model, state: Step(model, state, HostRings(attentions(model), state), "float32"),
    "on device": on_device,
    "captured": lambda model, state: CapturedStep(model, state, "float32"),
    "plain": PlainStep,
}


@schedules
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("more", [{}, {"recall": 2, "position": "sinusoidal"}], ids=["rope", "recall"])
def test_steps_equal_the_whole_piece_call(schedule, way, dtype, more):
    model, tokens = small_model(schedule, **more), some_tokens()
    with torch.no_grad():
        whole = model(tokens, model.new_state(2, dtype=dtype)).logits
        state = model.new_state(2, dtype=dtype)
        model(tokens[:, :19], state)
        step = WAYS[way](model, state)
        stepped = torch.stack([step(tokens[:, i]).clone() for i in range(19, TOKENS)], 1)
    assert state.position.tolist() == [TOKENS] * 2
    if dtype is None:
        torch.testing.assert_close(stepped, whole[:, 19:], atol=1e-4, rtol=0)
    else:  # where a step and a call round to different sides in eight bits
        size = whole.square().mean().sqrt()
        assert (stepped - whole[:, 19:]).square().mean().sqrt() / size < 1e-3


@schedules
def test_calls_and_steps_take_turns(schedule):
    model, tokens = small_model(schedule, recall=2), some_tokens(1)
    with torch.no_grad():
        whole = model(tokens).logits
        state, parts = model.new_state(1), []
        for start, stop, stepping in ((0, 37, False), (37, 56, True), (56, 71, False), (71, 80, True), (80, 90, False)):
            if stepping:
                step = stepper(model, state)
                parts += [step(tokens[:, i]).clone()[:, None] for i in range(start, stop)]
            else:
                parts.append(model(tokens[:, start:stop], state).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)


@schedules
def test_the_captured_step_draws_what_the_plain_one_draws(schedule):
    model = small_model(schedule)
    found = []
    for make in (WAYS["captured"], WAYS["plain"]):
        state = model.new_state(2)
        with torch.no_grad():
            model(some_tokens(count=5), state)
        step, tokens, drawn = make(model, state), torch.tensor([3, 4]), []
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            tokens = step.next(tokens, Sampling(), None, torch.rand(2, generator=generator))
            drawn.append(tokens.tolist())
        found.append(drawn)
    assert found[0] == found[1]


@schedules
@pytest.mark.parametrize("first", [11, 8, 40])
def test_a_saved_stream_plays_on_and_variations_are_streams_alone(schedule, first, tmp_path):
    model, sampling = small_model(schedule), Sampling(seed=5)
    whole = list(Player.begin(model, [1, 2], sampling, variations=2).play(70))
    player = Player.begin(model, [1, 2], sampling, variations=2)
    begun = list(player.play(first))
    save_player(tmp_path / "streams", player)
    assert begun + list(load_player(tmp_path / "streams", model).play(70 - first)) == whole
    for row in range(2):
        alone = Player.begin(model, [1, 2], Sampling(seed=5 + row)).play(70)
        assert [token for (token,) in alone] == [tokens[row] for tokens in whole]
    eight_bits = Player.begin(model, [1, 2], sampling, dtype="int8", memory_dtype="int8")
    assert len(list(eight_bits.play(40))) == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph, and there is no GPU")
@schedules
def test_a_replayed_graph_draws_what_the_plain_step_draws(schedule):
    model = small_model(schedule).cuda()
    found = []
    for make in (WAYS["captured"], WAYS["plain"]):
        state = model.new_state(2)
        with torch.no_grad():
            model(some_tokens(count=5).cuda(), state)
        step, tokens, drawn = make(model, state), torch.tensor([3, 4]), []
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            tokens = step.next(tokens, Sampling(), None, torch.rand(2, generator=generator))
            drawn.append(tokens.tolist())
        if make is WAYS["captured"]:
            assert step.graph is not None
        found.append(drawn)
    assert found[0] == found[1]
