"""The layer and the model in the tools that training on long pieces needs: checkpointing, compilation, meta devices."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsmr import DSMRAttention, DSMRConfig, DSMRModel, DSMRState
from dsmr.model import transformer
from dsmr.model.transformer import Block
from dsmr_kernels import KVMemory

reentrant = pytest.mark.parametrize("reentrant", [True, False])
compiled = pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])


def _layer(**options: object) -> DSMRAttention:
    return DSMRAttention(32, 4, horizon=6, n_kv_heads=2, **{"segment_length": 5, **options})  # type: ignore[arg-type]


def _as_asked(function: Callable, compiled: bool) -> Callable:
    return torch.compile(function, backend="aot_eager") if compiled else function


def _config(**options: object) -> DSMRConfig:
    sizes = {"vocab_size": 30, "d_model": 32, "n_heads": 4, "segment_length": 6}
    schedule = "two_scale(layers=3, long=12, short=4, n_long=1)"
    return DSMRConfig(**{"schedule": schedule, **sizes, **options})  # type: ignore[arg-type]


# --- activation checkpointing -----------------------------------------------------------------------------------------


@compiled
@reentrant
def test_a_checkpointed_layer_has_the_same_gradients(reentrant: bool, compiled: bool) -> None:
    layer, segments = _layer(), torch.randn(3, 2, 5, 32)
    results = []
    for again in (False, True):
        layer.zero_grad()
        call = _as_asked(layer, compiled)
        memory, leaves, total = layer.new_memory(2), [], 0.0
        for segment in segments:
            x = segment.clone().requires_grad_()
            leaves.append(x)
            if again:
                y, memory = checkpoint(call, x, memory.snapshot(), use_reentrant=reentrant)
            else:
                y, memory = call(x, memory)
            total = total + y.square().sum()
        total.backward()
        results.append([*(x.grad for x in leaves), layer.qkv.weight.grad, memory.k])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


@compiled
@reentrant
def test_a_layer_checkpointed_on_a_memory_is_refused_and_nothing_is_appended_twice(
    reentrant: bool, compiled: bool
) -> None:
    layer = _layer()
    memory = layer.new_memory(2)
    call = _as_asked(layer, compiled)
    y, memory = checkpoint(call, torch.randn(2, 5, 32, requires_grad=True), memory, use_reentrant=reentrant)
    held = memory.position.tolist()
    with pytest.raises(RuntimeError, match=r"give the checkpointed call memory\.snapshot\(\)"):
        y.sum().backward()
    assert memory.position.tolist() == held == [5, 5]


@compiled
@reentrant
def test_so_is_attend_where_the_append_came_between(reentrant: bool, compiled: bool) -> None:
    layer = _layer()
    memory = layer.new_memory(2)
    x = torch.randn(2, 5, 32, requires_grad=True)
    place = layer.place(torch.arange(5).expand(2, -1))
    call = _as_asked(layer.attend, compiled)
    y, k, v = checkpoint(call, x, memory, place, use_reentrant=reentrant)
    memory.append(k.detach(), v.detach())
    with pytest.raises(RuntimeError, match=r"give the checkpointed call memory\.snapshot\(\)"):
        y.sum().backward()


def _gradients(model: DSMRModel, tokens: torch.Tensor, together: int, **options: object) -> list[torch.Tensor]:
    """Over segments in turn, with the backward of `together` of them at once."""
    model.zero_grad()
    state = model.new_state(tokens.shape[0])
    pending = []
    for segment in tokens.split(6, dim=1):
        pending.append(model(segment, state, targets=segment, **options).loss)
        if len(pending) == together:
            torch.stack(pending).sum().backward()
            pending = []
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*grads, *(memory.k for memory in state.memories)]


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("options", [{}, {"recall": 2}, {"position": "alibi"}, {"position": "sinusoidal"}])
def test_a_model_that_checkpoints_its_layers_has_the_same_gradients(together: int, options: dict) -> None:
    plain = DSMRModel(_config(**options))
    saving = DSMRModel(plain.config, checkpoint_layers=True)
    saving.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 30, (2, 24))
    for one, other in zip(_gradients(plain, tokens, together), _gradients(saving, tokens, together), strict=True):
        assert torch.equal(one, other)


def test_checkpointing_layers_keeps_less_for_the_backward() -> None:
    kept = []
    for again in (False, True):
        model = DSMRModel(_config(), checkpoint_layers=again)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.nbytes), x)[1], lambda x: x):
            model(torch.randint(0, 30, (2, 24)), targets=torch.randint(0, 30, (2, 24)))
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("options", [{}, {"recall": 2}, {"position": "sinusoidal", "ffn": "swiglu"}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_whose_layers_are_compiled_has_the_same_gradients(
    options: dict, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And compiles once for all layers, and not at all to evaluate."""
    graphs: list[object] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    parts = tuple(torch.compile(part, dynamic=False, backend=counting) for part in (Block.before, Block.after))
    monkeypatch.setattr(transformer, "_compiled", lambda: parts)
    torch._dynamo.reset()
    plain = DSMRModel(_config(**options))
    fused = DSMRModel(plain.config, checkpoint_layers=checkpointed, compile_layers=True)
    fused.load_state_dict(plain.state_dict())
    tokens = torch.randint(0, 30, (2, 24))
    for one, other in zip(_gradients(plain, tokens, 1), _gradients(fused, tokens, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 2
    fused.eval()(tokens)
    with torch.no_grad():
        fused.train()(tokens)
    assert len(graphs) == 2


@reentrant
def test_a_whole_model_checkpointed_on_a_state_is_refused(reentrant: bool) -> None:
    model = DSMRModel(_config())
    state = model.new_state(2)
    tokens = torch.randint(0, 30, (2, 6))
    anchor = torch.zeros((), requires_grad=True)  # a reentrant checkpoint differentiates only what has such an input

    def run(anchor: torch.Tensor) -> torch.Tensor:
        return model(tokens, state).logits + anchor

    logits = checkpoint(run, anchor, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"checkpoint_layers=True"):
        logits.sum().backward()


# --- compilation, copies, devices -------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_without_a_memory_compiles_whole(grad: bool) -> None:
    layer, x = _layer(), torch.randn(2, 5, 32, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        y, memory = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        expected, held = layer(x)
    torch.testing.assert_close(y, expected)
    assert isinstance(memory, KVMemory)
    assert memory.seen == 5
    torch.testing.assert_close(memory.k, held.k)
    assert torch.equal(memory.position, held.position)


@pytest.mark.slow  # compiles
def test_a_compiled_stream_appends_in_place_and_compiles_no_more() -> None:
    torch._dynamo.reset()  # what other tests compiled counts, too
    layer = _layer(segment_length=4)
    memory, other = layer.new_memory(2), layer.new_memory(2)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    where = [x.data_ptr() for x in memory.tensors().values()]
    with torch.no_grad():
        for step in range(12):
            x = torch.randn(2, 4, 32)
            if step == 4:
                torch._dynamo.config.error_on_recompile = True
            try:
                y, memory = call(x, memory)
            finally:
                torch._dynamo.config.error_on_recompile = False
            expected, other = layer(x, other)
            torch.testing.assert_close(y, expected)
    assert [x.data_ptr() for x in memory.tensors().values()] == where
    assert torch.equal(memory.position, other.position)


@pytest.mark.parametrize("batch", [1, 3])
def test_states_travel(batch: int) -> None:
    model = DSMRModel(_config(recall=2))
    state = model.new_state(batch)
    model(torch.randint(0, 30, (batch, 7)), state)  # recorded: the last call's tokens are pending
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    tokens = torch.randint(0, 30, (batch, 8))
    with torch.no_grad():
        read = torch.load(file, weights_only=False)
        copies = [pickle.loads(pickle.dumps(state)), read, copy.deepcopy(state), state.clone()]
        expected = model(tokens, state).logits
        for other in copies:
            assert isinstance(other, DSMRState)
            assert torch.equal(model(tokens, other).logits, expected)


def test_alibi_survives_the_meta_device() -> None:
    torch.manual_seed(1)
    layer = _layer(position="alibi")
    with torch.device("meta"):
        empty = _layer(position="alibi")
    assert empty.slopes is not None
    x = torch.randn(2, 5, 32)
    loaded = copy.deepcopy(empty).to_empty(device="cpu")
    loaded.load_state_dict(layer.state_dict())
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(layer.state_dict(), assign=True)
    for other in (loaded, assigned):
        assert torch.equal(other(x)[0], layer(x)[0])
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.slopes is not None
    assert half.slopes.dtype == torch.float32


def test_a_memory_of_another_layer_is_refused() -> None:
    layer, x = _layer(), torch.randn(2, 5, 32)
    other = DSMRAttention(32, 4, horizon=3, n_kv_heads=2)
    with pytest.raises(ValueError, match="holds 3 tokens, but with a horizon of 6 a query sees 6"):
        layer(x, other.new_memory(2))
    with pytest.raises(ValueError, match="the memory holds 3 streams, but x has 2 rows"):
        layer(x, layer.new_memory(3))
    with pytest.raises(ValueError, match=r"the memory has \(kv_heads, head_dim\) = \(4, 8\), this layer \(2, 8\)"):
        layer(x, DSMRAttention(32, 4, horizon=6).new_memory(2))
    aligned = layer.new_memory(2, aligned=True)
    layer(x[:, :3], aligned)
    with pytest.raises(ValueError, match="3 tokens into a segment, sees 9 before its call"):
        layer(x[:, :1], aligned)
    memory = layer.new_memory(2)  # in float32, outside autocast
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"under this autocast keys and values come out in torch\.bfloat16"):
            layer(x, memory)
        assert layer(x, layer.new_memory(2))[0].dtype == torch.bfloat16
        layer(x, layer.new_memory(2, dtype=torch.int8))


@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize("sizes", [[1] * 23, [4, 1, 7, 11], [23]])
def test_a_layer_knows_how_far_into_its_segment_a_stream_is(visibility: str, sizes: list[int]) -> None:
    layer, x = _layer(visibility=visibility), torch.randn(2, 23, 32)
    whole, _ = layer(x, layer.new_memory(2))
    memory, parts = layer.new_memory(2), []
    for part in x.split(sizes, dim=1):
        y, memory = layer(part, memory)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    assert memory.seen == 23
    layer(x[:, :1], memory, segment_offset=3)
    with pytest.raises(ValueError, match="segment_offset is 3, but the memory has seen 24 tokens, which is 4 into"):
        layer(x[:, :1], memory, segment_offset=3)


def test_rows_that_advance_apart_are_each_at_their_own_place() -> None:
    layer, x = _layer(), torch.randn(2, 12, 32)
    memory = layer.new_memory(2)
    alone = []
    for row, count in enumerate((3, 7)):
        ring = layer.new_memory(1)
        layer(x[row : row + 1, :count], ring)
        alone.append(layer(x[row : row + 1, 7:], ring)[0])
    place = layer.place(torch.arange(7).expand(2, -1))
    _, k, v = layer.attend(x[:, :7], memory, place)
    memory.append(k.detach(), v.detach(), counts=torch.tensor([3, 7]))
    y, _ = layer(x[:, 7:], memory)
    torch.testing.assert_close(y, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{"recall": 2}, {"position": "alibi"}, {"position": "sinusoidal"}, {"ffn": "swiglu"}, {"visibility": "sliding"},
     {"position": "none", "recall": 1}],
)  # fmt: skip
def test_every_dtype_of_every_option_plays(dtype: torch.dtype, options: dict) -> None:
    model = DSMRModel(_config(**options)).to(dtype).eval()
    played = [token for token, _ in zip(model.generate([1, 2, 3]), range(8), strict=False)]
    assert len(played) == 8
    output = model(torch.randint(0, 30, (2, 9)), targets=torch.randint(0, 30, (2, 9)))
    assert output.loss is not None
    output.loss.backward()


def test_a_row_that_held_nothing_finite_and_was_reset_is_a_fresh_row_for_the_whole_model() -> None:
    model = DSMRModel(_config(recall=2)).eval()
    tokens = torch.randint(0, 30, (2, 14))
    with torch.no_grad():
        state = model.new_state(2)
        model(tokens[:, :6], state)
        for memory in state.memories:
            for x in memory.storage():
                x[0] = float("nan")
        state.reset(torch.tensor([True, False]))
        fresh = model.new_state(2)
        model(tokens[:, :6], fresh)
        fresh.reset(torch.tensor([True, False]))
        for token in tokens[:, 6:].split(1, dim=1):
            expected, found = model(token, fresh).logits, model(token, state).logits
            assert bool(found.isfinite().all())
            torch.testing.assert_close(found, expected)


def test_a_ragged_memory_without_room_is_refused() -> None:
    layer, x = _layer(), torch.randn(2, 1, 32)
    memory = layer.new_memory(2, aligned=True)
    k = torch.randn(2, 2, 3, 8)
    memory.append(k, k, counts=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="3 tokens into a segment, sees 9 before its call"):
        layer(x, memory)
    memory = layer.new_memory(2)
    memory.append(k, k, counts=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="segment_offset is 1, but the memory has seen"):
        layer(x, memory, segment_offset=1)


def test_a_look_at_the_state_in_a_backward_loses_nothing() -> None:
    model = DSMRModel(_config())
    state = model.new_state(2)
    tokens = torch.randint(0, 30, (2, 6))
    output = model(tokens, state, targets=tokens)
    seen = []

    def look(grad: torch.Tensor) -> None:
        with pytest.raises(RuntimeError, match="may have moved on"):
            seen.append(state.position)

    model.head.weight.register_hook(look)
    assert output.loss is not None
    output.loss.backward()
    assert state.position.tolist() == [6, 6]
    assert not seen


def test_copies_of_a_state_are_apart() -> None:
    model = DSMRModel(_config(recall=2))
    state = model.new_state(2)
    tokens = torch.randint(0, 30, (2, 6))
    model(tokens, state)
    other, half = copy.copy(state), state.to(dtype=torch.bfloat16)
    for copied in (other, half):
        copied.recent.zero_()
        model(tokens, copied) if copied is other else None
    assert state.position.tolist() == [6, 6]
    assert torch.equal(state.recent, tokens[:, -2:])
    assert half.memories[0].length is not state.memories[0].length
