"""Layers that hold their own memory: in `nn.Sequential`, under what training stacks do, streams are the recurrence."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from dsmr import DSMRState, MemoryState, RecurrentAttention, stream
from dsmr.console.errors import UserError
from dsmr_kernels.tolerance import error


def stack(**options) -> nn.Sequential:
    options = {"segment_length": 8} | options
    return nn.Sequential(
        nn.Linear(16, 16),
        RecurrentAttention(16, 2, horizon=12, n_kv_heads=1, **options),
        nn.GELU(),
        RecurrentAttention(16, 2, horizon=5, **options),
    )


def by_hand(model: nn.Sequential, parts: list[Tensor]) -> list[Tensor]:
    """The same with memories carried by hand, as `DSMRAttention` wants it."""
    memories: dict[int, object] = {}
    outs = []
    for x in parts:
        for index, layer in enumerate(model):
            if isinstance(layer, RecurrentAttention):
                x, memories[index] = super(RecurrentAttention, layer).forward(x, memories.get(index))
            else:
                x = layer(x)
        outs.append(x)
    return outs


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return found


def test_a_stream_is_the_recurrence_by_hand() -> None:
    model = stack().double()
    parts = list(torch.randn(2, 40, 16, dtype=torch.float64).split([8, 3, 1, 20, 8], 1))
    expected = by_hand(model, parts)
    sum(y.square().sum() for y in expected).backward()
    wanted = gradients(model)
    with stream(model, 2) as memory:
        outs = [model(x) for x in parts]
        sum(y.square().sum() for y in outs).backward()
    assert memory.position.tolist() == [40, 40]
    assert memory.phase == 40
    for one, other in zip([*outs, *gradients(model)], [*expected, *wanted], strict=True):
        assert error(one, other) < 1e-12


def test_outside_of_a_stream_a_call_sees_its_own_tokens_only() -> None:
    model, x = stack(), torch.randn(2, 9, 16)
    alone = model(x)
    with stream(model, 2):
        assert torch.equal(model(x), alone)
        assert not torch.allclose(model(x), alone)
    assert torch.equal(model(x), alone)


def test_streams_nest_and_the_outer_one_goes_on() -> None:
    model, parts = stack(), list(torch.randn(2, 24, 16).split(8, 1))
    with torch.no_grad():
        with stream(model, 2):
            expected = [model(x) for x in parts]
        with stream(model, 2):
            first = model(parts[0])
            with stream(model, 1):  # an evaluation in between
                model(torch.randn(1, 30, 16))
            assert torch.equal(model(parts[1]), expected[1])
        assert torch.equal(first, expected[0])


def test_pieces_begin_within_a_call_and_rows_are_reset() -> None:
    model = stack(visibility="sliding").double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    starts = torch.full((2, 12), -1, dtype=torch.int32)
    starts[1, 5:] = 5
    with torch.no_grad():
        with stream(model, 1):
            alone = model(x[1:, 5:])
        with stream(model, 2) as memory:
            model(torch.randn_like(x))
            with memory.pieces(starts):
                y = model(x)
            assert memory.position.tolist() == [24, 7]
            memory.reset(torch.tensor([True, False]))
            assert memory.position.tolist() == [0, 7]
    assert error(y[1:, 5:], alone) < 1e-12


# --- what training stacks do ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointing_has_the_same_gradients(whole: bool) -> None:
    """Each layer computed again, and all of them; a backward after each call, so that gradients accumulate."""
    model = stack(dropout=0.2).double()

    def run(again: bool) -> list[Tensor]:
        torch.manual_seed(5)
        with stream(model, 2):
            for _ in range(4):
                x = torch.randn(2, 6, 16, dtype=torch.float64)
                if again and whole:
                    x = checkpoint(model, x, use_reentrant=False)
                else:
                    for layer in model:
                        x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
                x.square().sum().backward()
        return gradients(model)

    for one, other in zip(run(True), run(False), strict=True):
        assert error(one, other) < 1e-12


def test_checkpointing_over_two_calls_is_refused_since_one_of_them_would_be_computed_over_the_others_memory() -> None:
    model = stack()
    with stream(model, 2):
        loss = sum(checkpoint(model, torch.randn(2, 6, 16), use_reentrant=False).sum() for _ in range(2))
        with pytest.raises(RuntimeError, match="2 calls of this layer await their backward"):
            loss.backward()


def test_reentrant_checkpointing_is_refused() -> None:
    model = stack()
    with stream(model, 2):
        y = checkpoint(model, torch.randn(2, 6, 16, requires_grad=True), use_reentrant=True)
        with pytest.raises(RuntimeError, match="a KVMemory is used inside a backward pass"):
            y.sum().backward()


def test_after_its_backward_a_memory_is_written_in_place_also_where_a_graph_was_dropped() -> None:
    model = stack()
    with stream(model, 2) as memory:
        where = memory.memories[0].k.data_ptr()
        for step in range(6):
            loss = model(torch.randn(2, 6, 16)).sum()
            if step % 2:
                loss.backward()  # `loss` lives on until the next one, as it does in a loop
            del loss
        assert memory.memories[0].k.data_ptr() == where


def test_autocast_gives_the_memory_its_dtype() -> None:
    model = stack()
    with stream(model, 2) as memory:  # begun outside, as a callback begins it
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(2, 6, 16)).float().square().sum()
            loss.backward()
        assert {held.dtype for held in memory.memories} == {torch.bfloat16}
        assert memory.position.tolist() == [12, 12]
    with stream(model, 2, dtype=torch.int8) as memory, torch.no_grad():
        model(torch.randn(2, 6, 16))
        assert memory.memories[0].dtype == torch.int8


def test_an_average_of_the_weights_has_no_memory_of_the_stream() -> None:
    model = stack()
    with stream(model, 2) as memory, torch.no_grad():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        x = torch.randn(2, 6, 16)
        expected = model(x)
        assert torch.equal(average(x), expected)  # outside of a stream: its own tokens
        assert torch.equal(average(x), expected)
        assert memory.position.tolist() == [6, 6]
        average.update_parameters(model)
        with stream(average, 2) as own:
            average(x)
        assert own.position.tolist() == memory.position.tolist()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_in_a_stream_is_outside_of_it(copied) -> None:
    model, x = stack(), torch.randn(2, 6, 16)
    alone = model(x)
    with stream(model, 2):
        model(x)
        other = copied(model)
        assert torch.equal(other(x), alone)
        assert not torch.equal(model(x), alone)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_stream_is_the_eager_one_without_graph_breaks(grad: bool) -> None:
    torch._dynamo.reset()
    model = stack()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            parts = torch.randn(2, 18, 16).split(6, 1)
            found, expected = [], []
            with stream(compiled, 2):
                found = [compiled(x) for x in parts]
                if grad:
                    sum(y.square().sum() for y in found).backward()
                    found += gradients(model)
            with stream(model, 2):
                expected = [model(x) for x in parts]
                if grad:
                    sum(y.square().sum() for y in expected).backward()
                    expected += gradients(model)
            for one, other in zip(found, expected, strict=True):
                assert error(one, other) < 1e-5


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("grad", [False, True])
def test_a_compiled_stream_of_calls_of_any_size_is_not_compiled_again(grad: bool, tmp_path: Path) -> None:
    """Once a first piece has shown that sizes vary, ten pieces of other lengths, in calls of other sizes, find their
    graph; and an eager call, or a file, goes on where a compiled one ended."""
    torch._dynamo.reset()
    model, counter = stack(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def play(sizes: list[int], called: nn.Module) -> Tensor:
        generator = torch.Generator().manual_seed(len(sizes))
        with stream(called, 2) as memory:
            outs = [called(torch.randn(2, size, 16, generator=generator)) for size in sizes]
            assert memory.phase == sum(sizes)
            memory.save(tmp_path / "memory.safetensors")
            after = torch.randn(2, 9, 16, generator=generator)
            outs.append(model(after))
        with stream(model, 2, state=tmp_path / "memory.safetensors"):
            assert error(model(after), outs[-1]) < 1e-6
        return torch.cat(outs, 1)

    with torch.set_grad_enabled(grad):
        for sizes in ([8, 3], [5, 6]):
            play(sizes, compiled)
        graphs = counter.frame_count
        assert graphs <= 4
        for piece in range(10):
            sizes = [2 + (7 * piece + 5 * call) % 19 for call in range(1 + piece % 4)]
            assert error(play(sizes, compiled), play(sizes, model)) < 1e-5
    assert counter.frame_count == graphs


# --- the state ------------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_from_a_file_and_from_a_dictionary(tmp_path: Path) -> None:
    model, parts = stack(), list(torch.randn(2, 30, 16).split([11, 19], 1))
    with torch.no_grad():
        with stream(model, 2) as memory:
            model(parts[0])
            memory.save(tmp_path / "memory.safetensors")
            kept = copy.deepcopy(memory.state_dict())
            expected = model(parts[1])
        with stream(model, 2, state=tmp_path / "memory.safetensors") as memory:
            assert memory.phase == 11
            assert torch.equal(model(parts[1]), expected)
        with stream(model, 2) as memory:
            memory.load_state_dict(kept)
            assert torch.equal(model(parts[1]), expected)
        with stream(model, 2, state=MemoryState.load(tmp_path / "memory.safetensors").to("cpu")):
            assert torch.equal(model(parts[1]), expected)


def test_a_file_that_is_none_or_damaged_or_of_a_model_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "memory.safetensors", stack()
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is not a saved state"), stream(model, 2, state=path):
        pass
    with stream(model, 2) as memory:
        memory.save(path)
    bits = bytearray(path.read_bytes())
    bits[-3] ^= 1
    path.write_bytes(bits)
    with pytest.raises(UserError):
        MemoryState.load(path)
    DSMRState(memory.memories, torch.zeros(2, 0, dtype=torch.int64)).save(path)
    with pytest.raises(UserError, match=r"it is that of a DSMRModel: DSMRState\.load reads it"):
        MemoryState.load(path)


def test_dsmr_state_is_a_memory_state() -> None:
    assert issubclass(DSMRState, MemoryState)


def test_what_does_not_fit_is_refused() -> None:
    model = stack()
    with stream(model, 2) as memory, pytest.raises(ValueError, match="holds 2 streams, but x has 3 rows"):
        model(torch.randn(3, 4, 16))
    with pytest.raises(ValueError, match="Linear has no RecurrentAttention, which is what a stream is for"):
        stream(nn.Linear(3, 3), 2).__enter__()
    with pytest.raises(ValueError, match="batch must be an integer >= 1, got 0"):
        stream(model, 0).__enter__()
    with pytest.raises(ValueError, match="the state holds the memories of 2 layers, but the model has 1"):
        stream(model[1], 2, state=memory).__enter__()
    with pytest.raises(ValueError, match="layer 0 of the state has batch 2, where this model's stream has 3"):
        stream(model, 3, state=memory).__enter__()
    with pytest.raises(ValueError, match="layer 0 of the state has capacity 20, where this model's stream has 30"):
        stream(
            nn.Sequential(RecurrentAttention(16, 2, horizon=30, n_kv_heads=1), model[3]), 2, state=memory
        ).__enter__()
