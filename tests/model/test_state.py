"""The state: saved, moved, copied or reset, a stream plays on as if nothing had happened; errors are sentences."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsmr.console.errors import UserError
from dsmr.model.config import DSMRConfig
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr_kernels.tolerance import error

LENGTH, VOCABULARY = 7, 13


def tiny(**changes: Any) -> DSMRModel:
    options = {"schedule": "explicit(horizons=[11, 0, 5], kv_heads=[2, 4, 1])", "d_model": 24, "n_heads": 4}
    torch.manual_seed(3)
    config = DSMRConfig(VOCABULARY, **(options | {"segment_length": LENGTH, "init_std": 0.3} | changes))
    return DSMRModel(config).double()


def some_tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, count), generator=torch.Generator().manual_seed(seed))


def played(model: DSMRModel, batch: int = 2, count: int = 31, recorded: bool = False) -> DSMRState:
    """A state in the middle of a segment, rings wrapped, rows at different places of their pieces."""
    state = model.new_state(batch)
    starts = torch.full((batch, count), -1, dtype=torch.int32)
    starts[0, count - 4 :] = count - 4
    with torch.set_grad_enabled(recorded):
        model(some_tokens(batch, count), state, piece_start=starts)
    return state


def play_on(model: DSMRModel, state: DSMRState) -> torch.Tensor:
    with torch.no_grad():
        return model(some_tokens(state.batch, 40, seed=1), state).logits


def by_file(state: DSMRState, model: DSMRModel, folder: Path) -> DSMRState:
    state.save(folder / "new" / "state.safetensors")
    return DSMRState.load(folder / "new" / "state.safetensors")


def by_dictionary(state: DSMRState, model: DSMRModel, folder: Path) -> DSMRState:
    again = model.new_state(state.batch)
    again.load_state_dict(state.state_dict())
    return again


def by_torch_file(state: DSMRState, model: DSMRModel, folder: Path) -> DSMRState:
    torch.save(state.state_dict(), folder / "state.pt")
    again = model.new_state(state.batch)
    again.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return again


def by_clone(state: DSMRState, model: DSMRModel, folder: Path) -> DSMRState:
    return state.clone()


WAYS = [by_file, by_dictionary, by_torch_file, by_clone]


@pytest.mark.parametrize("recorded", [False, True], ids=["appended", "append deferred"])
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_plays_on_from_a_copy_of_its_state(way: Callable, recorded: bool, tmp_path: Path) -> None:
    model = tiny()
    state = played(model, recorded=recorded)
    again = way(state, model, tmp_path)
    assert (again.offset, again.aligned) == (state.offset, state.aligned) == (31 % LENGTH, False)
    assert again.position.tolist() == [4, 31]
    exact = play_on(model, state)
    assert error(play_on(model, again), exact) < 1e-12  # and the first stream has not disturbed the copy
    assert error(play_on(model, played(model)), exact) < 1e-12


@pytest.mark.parametrize("way", [by_file, by_dictionary, by_clone])
def test_an_aligned_state_comes_back_aligned(way: Callable, tmp_path: Path) -> None:
    model = tiny()
    state = model.new_state(2, aligned=True)
    model(some_tokens(2, LENGTH + 2), state)
    if way is by_dictionary:
        again = model.new_state(2, aligned=True)
        again.load_state_dict(state.state_dict())
    else:
        again = way(state, model, tmp_path)
    assert again.aligned
    assert again.offset == 2
    assert again.nbytes == state.nbytes


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "state.safetensors"
    path.write_text("old")
    played(model).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert DSMRState.load(path).batch == 2


def test_to_another_dtype_moves_keys_and_values_and_nothing_else() -> None:
    model = tiny()
    state = played(model)
    single = state.to(dtype=torch.float32)
    assert {m.k.dtype for m in single.memories} == {m.v.dtype for m in single.memories} == {torch.float32}
    assert single.nbytes * 2 == state.nbytes
    assert (single.offset, single.position.tolist()) == (state.offset, state.position.tolist())
    assert error(play_on(model, single), play_on(model, state)) < 1e-3


def test_to_another_device_moves_everything() -> None:
    moved = played(tiny(), recorded=True).to("meta")
    for memory in moved.memories:
        assert {x.device.type for x in (memory.k, memory.v, memory.length, memory.position)} == {"meta"}


def test_to_without_a_change_is_the_state_itself() -> None:
    """Two states over the same rings would overwrite each other's tokens."""
    state = played(tiny(), recorded=True)
    assert state.to("cpu", torch.float64) is state


def test_reset_of_rows_forgets_these_rows_alone() -> None:
    state = played(tiny(), batch=3)
    state.reset(torch.tensor([False, True, False]))
    assert state.position.tolist() == [4, 0, 31]
    assert [memory.length.tolist() for memory in state.memories] == [[4, 0, 18], [4, 0, 7], [4, 0, 12]]
    assert state.offset == 31 % LENGTH
    state.reset()
    assert (state.position.tolist(), state.offset) == ([0, 0, 0], 0)


def test_a_reset_also_forgets_what_was_not_yet_appended() -> None:
    state = played(tiny(), recorded=True)
    state.reset()
    assert state.position.tolist() == [0, 0]


def test_looking_at_the_state_appends_what_was_deferred_once() -> None:
    model = tiny()
    state = played(model, recorded=True)
    for _ in range(2):
        assert state.position.tolist() == [4, 31]
        assert state.memories[0].length.tolist() == [4, 18]


def test_size_and_bytes() -> None:
    state = played(tiny())
    assert (len(state), state.batch) == (3, 2)
    assert state.nbytes == sum(m.k.numel() * 8 + m.v.numel() * 8 for m in state.memories)


# Errors


@pytest.mark.parametrize("rows", [torch.tensor([True]), torch.tensor([0, 1])], ids=["shape", "dtype"])
def test_rows_must_be_a_mask(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rows must be a boolean mask of shape \(2,\), got"):
        played(tiny()).reset(rows)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"schedule": "none(layers=2)"}, "the saved state has 2 layers, this one 3"),
        (
            {"schedule": "explicit(horizons=[11, 0, 6], kv_heads=[2, 4, 1])"},
            r"layer 2 of the saved state holds k as torch.float64 \(2, 1, 13, 6\), this one .* \(2, 1, 12, 6\)",
        ),
        ({"batch": 3}, r"layer 0 of the saved state holds .* \(3, 2, 18, 6\), this one .* \(2, 2, 18, 6\)"),
        ({"dtype": torch.float32}, "layer 0 of the saved state holds k as torch.float32 .*, this one torch.float64"),
    ],
)
def test_a_state_of_another_model_is_refused_and_nothing_changes(other: dict, message: str) -> None:
    model = tiny()
    state = played(model)
    foreign = tiny(**({"schedule": other["schedule"]} if "schedule" in other else {})).new_state(
        other.get("batch", 2), dtype=other.get("dtype")
    )
    with pytest.raises(ValueError, match=message):
        state.load_state_dict(foreign.state_dict())
    assert error(play_on(model, state), play_on(model, played(model))) < 1e-12


@pytest.mark.parametrize("retention", ["newest", "uniform"])
@pytest.mark.parametrize("offset", [LENGTH, 2**60])
def test_a_state_that_is_beyond_a_segment_is_refused_and_not_cut_into_segments(retention: str, offset: int) -> None:
    """Cutting took memory without bound."""
    model = tiny(schedule=f"uniform(layers=2, horizon=11, retention={retention})")
    state = played(model)
    state.offset = offset
    with pytest.raises(ValueError, match=f"the state is {offset:,} tokens into a segment, but the model's have 7"):
        play_on(model, state)


def test_a_dictionary_whose_tensors_do_not_fit_is_refused_and_nothing_changes() -> None:
    model = tiny()
    state = played(model)
    spoiled = played(model, count=20).state_dict()
    spoiled["layers"][2]["length"] = torch.zeros(5, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"layer 2 of the saved state holds length as torch.int32 \(5,\), this one"):
        state.load_state_dict(spoiled)
    assert error(play_on(model, state), play_on(model, played(model))) < 1e-12


def spoil(path: Path, how: str) -> None:
    tensors = load_file(path)
    match how:
        case "missing":
            path.unlink()
        case "a folder":
            path.unlink()
            path.mkdir()
        case "cut short":
            path.write_bytes(path.read_bytes()[:-50])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("not a state")
        case "weights of a model":
            save_file({"norm.weight": torch.zeros(3)}, path)
        case "a tensor is missing":
            del tensors["1.length"]
            save_file(tensors, path, {"offset": "3", "aligned": "0", "layers": "3"})
        case "no layers":
            save_file(tensors, path, {"offset": "3", "aligned": "0", "layers": "0"})
        case "a tensor of another shape":
            save_file(
                tensors | {"2.length": torch.zeros(5, dtype=torch.int32)},
                path,
                {"offset": "3", "aligned": "0", "layers": "3"},
            )
        case "a number is a word":
            save_file(tensors, path, {"offset": "three", "aligned": "0", "layers": "3"})
        case "a number is below nothing":
            save_file(tensors, path, {"offset": "-1", "aligned": "0", "layers": "3"})


@pytest.mark.parametrize(
    "how",
    [
        "missing",
        "a folder",
        "cut short",
        "empty",
        "text",
        "weights of a model",
        "a tensor is missing",
        "no layers",
        "a tensor of another shape",
        "a number is a word",
        "a number is below nothing",
    ],
)
def test_what_is_not_a_saved_state_is_refused_in_one_sentence(how: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    played(tiny()).save(path)
    spoil(path, how)
    with pytest.raises(UserError, match=r"state\.safetensors is not a saved state: .+") as caught:
        DSMRState.load(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*state\.safetensors"):
        played(tiny()).save(tmp_path / "file" / "state.safetensors")
