"""Sampling keeps its promises; streaming stays in bounded memory, obeys the grammar and stops where asked."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.generation.player import Sampling, may_stop, probabilities, sample, stream
from dsmr.generation.stepping import PlainStep

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
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 2**63}, "seed must be at least 0"),
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


# --- streaming, with a stand-in for the model that draws at random ------------------------------------------------


class Dice(torch.nn.Module):
    """Logits that depend on the last token only; counts its calls. `broken_after` tokens it answers NaN."""

    def __init__(self, size: int, segment_length: int = 8, broken_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size, size, generator=torch.Generator().manual_seed(0)) * 2)
        self.config = SimpleNamespace(vocab_size=size, segment_length=segment_length)
        self.broken_after = broken_after
        self.calls: list[int] = []

    def new_state(self, batch: int, dtype: torch.dtype | None = None) -> SimpleNamespace:
        return SimpleNamespace(batch=batch, nbytes=0)

    def forward(self, tokens: torch.Tensor, state: object) -> SimpleNamespace:
        assert not self.training
        self.calls.append(tokens.shape[1])
        logits = self.weight[tokens]
        if self.broken_after is not None and sum(self.calls) > self.broken_after:
            logits = logits * math.nan
        return SimpleNamespace(logits=logits, state=state)


@pytest.fixture(autouse=True)
def _plain_steps(monkeypatch):
    """The stand-in has no layers that a fast step could take apart."""
    monkeypatch.setattr("dsmr.generation.stepping.engine.stepper", lambda model, state, dtype: PlainStep(model, state))


@pytest.fixture(scope="module", params=["tsd", "tsd_pedal", "midilike", "remi"])
def vocabulary(request):
    pytest.importorskip("miditok")
    from dsmr.music.tokenizer import vocabulary_of

    return vocabulary_of(request.param)


def test_the_prompt_goes_in_by_segments_and_the_rest_token_by_token():
    model = Dice(11, segment_length=8).train()
    made = list(stream(model, torch.arange(10).repeat(2), max_tokens=5))
    assert len(made) == 5
    assert model.calls == [8, 8, 4, 1, 1, 1, 1]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_stream_has_no_cap_and_may_be_left_at_any_time():
    model = Dice(11).train()
    playing = stream(model, [1], Sampling(seed=3))
    first = list(itertools.islice(playing, 3000))
    assert len(first) == 3000
    playing.close()
    assert model.training
    assert first[:50] == list(stream(model, [1], Sampling(seed=3), max_tokens=50))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [11]}, "from 0 to 10, got 11 to 11"),
        ({"prompt": [1], "max_tokens": -1}, "max_tokens must be 0 or more"),
        ({"prompt": [1], "seconds": 3.0}, "need a vocabulary"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_at_once(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        stream(Dice(11), **arguments)


def test_a_vocabulary_of_another_size_is_refused(vocabulary):
    with pytest.raises(ValueError, match=r"the model has 11 tokens and the vocabulary \d+"):
        stream(Dice(11), [1], vocabulary=vocabulary)


def test_every_token_obeys_the_grammar_and_end_is_not_drawn(vocabulary):
    made = list(stream(Dice(vocabulary.size), [vocabulary.bos_id], Sampling(seed=1), vocabulary, max_tokens=800))
    assert len(made) == 800
    grammar = vocabulary.grammar()
    for token in made:
        assert grammar.allowed()[token]
        grammar.push(token)
    assert vocabulary.eos_id not in made


def test_a_length_in_seconds_is_reached_and_not_passed(vocabulary):
    prompt = [vocabulary.bos_id]
    prompt += list(stream(Dice(vocabulary.size), prompt, Sampling(seed=1), vocabulary, notes=3))
    made = list(stream(Dice(vocabulary.size), prompt, Sampling(seed=2), vocabulary, seconds=20.0))
    clock = vocabulary.clock(prompt + made)
    played = clock[-1] - clock[len(prompt) - 1]
    assert 5.0 < played < 20.0


def test_a_length_in_notes_is_exact_and_its_last_note_whole(vocabulary):
    made = list(stream(Dice(vocabulary.size), [vocabulary.bos_id], Sampling(seed=2), vocabulary, notes=17))
    assert vocabulary.count_notes(made) == 17
    assert may_stop(vocabulary, made[-1])
    assert not may_stop(vocabulary, made[-2])


def test_the_model_may_end_the_piece_if_asked(vocabulary):
    model = Dice(vocabulary.size)
    with torch.no_grad():
        model.weight[:, vocabulary.eos_id] += 6.0
    made = list(stream(model, [vocabulary.bos_id], Sampling(seed=2), vocabulary, stop_at_end=True, max_tokens=4000))
    assert vocabulary.eos_id not in made
    # With MIDILike a piece ends only where no note sounds, which dice seldom reach.
    assert len(made) < 4000 or vocabulary.scheme == "MIDILike"


def test_time_moves_on_even_where_the_model_would_stand_still(vocabulary):
    model = Dice(vocabulary.size)
    with torch.no_grad():
        model.weight[:, vocabulary.of_type("TimeShift", "Bar", "Position")] -= 1000.0
    made = list(stream(model, [vocabulary.bos_id], Sampling(seed=2), vocabulary, seconds=0.5))
    assert made


def test_what_was_played_before_the_numbers_broke_is_kept():
    made = []
    with pytest.raises(UserError, match="not finite"):
        made.extend(stream(Dice(11, broken_after=20), [1], Sampling(seed=0)))
    assert len(made) == 20
