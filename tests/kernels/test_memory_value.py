"""The memory as a value: what is read is what was there, whatever recomputes, resets, pickles or strides it meets."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dsmr_kernels import (
    KVMemory,
    MemorySnapshot,
    append_rotated,
    available_backends,
    decode_attention,
    memory_attention,
)
from dsmr_kernels.appending import append_operator
from dsmr_kernels.cases import filled_memory, random_case
from dsmr_kernels.testing import run
from dsmr_kernels.tolerance import error

BACKENDS = [name for name in available_backends() if name != "triton" or not torch.cuda.is_available()]
every = pytest.mark.parametrize("backend", BACKENDS)
reentrant = pytest.mark.parametrize("reentrant", [True, False])
NAN = float("nan")


def _heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def _new(*sizes: int) -> list[torch.Tensor]:
    """Tensors of so many heads and tokens; a third number says how many tensors."""
    heads, tokens, count = (*sizes, 1)[:3]
    return [_heads(2, heads, tokens, 16) for _ in range(count)]


def _memory(seen: int = 9, capacity: int = 6, batch: int = 2, dtype: torch.dtype = torch.float32) -> KVMemory:
    memory = KVMemory.empty(batch, 2, capacity, 16, dtype=dtype)
    if seen:
        memory.append(
            _heads(batch, 2, seen, 16).to(torch.float32 if dtype == torch.int8 else dtype), _heads(batch, 2, seen, 16)
        )
    return memory


def _attend(memory: KVMemory | MemorySnapshot | None, q: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    out = memory_attention(q, q[:, :2], q[:, 2:], memory, horizon=6, backend=backend)
    assert isinstance(out, torch.Tensor)
    return out


# --- recomputation ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
@reentrant
def test_a_checkpointed_call_on_a_snapshot_has_the_gradients_of_one_that_is_not(backend: str, reentrant: bool) -> None:
    q, memory = _heads(2, 4, 5, 16), _memory()
    grads = []
    for again in (False, True):
        leaf, ring = q.clone().requires_grad_(), memory.clone()
        past = ring.snapshot()
        out = (
            checkpoint(_attend, past, leaf, backend, use_reentrant=reentrant) if again else _attend(past, leaf, backend)
        )
        for _ in range(3):
            ring.append(_heads(2, 2, 5, 16), _heads(2, 2, 5, 16))
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@every
@reentrant
def test_a_checkpointed_call_on_a_memory_that_moved_is_refused(backend: str, reentrant: bool) -> None:
    q, memory = _heads(2, 4, 5, 16).requires_grad_(), _memory()
    out = checkpoint(_attend, memory, q, backend, use_reentrant=reentrant)
    memory.append(_heads(2, 2, 5, 16), _heads(2, 2, 5, 16))
    with pytest.raises(RuntimeError, match=r"give the checkpointed call memory\.snapshot\(\)"):
        out.sum().backward()


@reentrant
def test_a_memory_that_nothing_was_written_to_may_be_read_again(reentrant: bool) -> None:
    memory, q = KVMemory.empty(2, 2, 6, 16), _heads(2, 4, 5, 16).requires_grad_()
    checkpoint(_attend, memory, q, None, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, torch.autograd.grad(_attend(None, q).sum(), q)[0])

    def with_one_of_its_own(q: torch.Tensor) -> torch.Tensor:
        own = KVMemory.empty(2, 2, 6, 16)
        first = _attend(own, q)
        own.append(q[:, :2].detach(), q[:, 2:].detach())
        return first + _attend(own, q)

    q.grad = None
    checkpoint(with_one_of_its_own, q, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, torch.autograd.grad(with_one_of_its_own(q).sum(), q)[0])


READS = {
    "without gradients": lambda memory, q: _attend(memory, q.detach()),
    "with gradients": lambda memory, q: _attend(memory, q),
    "a snapshot": lambda memory, q: memory.snapshot(),
    "nothing": lambda memory, q: None,
}


@pytest.mark.slow
@every
@reentrant
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("laid_out", ["as it is", "strided"])
def test_no_read_of_the_new_contents_hides_that_a_memory_moved(
    backend: str, reentrant: bool, read: str, laid_out: str
) -> None:
    memory, q = _memory(), _heads(2, 4, 5, 16).requires_grad_()
    if laid_out == "strided":
        memory = KVMemory(_strided(memory.k), _strided(memory.v), memory.length, memory.position)
        memory.append(*_new(2, 1, 2))
    out = checkpoint(_attend, memory, q, backend, use_reentrant=reentrant)
    memory.append(*_new(2, 5, 2))
    kept = READS[read](memory, q)
    with pytest.raises(RuntimeError, match="may have moved on since"):
        out.sum().backward()
    del kept


@pytest.mark.parametrize("write", ["append", "reset", "crop"])
def test_no_write_is_done_twice(write: str) -> None:
    memory = _memory()
    writes = {
        "append": lambda: memory.append(*_new(2, 1, 2)),
        "reset": lambda: memory.reset(torch.tensor([True, False])),
        "crop": lambda: memory.crop(1),
    }
    q = _heads(2, 4, 5, 16).requires_grad_()
    out = checkpoint(lambda q: (writes[write](), q.exp())[1], q, use_reentrant=True)
    once = [x.clone() for x in memory.tensors().values()]
    with pytest.raises(RuntimeError, match="may have moved on since"):
        out.sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(once, memory.tensors().values(), strict=True))


@reentrant
def test_streaming_without_gradients_before_does_not_hide_a_memory_that_moved(reentrant: bool) -> None:
    memory, q = _memory(), _heads(2, 4, 5, 16).requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            _attend(memory, q)
            memory.append(_heads(2, 2, 5, 16), _heads(2, 2, 5, 16))
    out = checkpoint(_attend, memory, q, None, use_reentrant=reentrant)
    memory.append(_heads(2, 2, 5, 16), _heads(2, 2, 5, 16))
    with pytest.raises(RuntimeError, match=r"may have moved on since"):
        out.sum().backward()


def test_an_append_inside_a_backward_is_refused() -> None:
    memory = _memory()

    def attend_and_append(q: torch.Tensor) -> torch.Tensor:
        out = _attend(memory.snapshot(), q)
        memory.append(q[:, :2].detach(), q[:, 2:].detach())
        return out

    for within in (attend_and_append, lambda q: (memory.append(q[:, :2].detach(), q[:, 2:].detach()), q.exp())[1]):
        out = checkpoint(within, _heads(2, 4, 5, 16).requires_grad_(), use_reentrant=False)
        held = memory.k.clone()
        with pytest.raises(RuntimeError, match=r"may have moved on since"):
            out.sum().backward()
        assert torch.equal(memory.k, held)


@every
def test_a_backward_may_run_twice_while_nothing_is_appended(backend: str) -> None:
    memory, q = _memory(), _heads(2, 4, 5, 16).requires_grad_()
    out = _attend(memory, q, backend)
    once, again = (torch.autograd.grad(out.sum(), q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    memory.append(*_new(2, 5, 2))  # in place: the backward has run
    if backend != "reference":  # which keeps copies
        with pytest.raises(RuntimeError, match="written to in place before the call's backward"):
            torch.autograd.grad(out.sum(), q)


# --- snapshots --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_snapshot_keeps_showing_what_was_there(dtype: torch.dtype) -> None:
    memory = _memory(dtype=dtype)
    view = memory.snapshot()
    shown = {name: x.clone() for name, x in view.tensors().items()}
    memory.append(_heads(2, 2, 4, 16), _heads(2, 2, 4, 16))
    memory.reset(torch.tensor([True, False]))
    memory.append(_heads(2, 2, 1, 16), _heads(2, 2, 1, 16), counts=torch.tensor([1, 0]))
    assert all(torch.equal(x, shown[name]) for name, x in view.tensors().items())
    assert view.snapshot() is view
    with pytest.raises(AttributeError):
        view.append(_heads(2, 2, 1, 16), _heads(2, 2, 1, 16))  # type: ignore[attr-defined]


@pytest.mark.slow
@every
@reentrant
def test_a_snapshot_outlives_the_backward_of_calls_that_read_it(backend: str, reentrant: bool) -> None:
    memory = _memory()
    view = memory.snapshot()
    shown = {name: x.clone() for name, x in view.tensors().items()}
    q = _heads(2, 4, 5, 16)
    expected = None
    for _ in range(2):  # two calls on one snapshot, an append between
        leaf = q.clone().requires_grad_()
        checkpoint(_attend, view, leaf, backend, use_reentrant=reentrant).sum().backward()
        memory.append(*_new(2, 4, 2))
        assert expected is None or torch.equal(leaf.grad, expected)
        expected = leaf.grad
    assert all(torch.equal(x, shown[name]) for name, x in view.tensors().items())
    other = copy.copy(view)
    memory = _memory()
    other, view = copy.copy(memory.snapshot()), None  # a copy holds on its own
    held = other.k.clone()
    memory.append(*_new(2, 4, 2))
    assert torch.equal(other.k, held)


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "reference"]
)  # which keeps what it made of them
@pytest.mark.parametrize("what", ["piece_start", "alibi_slopes", "distance_buckets"])
def test_what_changed_before_the_backward_is_noticed(backend: str, what: str) -> None:
    """A loader that fills the same buffer again, say."""
    case = random_case(queries=9, capacity=6, seen=[9, 3], horizon=6, visibility="sliding")
    options: dict = {"piece_start": torch.full((2, 9), -1, dtype=torch.int32)}
    if what == "alibi_slopes":
        options = {"alibi_slopes": torch.rand(4)}
    if what == "distance_buckets":
        options = {"distance_bias": torch.randn(4, 3), "distance_buckets": torch.tensor([0, 1, 2])}
    q = case.q.requires_grad_()
    out = _biased(
        lambda: memory_attention(q, case.k, case.v, case.memory, **case.options, **options, backend=backend), backend
    )
    if out is None:
        return
    options[what].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_do_not_depend_on_the_default_dtype() -> None:
    case = random_case(queries=70, capacity=40, seen=[57, 30], horizon=40)
    expected = run(case, "sdpa")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run(case, "sdpa")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_the_gradient_of_a_bias_is_the_same_every_time() -> None:
    case = random_case(batch=8, queries=70, capacity=40, seen=[57] * 8, horizon=40, head_dim=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        table, buckets = torch.randn(4, 8).requires_grad_(), torch.arange(8)
        found = set()
        for _ in range(6):
            out = memory_attention(
                case.q, case.k, case.v, case.memory, horizon=40, distance_bias=table, distance_buckets=buckets
            )
            assert isinstance(out, torch.Tensor)
            found.add(torch.autograd.grad(out, table, case.grad)[0].numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.slow  # compiles
def test_compiled_appends_leave_what_somebody_looks_at() -> None:
    memory = _memory()
    append = torch.compile(lambda memory, k, v: memory.append(k, v), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        append(memory, *_new(2, 4, 2))
        view = memory.snapshot()
        held = view.k.clone()
        append(memory, *_new(2, 4, 2))
        assert torch.equal(view.k, held)
        assert not torch.equal(memory.k, held)
        storage = memory.k.data_ptr()
        append(memory, *_new(2, 4, 2))
        assert memory.k.data_ptr() == storage


@pytest.mark.slow  # compiles
@every
def test_an_eager_append_leaves_what_a_compiled_backward_needs(backend: str) -> None:
    memory, q = _memory(), _heads(2, 4, 5, 16)
    grads = []
    for call in (_attend, torch.compile(_attend, fullgraph=True, backend="aot_eager")):
        leaf, ring = q.clone().requires_grad_(), memory.clone()
        ring.append(*(torch.ones(2, 2, 1, 16),) * 2)
        out = call(ring, leaf, backend)
        ring.append(*_new(2, 4, 2))
        out.sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 1e-6


def test_sentences_for_what_does_not_fit() -> None:
    memory, q = _memory(), _heads(2, 4, 1, 16)
    sinks = torch.nn.Parameter(torch.zeros(4))
    assert not decode_attention(q, memory, sinks=sinks).requires_grad
    with pytest.raises(ValueError, match=r"rows must be indices, got torch\.bool"):
        memory.select(torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"piece_start must lie before the end of the call, got \[7, 0\]"):
        memory.append(*_new(2, 2, 2), torch.tensor([[0, 7], [0, 0]], dtype=torch.int32))
    half = KVMemory(memory.k.to(torch.int8), memory.v.to(torch.int8), memory.length, memory.position)
    with pytest.raises(ValueError, match="k_scale and v_scale exactly where it is int8"):
        decode_attention(q, half)
    with pytest.raises(ValueError, match="distance_buckets say nothing without distance_bias"):
        decode_attention(q, memory, distance_buckets=torch.tensor([0]))


def test_appending_copies_only_while_somebody_looks() -> None:
    memory = _memory()
    storage = memory.k.data_ptr()
    memory.append(_heads(2, 2, 2, 16), _heads(2, 2, 2, 16))
    assert memory.k.data_ptr() == storage
    view = memory.snapshot()
    memory.append(_heads(2, 2, 2, 16), _heads(2, 2, 2, 16))
    assert memory.k.data_ptr() != storage == view.k.data_ptr()
    storage = memory.k.data_ptr()
    del view
    memory.append(_heads(2, 2, 2, 16), _heads(2, 2, 2, 16))
    assert memory.k.data_ptr() == storage


def test_counters_stay_where_they_are() -> None:
    memory = _memory()
    where = [x.data_ptr() for x in memory.tensors().values()]
    memory.append(_heads(2, 2, 3, 16), _heads(2, 2, 3, 16))
    memory.append(_heads(2, 2, 3, 16), _heads(2, 2, 3, 16), torch.full((2, 3), 1, dtype=torch.int32))
    memory.reset(torch.tensor([True, False]))
    memory.crop(torch.tensor([0, 1]))
    assert [x.data_ptr() for x in memory.tensors().values()] == where
    assert memory.position.tolist() == [0, 1]


def test_a_snapshot_can_be_appended_to_as_a_value() -> None:
    memory, new = _memory(), (_heads(2, 2, 4, 16), _heads(2, 2, 4, 16))
    more = memory.snapshot().appended(*new)
    assert isinstance(more, KVMemory)
    assert more.seen == 13
    memory.append(*new)
    assert all(torch.equal(x, getattr(memory, name)) for name, x in more.tensors().items())


@every
def test_every_write_in_place_counts(backend: str) -> None:
    for write in (
        lambda memory: append_rotated(
            _heads(2, 4, 1, 16), _heads(2, 2, 1, 16), _heads(2, 2, 1, 16), memory, backend=backend
        ),
        lambda memory: memory.v.zero_(),
        lambda memory: memory.length.zero_(),
    ):
        memory = _memory()
        before = [x._version for x in (memory.k, memory.v, memory.length, memory.position)]
        with torch.no_grad():
            write(memory)
        assert [x._version for x in (memory.k, memory.v, memory.length, memory.position)] != before
        q = _heads(2, 4, 5, 16).requires_grad_()
        out = memory_attention(q, q[:, :2], q[:, 2:], memory, horizon=6, backend="sdpa")
        memory.v.mul_(2)
        with pytest.raises(RuntimeError, match="written to in place before the call's backward"):
            out.sum().backward()


# --- strides ----------------------------------------------------------------------------------------------------------


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Channels first, as a convolution gives them: the last dimension is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.slow
@every
def test_strides_do_not_matter(backend: str) -> None:
    case = random_case(queries=20, capacity=12, seen=[20, 5], horizon=12)
    results = []
    for laid_out in (torch.clone, _strided):
        leaves = [laid_out(x).requires_grad_() for x in (case.q, case.k, case.v)]
        assert case.memory is not None
        memory = KVMemory(
            laid_out(case.memory.k), laid_out(case.memory.v), case.memory.length.clone(), case.memory.position.clone()
        )
        out = memory_attention(*leaves, memory, horizon=12, backend=backend)
        grads = torch.autograd.grad(out, leaves, laid_out(case.grad))
        memory.append(laid_out(case.k), laid_out(case.v))
        decoded = decode_attention(laid_out(case.q[:, :, :1]), memory, backend=backend)
        with torch.no_grad():
            turned = append_rotated(
                laid_out(case.q[:, :, :2]),
                laid_out(case.k[:, :, :2]),
                laid_out(case.v[:, :, :2]),
                memory,
                backend=backend,
            )
        results.append([out, *grads, decoded, turned, *memory.tensors().values()])
    for plain, strided in zip(*results, strict=True):
        assert error(strided, plain) < 1e-5


# --- resets -----------------------------------------------------------------------------------------------------------


def _spoilt(dtype: torch.dtype, how: str) -> tuple[KVMemory, KVMemory]:
    """A memory whose row 0 held NaN and was reset, and one whose row 0 never held anything."""
    memory, fresh = _memory(dtype=dtype), _memory(dtype=dtype)
    for name, x in memory.tensors().items():
        fresh.tensors()[name].copy_(x)
    for x in memory.storage():
        x[0] = NAN if x.dtype.is_floating_point else 127
    rows = torch.tensor([True, False])
    if how == "rows":
        memory.reset(rows)
        fresh.reset(rows)
    else:
        start = torch.tensor([[0], [-1]], dtype=torch.int32)
        new = _heads(2, 2, 1, 16), _heads(2, 2, 1, 16)
        memory.append(*new, start)
        fresh.append(*new, start)
    for x in fresh.storage():
        held = int(fresh.length[0])
        x[0, :, held:] = 0
    return memory, fresh


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("how", ["rows", "new piece"])
def test_a_reset_row_is_a_fresh_row_whatever_it_held(backend: str, dtype: torch.dtype, how: str) -> None:
    memory, fresh = _spoilt(dtype, how)
    q = _heads(2, 4, 5, 16)
    for ring in (memory, fresh):
        ring.seen = 0
    results = []
    for ring in (memory, fresh):
        leaf = q.clone().requires_grad_()
        out = _attend(ring, leaf, backend)
        out.sum().backward()
        ring.append(q[:, :2, :2], q[:, 2:, :2])
        decoded = [decode_attention(q[:, :, 2 - n : 2], ring, backend=backend) for n in (1, 2)]
        results.append([out, leaf.grad, *decoded, *ring.ordered()[:2]])
    for spoilt, clean in zip(*results, strict=True):
        assert bool(spoilt.isfinite().all())
        assert error(spoilt, clean) < 1e-6


# --- modes and copies -------------------------------------------------------------------------------------------------


def test_a_memory_made_in_inference_mode_may_be_used_anywhere() -> None:
    q = _heads(2, 4, 5, 16)
    with torch.inference_mode():
        memory = _memory()
        view = memory.snapshot()
        memory.append(_heads(2, 2, 2, 16), _heads(2, 2, 2, 16))  # copies first
        others = [memory.clone(), memory.to(dtype=torch.float64), memory.select([1, 0]), memory.repeat(2)]
        assert view.seen == 9
    memory.append(_heads(2, 2, 2, 16), _heads(2, 2, 2, 16))
    leaf = q.clone().requires_grad_()
    _attend(memory, leaf).sum().backward()
    for other in others:
        assert not any(x.is_inference() for x in other.tensors().values())
    with torch.inference_mode():
        foreign = KVMemory(**{name: x.clone() for name, x in memory.tensors().items()})
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        _attend(foreign, leaf)
    assert not foreign.clone().k.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_memories_travel(dtype: torch.dtype) -> None:
    memory = _memory(dtype=dtype)
    held = memory.snapshot()
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(memory)),
        torch.load(file, weights_only=False),
        copy.deepcopy(memory),
        copy.copy(memory),
        pickle.loads(pickle.dumps(held)).appended(_heads(2, 2, 0, 16), _heads(2, 2, 0, 16)),
    ]
    for other in copies:
        assert other.seen == memory.seen
        assert all(torch.equal(x, getattr(memory, name)) for name, x in other.tensors().items())
        other.append(_heads(2, 2, 1, 16), _heads(2, 2, 1, 16))
        assert not torch.equal(other.k, memory.k)


def test_a_memory_is_no_container_that_others_rebuild() -> None:
    """As FSDP does that casts a layer's inputs: a rebuilt memory would be appended to instead of the caller's."""
    from torch.utils._pytree import tree_map

    memory = _memory()
    assert tree_map(lambda x: x.bfloat16() if isinstance(x, torch.Tensor) else x, [memory])[0] is memory
    assert not dataclasses.is_dataclass(memory)


@pytest.mark.parametrize("capacity", [4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_may_advance_by_different_numbers(capacity: int, dtype: torch.dtype) -> None:
    """As if each row had been appended to alone; and the way for devices that are not looked at does the same."""
    from dsmr_kernels.appending import append

    memory = KVMemory.empty(3, 2, capacity, 16, dtype=dtype)
    alone = [KVMemory.empty(1, 2, capacity, 16, dtype=dtype) for _ in range(3)]
    elsewhere = memory.clone()
    for counts in ([2, 0, 5], [3, 3, 3], [0, 6, 1], [6, 1, 0]):
        k, v = _heads(3, 2, 6, 16), _heads(3, 2, 6, 16)
        starts = torch.tensor([[-1] * 6, [1] * 6, [-1, 1, 1, 1, 1, 1]], dtype=torch.int32) if counts[0] == 3 else None
        number = torch.tensor(counts)
        memory.append(k, v, starts, counts=number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the way that never looks
            scales = (elsewhere.k_scale, elsewhere.v_scale)
            append(elsewhere.k, elsewhere.v, *scales, elsewhere.length, elsewhere.position, k, v, starts, number)
        for row, (ring, count) in enumerate(zip(alone, counts, strict=True)):
            here = slice(row, row + 1)
            ring.append(k[here, :, :count], v[here, :, :count], None if starts is None else starts[here, :count])
    for row, ring in enumerate(alone):
        for whole in (memory, elsewhere):
            for found, expected in zip(whole.ordered(), ring.ordered(), strict=True):
                assert torch.equal(found[row], expected[0])
            assert whole.position[row] == ring.position[0]
    assert isinstance(memory.seen, torch.Tensor)
    assert memory.seen.tolist() == [11, 10, 9]
    with pytest.raises(ValueError, match=r"counts must lie between 0 and the 6 tokens of the call, got \[7, 0, 0\]"):
        memory.append(k, v, counts=torch.tensor([7, 0, 0]))


def test_rows_are_selected_repeated_and_cropped() -> None:
    memory = filled_memory(3, 2, 6, 16, [9, 2, 0])
    memory.seen = 9
    rows = memory.select([2, 0, 0])
    assert rows.position.tolist() == [0, 9, 9]
    assert torch.equal(rows.k, memory.k[[2, 0, 0]])
    twice = memory.repeat(2)
    assert twice.position.tolist() == [9, 9, 2, 2, 0, 0]
    assert twice.batch == 6
    before = memory.clone()
    memory.select([0]).append(_heads(1, 2, 1, 16), _heads(1, 2, 1, 16))
    assert torch.equal(memory.k, before.k)

    kept = memory.clone()
    memory.append(_heads(3, 2, 2, 16), _heads(3, 2, 2, 16))
    memory.crop(2)
    assert memory.seen == 9
    assert memory.position.tolist() == [9, 2, 0]
    assert memory.length.tolist() == [4, 2, 0]  # two of row 0 were pushed out
    assert torch.equal(memory.ordered()[0][1], kept.ordered()[0][1])
    assert torch.equal(memory.ordered()[0][0, :, 2:], kept.ordered()[0][0, :, 2:])
    with pytest.raises(ValueError, match=r"the tokens that each row holds, \[4, 2, 0\], got 1"):
        memory.crop(1)


# --- what a call may be asked -----------------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_the_log_sum_exp_has_a_gradient(backend: str) -> None:
    case = random_case(queries=20, capacity=12, seen=[20, 5], horizon=9, segment_length=7)
    pull = torch.randn(2, 4, 20)
    grads = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        here = case.to(dtype)
        leaves = [x.requires_grad_() for x in (here.q, here.k, here.v)]
        out, lse = memory_attention(*leaves, here.memory, **here.options, return_lse=True, backend=name)
        both = torch.autograd.grad([out, lse], leaves, [here.grad, pull.to(lse.dtype)])
        out, lse = memory_attention(*leaves, here.memory, **here.options, return_lse=True, backend=name)
        alone = torch.autograd.grad(lse, leaves, pull.to(lse.dtype), allow_unused=True, materialize_grads=True)
        grads.append([*both, *alone])
    for exact, found in zip(*grads, strict=True):
        assert error(found, exact) < 1e-5


@every
def test_two_attentions_are_merged_by_their_log_sum_exps(backend: str) -> None:
    """Over memory and call at once = over each apart, merged: outputs and gradients."""
    case = random_case(queries=10, capacity=12, seen=[20, 20], horizon=12, head_dim=16)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    whole = memory_attention(*leaves, case.memory, horizon=12, backend=backend)
    near, near_lse = memory_attention(*leaves, case.memory, horizon=5, return_lse=True, backend=backend)
    own, own_lse = memory_attention(*leaves, horizon=0, return_lse=True, backend=backend)
    past = torch.logaddexp(near_lse, own_lse)  # the call's keys counted twice
    assert bool((past > near_lse).all())
    merged = torch.lerp(near, own, torch.sigmoid(own_lse - near_lse).unsqueeze(-1))
    expected = (near * near_lse.exp().unsqueeze(-1) + own * own_lse.exp().unsqueeze(-1)) / past.exp().unsqueeze(-1)
    assert error(merged, expected) < 1e-5
    assert bool(torch.isfinite(torch.autograd.grad(merged.sum() + whole.sum(), leaves)[0]).all())


@pytest.mark.slow
@every
@pytest.mark.parametrize("head_dims", [(16, 16), (16, 24), (24, 16)])
def test_values_may_have_a_head_dim_of_their_own(backend: str, head_dims: tuple[int, int]) -> None:
    wide, narrow = head_dims
    memory = KVMemory.empty(2, 2, 12, wide, v_head_dim=narrow)
    memory.append(_heads(2, 2, 20, wide), _heads(2, 2, 20, narrow))
    q, k, v = _heads(2, 4, 9, wide), _heads(2, 2, 9, wide), _heads(2, 2, 9, narrow)
    grads = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        try:
            out = memory_attention(*leaves, memory.to(dtype=dtype), horizon=12, segment_length=4, backend=name)
        except ValueError as reason:
            if "values of the head_dim of keys" in str(reason):  # a backend may say that it does not
                return
            raise
        assert out.shape == (2, 4, 9, narrow)
        ring = memory.to(dtype=dtype).clone()
        ring.append(leaves[1].detach(), leaves[2].detach())
        decoded = [decode_attention(leaves[0].detach()[:, :, -n:], ring, backend=name) for n in (1, 3)]
        grads.append([out, *torch.autograd.grad(out.square().sum(), leaves), *decoded])
    for exact, found in zip(*grads, strict=True):
        assert error(found, exact) < 2e-5


@pytest.mark.slow
@every
def test_each_row_may_be_at_its_own_place_in_a_segment(backend: str) -> None:
    case = random_case(batch=3, queries=20, capacity=30, seen=[40, 7, 0], horizon=9)
    offsets = torch.tensor([0, 4, 6])
    options = {"horizon": 9, "segment_length": 7, "backend": backend}
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*leaves, case.memory, **options, segment_offset=offsets)
    grads = torch.autograd.grad(out, leaves, case.grad)
    assert case.memory is not None
    for row, offset in enumerate(offsets.tolist()):
        here = slice(row, row + 1)
        mine = [x.detach()[here].requires_grad_() for x in leaves]
        alone = memory_attention(*mine, case.memory.select([row]), **options, segment_offset=offset)
        assert error(out[here], alone) < 1e-5
        for whole, own in zip(grads, torch.autograd.grad(alone, mine, case.grad[here]), strict=True):
            assert error(whole[here], own) < 1e-5
    with pytest.raises(ValueError, match=r"segment_offset must be >= 0 and < segment_length = 7, got \[0, 4, 7\]"):
        memory_attention(*leaves, case.memory, **options, segment_offset=torch.tensor([0, 4, 7]))


@every
def test_sinks_take_weight_and_learn(backend: str) -> None:
    case = random_case(queries=12, capacity=12, seen=[20, 5], horizon=9)
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        here = case.to(dtype)
        sinks = torch.tensor([-1.0, 0.0, 2.0, -30.0], dtype=dtype, requires_grad=True)
        leaves = [x.requires_grad_() for x in (here.q, here.k, here.v)]
        out, lse = memory_attention(*leaves, here.memory, horizon=9, sinks=sinks, return_lse=True, backend=name)
        grads = torch.autograd.grad(out, [*leaves, sinks], here.grad)
        ring = here.memory.clone()
        ring.append(here.k.detach(), here.v.detach())
        decoded = [
            decode_attention(here.q.detach()[:, :, -n:], ring, sinks=sinks.detach(), backend=name) for n in (1, 3)
        ]
        results.append([out, lse, *grads, *decoded])
    for exact, found in zip(*results, strict=True):
        assert error(found, exact) < 1e-5
    # The definition: one more key whose score is the sink and whose value is zero.
    q, k, v = (x.double() for x in (case.q, case.k.repeat_interleave(2, 1), case.v.repeat_interleave(2, 1)))
    scores = (q @ k.mT) * 0.25 + torch.full((12, 12), -torch.inf).triu(1).double()
    logits = torch.tensor([-1.0, 0.0, 2.0, -30.0]).double().view(1, 4, 1, 1).expand(2, -1, 12, 1)
    expected = torch.cat([scores, logits], -1).softmax(-1)[..., :-1] @ v
    out = memory_attention(case.q, case.k, case.v, horizon=0, sinks=logits[0, :, 0, 0].float(), backend=backend)
    assert error(out, expected) < 1e-5


def _biased(call, backend: str):  # type: ignore[no-untyped-def]
    """The call's result, or None where the backend says that it has no bias by distance."""
    try:
        return call()
    except ValueError as reason:
        if backend == "triton" and "no learned bias by distance" in str(reason):
            return None
        raise


@every
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_a_bias_by_distance_is_added_and_learned(backend: str, visibility: str) -> None:
    case = random_case(queries=20, capacity=12, seen=[20, 5], horizon=9, segment_length=7, visibility=visibility)
    buckets = torch.tensor([0, 1, 2, 2, 3, 3, 3, 4])
    table = torch.randn(4, 5)
    results = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        here = case.to(dtype)
        leaves = [x.requires_grad_() for x in (here.q, here.k, here.v, table.to(dtype))]
        options = {"distance_bias": leaves[3], "distance_buckets": buckets, "backend": name}
        out = _biased(lambda h=here, x=leaves, o=options: memory_attention(*x[:3], h.memory, **h.options, **o), backend)
        if out is None:
            return
        grads = torch.autograd.grad(out, leaves, here.grad)
        ring = here.memory.clone()
        ring.append(here.k.detach(), here.v.detach())
        decoded = [decode_attention(here.q.detach()[:, :, -n:], ring, **options) for n in (1, 3)]
        results.append([out, *grads, *decoded])
    for exact, found in zip(*results, strict=True):
        assert error(found, exact) < 2e-5
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    linear = {"distance_bias": -slopes[:, None] * torch.arange(40), "distance_buckets": torch.arange(40)}
    out = memory_attention(case.q, case.k, case.v, case.memory, **case.options, **linear, backend=backend)
    alibi = memory_attention(case.q, case.k, case.v, case.memory, **case.options, alibi_slopes=slopes, backend=backend)
    assert error(out, alibi) < 1e-5
    with pytest.raises(ValueError, match="distance_buckets must lie between 0 and 4, the last column"):
        memory_attention(case.q, case.k, case.v, horizon=0, distance_bias=table, distance_buckets=torch.tensor([5]))
    with pytest.raises(ValueError, match="distance_bias needs distance_buckets"):
        memory_attention(case.q, case.k, case.v, horizon=0, distance_bias=table)


@pytest.mark.slow
@every
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_only_the_gradients_that_are_wanted_are_made(backend: str, wanted: tuple[int, ...], visibility: str) -> None:
    case = random_case(queries=20, capacity=12, seen=[20, 5], horizon=9, segment_length=7, visibility=visibility)
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*whole, case.memory, **case.options, backend=backend)
    expected = torch.autograd.grad(out, whole, case.grad)
    some = [x.clone().requires_grad_(bool(want)) for x, want in zip((case.q, case.k, case.v), wanted, strict=True)]
    out = memory_attention(*some, case.memory, **case.options, backend=backend)
    out.backward(case.grad)
    for x, want, grad in zip(some, wanted, expected, strict=True):
        assert (x.grad is not None) == bool(want)
        assert not want or error(x.grad, grad) < 1e-6


@pytest.mark.parametrize("detach", [False, True])
def test_the_gradients_of_the_definition_are_those_of_its_values(detach: bool) -> None:
    """By finite differences, in float64: of q, sinks and the bias, and without detaching of keys and values too."""
    case = random_case(
        batch=1, heads=2, kv_heads=1, queries=5, head_dim=3, capacity=4, seen=[9], horizon=3, dtype=torch.float64
    )
    given = {"q": case.q, "sinks": torch.randn(2).double(), "distance_bias": torch.randn(2, 3).double()}
    if not detach:
        given |= {"k": case.k, "v": case.v}
    buckets = torch.tensor([0, 1, 1, 2])

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        named = {"k": case.k, "v": case.v, **dict(zip(given, leaves, strict=True))}
        out = memory_attention(
            **named, memory=case.memory, horizon=3, segment_length=2, detach_segments=detach, backend="reference",
            distance_buckets=buckets,
        )  # fmt: skip
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(call, [x.clone().requires_grad_() for x in given.values()])


@every
def test_torch_func_differentiates(backend: str) -> None:
    case = random_case(queries=9, capacity=12, seen=[20, 5], horizon=9)

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = memory_attention(q, k, v, case.memory, horizon=9, backend=backend)
        return (out * case.grad).sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(case.q, case.k, case.v)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    for one, other in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        assert error(one, other) < 1e-6


def test_values_of_tensors_on_a_device_are_looked_at_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.memory import may_look

    elsewhere = torch.empty(2, dtype=torch.int32, device="meta")
    assert not may_look(elsewhere)
    monkeypatch.setenv("DSMR_CHECK", "1")
    assert may_look(elsewhere)


@pytest.mark.slow  # traces
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_append_operator_says_what_it_mutates(dtype: torch.dtype, ragged: bool) -> None:
    memory = _memory(dtype=dtype)
    tensors = (memory.k, memory.v, memory.k_scale, memory.v_scale, memory.length, memory.position)
    starts = torch.tensor([[-1, 1, 1], [-1, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([3, 2]) if ragged else None
    torch.library.opcheck(append_operator, (*tensors, *_new(2, 3, 2), starts, counts))
