"""A program's default device and dtype are for what it makes itself: a model that is there learns and plays as ever."""

import contextlib
import itertools
from collections.abc import Iterator

import pytest
import torch

from dsmr.evaluation.losses import _forget
from dsmr.generation.drawing import Sampling
from dsmr.generation.sampling import sample
from dsmr.generation.stepping import weights
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel
from dsmr_kernels import KVMemory

TWO_SCALES, A_SAMPLE = (
    "two_scale(layers=2, long=24, short=8, n_long=1)",
    "uniform(layers=2, horizon=16, retention=random)",
)
MODELS = [(name, TWO_SCALES) for name in ("rope", "alibi", "sinusoidal", "none")] + [("rope", A_SAMPLE)]


@contextlib.contextmanager
def other_defaults(name: str) -> Iterator[None]:
    """A device that no tensor of ours lies on, or a dtype that none has."""
    if name == "device":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def losses(model: DSMRModel) -> list[tuple[torch.dtype, float]]:
    generator = torch.Generator("cpu").manual_seed(0)
    state = model.new_state(2, aligned=True, apart=True)
    found = []
    for _ in range(4):
        tokens = torch.randint(0, 50, (2, 9), device="cpu", generator=generator)
        loss = model(tokens[:, :8], state, targets=tokens[:, 1:]).loss
        loss.backward()
        found.append((loss.dtype, loss.item()))
    return found


def played(model: DSMRModel, dtype: str) -> list[int]:
    prompt = range(1, 11)
    return list(itertools.islice(model.generate(list(prompt), sampling=Sampling(seed=1), dtype=dtype), 40))


@pytest.mark.parametrize("recall", [0, 3])
@pytest.mark.parametrize(("position", "schedule"), MODELS)
@pytest.mark.parametrize("default", ["device", "dtype"])
def test_a_model_learns_and_plays_the_same(default: str, position: str, schedule: str, recall: int) -> None:
    torch.manual_seed(0)
    model = DSMRModel(
        DSMRConfig(50, schedule, d_model=32, n_heads=4, segment_length=8, position=position, recall=recall)
    )
    with other_defaults(default):  # first, so that what is kept from then on is made there
        found = losses(model), played(model, "float32")
    assert found == (losses(model), played(model, "float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("default", ["device", "dtype"])
def test_so_do_weights_of_fewer_bits(default: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = DSMRModel(DSMRConfig(50, TWO_SCALES, d_model=32, n_heads=4, segment_length=8))
    for found_out in (weights._overflows, weights._has_linear_dynamic):
        found_out.cache_clear()
    with other_defaults(default):  # first, so that what is kept from then on is made there
        found = played(model, dtype)
    assert found == played(model, dtype)
    assert weights._has_linear_dynamic()


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_a_seed_draws_the_same(default: str) -> None:
    logits = torch.randn(64, 50, device="cpu", dtype=torch.float32)

    def drawn() -> torch.Tensor:
        return sample(logits, Sampling(), generator=torch.Generator("cpu").manual_seed(4))

    right = drawn()
    with other_defaults(default):
        assert torch.equal(drawn(), right)


def test_a_state_is_looked_at_taken_back_and_forgotten() -> None:
    model = DSMRModel(DSMRConfig(50, TWO_SCALES, d_model=32, n_heads=4, segment_length=8))
    state = model.new_state(2)
    tokens = torch.zeros(2, 6, dtype=torch.int64, device="cpu")
    with torch.device("meta"), torch.no_grad():
        model(tokens, state)
        assert state.phase == 6
        memory: KVMemory = state.memories[0]
        memory.crop(2)
        assert memory.length.tolist() == [4, 4]
        _forget(state, 1, 3, tokens[0].numpy())
        assert state.position.tolist() == [4, 3]
