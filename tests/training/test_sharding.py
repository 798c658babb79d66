"""A model that is cut up is kept whole, as one process keeps it; here by the one rank of a world of one.

Several ranks: tests/training/test_ranks.py.
"""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel
from dsmr.runs.settings import TrainConfig
from dsmr.training.sharding import ShardedRanks
from dsmr.training.update import optimizer_of

SCHEDULE = MemorySchedule.parse("uniform(layers=2, horizon=8)")


@pytest.fixture(scope="module", autouse=True)
def _world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(tied: bool, sharded: bool, steps: int = 2) -> tuple[DSMRModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = DSMRModel(DSMRConfig(11, SCHEDULE, d_model=8, n_heads=1, segment_length=4, tie_embeddings=tied))
    if sharded:
        with warnings.catch_warnings():  # `placed` silences one for good
            model = ShardedRanks(0, 1, "cpu").placed(model, torch.device("cpu"))
    optimizer = optimizer_of(model, TrainConfig(data="", out=""))
    tokens = torch.arange(16).reshape(2, 8) % 11
    for _ in range(steps):
        loss = model(tokens, targets=tokens.roll(1, 1)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(found: dict, expected: dict) -> None:
    """Alike in their names, their order and their numbers."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        elif isinstance(value, torch.Tensor):
            assert not isinstance(found[name], DTensor)
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
        else:
            assert found[name] == value


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_kept_is_what_one_process_keeps(tied: bool) -> None:
    ranks = ShardedRanks(0, 1, "cpu")
    model, optimizer = trained(tied, sharded=True)
    alone, its_optimizer = trained(tied, sharded=False)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    kept = {"model": ranks.weights(model), "optimizer": ranks.moments(model, optimizer)}
    assert_same(kept["model"], alone.state_dict())
    assert (kept["model"]["head.weight"] is kept["model"]["embedding.weight"]) == tied
    assert_same(kept["optimizer"]["state"], its_optimizer.state_dict()["state"])
    assert kept["optimizer"]["param_groups"] == its_optimizer.state_dict()["param_groups"]
    # And it is taken over from either.
    for held in (kept, {"model": alone.state_dict(), "optimizer": its_optimizer.state_dict()}):
        other, its = trained(tied, sharded=True, steps=1)
        ranks.restore(other, its, copy.deepcopy(held))
        assert_same(ranks.weights(other), kept["model"])
        assert_same(ranks.moments(other, its)["state"], kept["optimizer"]["state"])


def test_a_layer_that_gives_views_is_no_reason_for_a_warning() -> None:
    """In PyTorch's words, since whether keys and values are views depends on what computes them."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = DSMRModel(DSMRConfig(11, SCHEDULE, d_model=8, n_heads=1, segment_length=4))
        ShardedRanks(0, 1, "cpu").placed(model, torch.device("cpu"))
        warnings.warn("FSDP2-wrapped module (Block) returned a view tensor. An in-place op", stacklevel=1)
        warnings.warn("FSDP2-wrapped module (Block) is another matter", stacklevel=1)
    assert [str(one.message)[-6:] for one in said] == ["matter"]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_measured_is_a_plain_model_of_the_same_weights(tied: bool) -> None:
    model, _ = trained(tied, sharded=True)
    plain = ShardedRanks(0, 1, "cpu").to_measure(model)
    alone, _ = trained(tied, sharded=False)
    assert not any(isinstance(weight, DTensor) or weight.is_meta for weight in plain.parameters())
    assert (plain.head.weight is plain.embedding.weight) == tied
    assert_same(plain.state_dict(), alone.state_dict())


def test_an_optimiser_that_took_no_step_is_kept_without_moments() -> None:
    model, optimizer = trained(True, sharded=True, steps=0)
    assert ShardedRanks(0, 1, "cpu").moments(model, optimizer)["state"] == {}
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1]), (1, [2, 3]), (2, [4]), (3, [])])
def test_a_rank_takes_its_part_of_what_is_whole(rank: int, rows: list[int]) -> None:
    """Of five rows four ranks take two, two, one and none, as PyTorch cuts them."""
    mesh = init_device_mesh("cpu", (1,))
    like = DTensor.from_local(torch.zeros(5, 8), mesh, [Shard(0)])
    ranks, whole = ShardedRanks(rank, 4, "cpu"), torch.randn(5, 8)
    found = ranks._part(whole, like)
    assert found.shape == like.shape
    assert torch.equal(found.to_local(), whole[rows])
    # Of its own: training writes to it, and it must not hold on to the whole.
    assert found.to_local().untyped_storage().nbytes() == whole[rows].nbytes
    count, plain = torch.tensor(3.0), torch.zeros(5)
    assert ranks._part(count, like) is count
    assert ranks._part(plain, plain) is plain
    with pytest.raises(ValueError, match=r"a saved tensor has shape \(4, 8\), its weight \(5, 8\)"):
        ranks._part(whole[:4], like)
