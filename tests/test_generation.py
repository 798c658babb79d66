"""Sampling keeps its promises; streaming stays in bounded memory, obeys the grammar and stops where asked."""

import itertools
import math

import pytest
import torch

from dsmr.errors import UserError
from dsmr.generation import Sampling, probabilities, sample

LOGITS = torch.tensor([3.0, 1.0, 2.0, -1.0, 2.5])


# --- sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"min_p": -0.5}, "min_p must lie between"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Sampling(**arguments)


def test_temperature_zero_is_greedy_and_a_tiny_one_nearly_so():
    assert int(sample(LOGITS, Sampling(temperature=0))) == 0
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=1e-9))[0], torch.tensor(1.0))


def test_plain_sampling_is_softmax():
    torch.testing.assert_close(probabilities(LOGITS, Sampling()), LOGITS.softmax(-1))
    torch.testing.assert_close(probabilities(LOGITS, Sampling(temperature=2.0)), (LOGITS / 2).softmax(-1))


def kept(**arguments) -> list[int]:
    return probabilities(LOGITS, Sampling(**arguments)).nonzero().flatten().tolist()


def test_filters_keep_what_they_say():
    assert kept(top_k=2) == [0, 4]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    chances = LOGITS.softmax(-1)
    assert kept(top_p=float(chances[0]) - 1e-3) == [0]
    assert kept(top_p=float(chances[0]) + 1e-3) == [0, 4]
    assert kept(top_p=1e-9) == [0]
    assert kept(min_p=math.exp(-1.0) * 0.99) == [0, 2, 4]
    assert kept(min_p=1.0) == [0]


def test_filters_renormalise_over_what_is_left():
    chances = probabilities(LOGITS, Sampling(top_k=2))
    torch.testing.assert_close(chances[[0, 4]], LOGITS[[0, 4]].softmax(-1))


def test_forbidden_tokens_are_never_drawn():
    allowed = torch.tensor([False, True, False, True, False])
    for sampling in (Sampling(seed=1), Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0.1)):
        generator = sampling.generator()
        drawn = {int(sample(LOGITS, sampling, allowed, generator)) for _ in range(50)}
        assert drawn <= {1, 3}
    with pytest.raises(ValueError, match="no token"):
        sample(LOGITS, Sampling(), torch.zeros(5, dtype=torch.bool))


def test_rows_are_drawn_each_for_itself_and_seeds_repeat():
    logits = LOGITS.expand(7, 3, 5)
    sampling = Sampling(seed=5)
    first = sample(logits, sampling, generator=sampling.generator())
    assert first.shape == (7, 3)
    assert first.dtype == torch.int64
    assert torch.equal(first, sample(logits, sampling, generator=sampling.generator()))
    assert not torch.equal(first, sample(logits, sampling, generator=Sampling(seed=6).generator()))


def test_draws_follow_the_distribution():
    sampling = Sampling(seed=0, temperature=1.5)
    drawn = sample(LOGITS.expand(20000, 5), sampling, generator=sampling.generator())
    counts = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(counts, probabilities(LOGITS, sampling), atol=0.02, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_a_sentence(bad):
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(UserError, match="not finite"):
        sample(logits, Sampling())
