"""What is drawn without PyTorch is what is drawn with it: the numbers of a seed, the tokens of the numbers."""

import math

import numpy as np
import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.generation import sampling as on_tensors
from dsmr.generation.drawing import STATE_BYTES, Noise, Sampling, draw

DRAWN = 1300  # the twister begins anew after 624


@pytest.mark.parametrize("seed", [0, 1, 5489, 2**32 + 7, 2**63 - 1])
def test_a_seed_gives_the_numbers_that_pytorch_draws(seed):
    noise, generator = Sampling(seed=seed).noise(), Sampling(seed=seed).generator()
    drawn = [noise.draw() for _ in range(DRAWN)]
    assert drawn == [float(torch.rand((), generator=generator)) for _ in range(DRAWN)]
    assert 0 <= min(drawn) < 0.01 < 0.99 < max(drawn) < 1


@pytest.mark.parametrize("after", [0, 1, 300, 623, 624, 625, 1248])
def test_a_state_goes_on_in_either(after):
    noise, generator = Noise(7), torch.Generator().manual_seed(7)
    for _ in range(after):
        noise.draw()
        torch.rand((), generator=generator)
    assert len(noise.get_state()) == STATE_BYTES == len(generator.get_state())
    taken, given = Noise.of_state(generator.get_state().numpy()), torch.Generator()
    given.set_state(torch.from_numpy(noise.get_state()))
    following = [float(torch.rand((), generator=generator)) for _ in range(700)]
    assert [taken.draw() for _ in range(700)] == following
    assert [float(torch.rand((), generator=given)) for _ in range(700)] == following


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match=f"has {STATE_BYTES} bytes, got 3"):
        Noise.of_state(np.zeros(3, np.uint8))
    with pytest.raises(ValueError, match="Mersenne Twister"):
        Noise.of_state(np.full(STATE_BYTES, 255, np.uint8))


def test_rows_draw_as_streams_of_their_own_seeds_and_no_seed_is_a_fresh_one():
    assert Sampling(seed=5).noise(3).draw() == Sampling(seed=8).noise().draw()
    assert Sampling().noise().draw() != Sampling().noise().draw()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=1e-9),
        Sampling(top_k=5),
        Sampling(top_k=999),
        Sampling(top_p=0.98),
        Sampling(top_p=1e-9),
        Sampling(min_p=0.1),
        Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05),
    ],
)
def test_the_same_token_is_drawn_as_from_tensors(sampling):
    rng = np.random.default_rng(0)
    for _ in range(60):
        logits = (3 * rng.normal(size=(4, 300))).astype(np.float32)
        allowed = rng.random((4, 300)) < 0.5
        noise = rng.random(4).astype(np.float32)
        ours = draw(logits, sampling, allowed, noise)
        theirs = on_tensors.draw(
            *(torch.from_numpy(logits), sampling, torch.from_numpy(allowed)), torch.from_numpy(noise)
        )
        assert ours.tolist() == theirs.tolist()
        assert allowed[np.arange(4), ours].all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_sentence(bad):
    logits = np.zeros((2, 5), np.float32)
    logits[1, 2] = bad
    with pytest.raises(UserError, match="not finite"):
        draw(logits, Sampling(), None, np.zeros(2, np.float32))
    logits[1, 2] = -math.inf
    assert draw(logits, Sampling(), None, np.zeros(2, np.float32)).tolist() == [0, 0]
