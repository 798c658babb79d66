"""A model whose layers keep other than the newest tokens: the same however a stream is cut, batched or kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.model.attention import DSMRAttention
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel

LENGTH, VOCABULARY = 7, 13
SCHEDULES = (
    "explicit(horizons=[11, 0, 5], kv_heads=[2, 4, 1], retention='uniform')",
    "explicit(horizons=[11, 9, 5], retention=['random', 'newest', 'random'])",
)
schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=["uniform", "random"])


def tiny(schedule: str, **changes: Any) -> DSMRModel:
    options = {"d_model": 24, "n_heads": 4, "segment_length": LENGTH, "init_std": 0.3, "recall": 2}
    torch.manual_seed(3)
    checkpoint = changes.pop("checkpoint_layers", False)
    return DSMRModel(DSMRConfig(VOCABULARY, schedule, **(options | changes)), checkpoint_layers=checkpoint).double()


def some_tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def starts(batch: int, count: int) -> torch.Tensor:
    """In the first row a piece begins at 0 and another at 2/3, in the middle of a segment; the others go on."""
    found = torch.full((batch, count), -1, dtype=torch.int32)
    found[0, :] = 0
    found[0, 2 * count // 3 :] = 2 * count // 3
    return found


def in_calls(model: DSMRModel, tokens: torch.Tensor, sizes: list[int], state: DSMRState, piece_start: torch.Tensor):
    """Logits and the final state of a stream that is cut into calls of these sizes, by turns."""
    found, done = [], 0
    while done < tokens.shape[1]:
        part = slice(done, min(done + sizes[len(found) % len(sizes)], tokens.shape[1]))
        begun = piece_start[:, part]
        found.append(model(tokens[:, part], state, piece_start=torch.where(begun >= 0, begun - done, begun)).logits)
        done = part.stop
    return torch.cat(found, 1), state


@schedules
def test_any_cut_of_a_stream_gives_the_same(schedule: str) -> None:
    model, tokens, begun = tiny(schedule), some_tokens(3, 90), starts(3, 90)
    with torch.no_grad():
        whole, state = in_calls(model, tokens, [90], model.new_state(3), begun)
        for sizes in ([LENGTH], [1], [2 * LENGTH], [3, 20, 1, 9]):
            found, other = in_calls(model, tokens, sizes, model.new_state(3), begun)
            torch.testing.assert_close(found, whole)
            assert other.position.tolist() == state.position.tolist() == [30, 90, 90]
        aligned, _ = in_calls(model, tokens, [3 * LENGTH], model.new_state(3, aligned=True), begun)
    torch.testing.assert_close(aligned, whole)
    newest = tiny(str(MemorySchedule.explicit(model.config.schedule.horizons, model.config.schedule.kv_heads)))
    with torch.no_grad():
        assert not torch.allclose(newest(tokens).logits, model(tokens).logits, atol=1e-3)


@schedules
def test_gradients_are_those_of_the_segments(schedule: str) -> None:
    tokens, targets, begun = some_tokens(2, 42), some_tokens(2, 42, 1), starts(2, 42)
    found = []
    for calls, checkpoint in ((1, False), (6, False), (1, True), (3, True)):
        model = tiny(schedule, checkpoint_layers=checkpoint)
        state, size, loss = model.new_state(2, aligned=True), 42 // calls, 0
        for call in range(calls):
            part = slice(call * size, (call + 1) * size)
            where = torch.where(begun[:, part] >= 0, begun[:, part] - part.start, begun[:, part])
            loss = loss + model(tokens[:, part], state, targets=targets[:, part], piece_start=where).loss / calls
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(mine, theirs)


@schedules
def test_a_row_does_not_depend_on_its_place_unless_told(schedule: str) -> None:
    model, tokens = tiny(schedule), some_tokens(3, 60)
    with torch.no_grad():
        together = model(tokens).logits
        alone = model(tokens[2:]).logits
        torch.testing.assert_close(together[2:], alone)
        apart = model(tokens[[2, 2]], model.new_state(2, apart=True)).logits
    torch.testing.assert_close(apart[:1], alone)
    assert torch.allclose(apart[0], apart[1], atol=1e-9) == ("random" not in schedule)
    seeds = [m.seeds.tolist() for m in model.new_state(3, apart=True).memories if m.seeds is not None]
    assert len({seed for layer in seeds for seed in layer}) == 3 * len(seeds)


@schedules
def test_a_reset_row_is_a_fresh_row(schedule: str) -> None:
    model, tokens = tiny(schedule), some_tokens(2, 4 * LENGTH)
    with torch.no_grad():
        state = model.new_state(2)
        model(some_tokens(2, 5 * LENGTH, 2), state)
        kept = model(tokens, state.clone()).logits[1]
        state.reset(torch.tensor([True, False]))
        state.recent[0] = 0
        found = model(tokens, state).logits
        torch.testing.assert_close(found[0], model(tokens[:1]).logits[0])
    torch.testing.assert_close(found[1], kept)


@schedules
@pytest.mark.parametrize("kept", ["file", "dictionary", "clone", "copy"])
@pytest.mark.parametrize("count", [31, 5 * LENGTH])
def test_a_kept_state_plays_on(schedule: str, kept: str, count: int, tmp_path: Path) -> None:
    model = tiny(schedule)
    state = model.new_state(2, apart=True)
    with torch.no_grad():
        model(some_tokens(2, count), state, piece_start=starts(2, count))
        if kept == "file":
            state.save(tmp_path / "state")
            other = DSMRState.load(tmp_path / "state")
        elif kept == "dictionary":
            other = model.new_state(2)
            torch.save(state.state_dict(), tmp_path / "state.pt")
            other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        else:
            other = state.clone() if kept == "clone" else copy.copy(state)
        found = [model(some_tokens(2, 50, 1), one).logits for one in (state, other)]
    assert torch.equal(*found)


def test_a_state_of_another_retention_is_a_sentence(tmp_path: Path) -> None:
    one, other = (tiny(f"uniform(layers=2, horizon=5, retention={name})") for name in ("random", "uniform"))
    with pytest.raises(ValueError, match="layer 0 of the saved state does not have retention 'random'"):
        one.new_state(2).load_state_dict(other.new_state(2).state_dict())
    with pytest.raises(ValueError, match=r"keeps 5 tokens by retention 'uniform', this layer 5 by 'random'"):
        one(some_tokens(2, 3), other.new_state(2))
    state = one.new_state(2)
    memory = state.memories[1]
    assert memory.mark is not None
    for damage in ({"mark": memory.mark + 100}, {"settled": memory.settled - 1}, {"seeds": memory.seeds[:1]}):
        for name, value in damage.items():
            setattr(memory, name, value)
        state.save(tmp_path / "state")
        with pytest.raises(UserError, match="the tensors of layer 1 do not fit together"):
            DSMRState.load(tmp_path / "state")
        state = one.new_state(2)
        memory = state.memories[1]


def test_what_does_not_go_with_retention_is_a_sentence() -> None:
    schedule = "uniform(layers=2, horizon=5, retention=random)"
    for more in ({"visibility": "sliding"}, {"position": "alibi"}):
        with pytest.raises(ValueError, match="does not know how old its slots are"):
            tiny(schedule, **more)
        tiny("none(layers=2, retention=random)", **more)  # nothing is kept
    with pytest.raises(ValueError, match="retention must be one of newest, uniform, random, got 'old'"):
        DSMRAttention(8, 2, horizon=4, retention="old")
    layer = DSMRAttention(8, 2, horizon=4, segment_length=6, retention="uniform")
    with pytest.raises(ValueError, match="must lie in one segment"):
        layer(torch.randn(1, 7, 8))
    _, memory = layer(torch.randn(1, 2, 8), layer.new_memory(1, aligned=True))
    with pytest.raises(ValueError, match="holds 4 tokens, but with a horizon of 4 a query, 2 tokens into"):
        layer(torch.randn(1, 2, 8), memory)


def test_a_layer_alone_takes_each_call_for_a_segment() -> None:
    torch.manual_seed(0)
    layer = DSMRAttention(8, 2, horizon=4, retention="uniform", position="none")
    x, memory = torch.randn(1, 24, 8), None
    whole = None
    for start in range(0, 24, 3):
        y, memory = layer(x[:, start : start + 3], memory)
        whole = y if whole is None else torch.cat([whole, y], 1)
    assert memory is not None
    assert memory.capacity == 4
    other, stepped = DSMRAttention(8, 2, horizon=4, segment_length=3, retention="uniform", position="none"), []
    other.load_state_dict(layer.state_dict())
    memory = None
    for t in range(24):
        y, memory = other(x[:, t : t + 1], memory)
        stepped.append(y)
    torch.testing.assert_close(torch.cat(stepped, 1), whole)
