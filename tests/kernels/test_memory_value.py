"""The memory as a value: what is read is what was there, whatever resets, pickles or strides it meets."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from small_memories import a_memory, attend, every, heads, new, reentrant, strided
from torch.utils.checkpoint import checkpoint

from dsmr_kernels import KVMemory, append_rotated, decode_attention, memory_attention
from dsmr_kernels.cases import filled_memory, random_case
from dsmr_kernels.tolerance import error

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_snapshot_keeps_showing_what_was_there(dtype: torch.dtype) -> None:
    memory = a_memory(dtype=dtype)
    view = memory.snapshot()
    shown = {name: x.clone() for name, x in view.tensors().items()}
    memory.append(heads(2, 2, 4, 16), heads(2, 2, 4, 16))
    memory.reset(torch.tensor([True, False]))
    memory.append(heads(2, 2, 1, 16), heads(2, 2, 1, 16), counts=torch.tensor([1, 0]))
    assert all(torch.equal(x, shown[name]) for name, x in view.tensors().items())
    assert view.snapshot() is view
    with pytest.raises(AttributeError):
        view.append(heads(2, 2, 1, 16), heads(2, 2, 1, 16))  # type: ignore[attr-defined]


@pytest.mark.slow
@every
@reentrant
def test_a_snapshot_outlives_the_backward_of_calls_that_read_it(backend: str, reentrant: bool) -> None:
    memory = a_memory()
    view = memory.snapshot()
    shown = {name: x.clone() for name, x in view.tensors().items()}
    q = heads(2, 4, 5, 16)
    expected = None
    for _ in range(2):  # two calls on one snapshot, an append between
        leaf = q.clone().requires_grad_()
        checkpoint(attend, view, leaf, backend, use_reentrant=reentrant).sum().backward()
        memory.append(*new(2, 4, 2))
        assert expected is None or torch.equal(leaf.grad, expected)
        expected = leaf.grad
    assert all(torch.equal(x, shown[name]) for name, x in view.tensors().items())
    other = copy.copy(view)
    memory = a_memory()
    other, view = copy.copy(memory.snapshot()), None  # a copy holds on its own
    held = other.k.clone()
    memory.append(*new(2, 4, 2))
    assert torch.equal(other.k, held)


@pytest.mark.slow  # compiles
def test_compiled_appends_leave_what_somebody_looks_at() -> None:
    memory = a_memory()
    append = torch.compile(lambda memory, k, v: memory.append(k, v), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        append(memory, *new(2, 4, 2))
        view = memory.snapshot()
        held = view.k.clone()
        append(memory, *new(2, 4, 2))
        assert torch.equal(view.k, held)
        assert not torch.equal(memory.k, held)
        storage = memory.k.data_ptr()
        append(memory, *new(2, 4, 2))
        assert memory.k.data_ptr() == storage


@pytest.mark.slow  # compiles
@every
def test_an_eager_append_leaves_what_a_compiled_backward_needs(backend: str) -> None:
    memory, q = a_memory(), heads(2, 4, 5, 16)
    grads = []
    for call in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaf, ring = q.clone().requires_grad_(), memory.clone()
        ring.append(*(torch.ones(2, 2, 1, 16),) * 2)
        out = call(ring, leaf, backend)
        ring.append(*new(2, 4, 2))
        out.sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 1e-6


def test_appending_copies_only_while_somebody_looks() -> None:
    memory = a_memory()
    storage = memory.k.data_ptr()
    memory.append(heads(2, 2, 2, 16), heads(2, 2, 2, 16))
    assert memory.k.data_ptr() == storage
    view = memory.snapshot()
    memory.append(heads(2, 2, 2, 16), heads(2, 2, 2, 16))
    assert memory.k.data_ptr() != storage == view.k.data_ptr()
    storage = memory.k.data_ptr()
    del view
    memory.append(heads(2, 2, 2, 16), heads(2, 2, 2, 16))
    assert memory.k.data_ptr() == storage


def test_counters_stay_where_they_are() -> None:
    memory = a_memory()
    where = [x.data_ptr() for x in memory.tensors().values()]
    memory.append(heads(2, 2, 3, 16), heads(2, 2, 3, 16))
    memory.append(heads(2, 2, 3, 16), heads(2, 2, 3, 16), torch.full((2, 3), 1, dtype=torch.int32))
    memory.reset(torch.tensor([True, False]))
    memory.crop(torch.tensor([0, 1]))
    assert [x.data_ptr() for x in memory.tensors().values()] == where
    assert memory.position.tolist() == [0, 1]


def test_a_snapshot_can_be_appended_to_as_a_value() -> None:
    memory, new = a_memory(), (heads(2, 2, 4, 16), heads(2, 2, 4, 16))
    more = memory.snapshot().appended(*new)
    assert isinstance(more, KVMemory)
    assert more.seen == 13
    memory.append(*new)
    assert all(torch.equal(x, getattr(memory, name)) for name, x in more.tensors().items())


@every
def test_every_write_in_place_counts(backend: str) -> None:
    for write in (
        lambda memory: append_rotated(
            heads(2, 4, 1, 16), heads(2, 2, 1, 16), heads(2, 2, 1, 16), memory, backend=backend
        ),
        lambda memory: memory.v.zero_(),
        lambda memory: memory.length.zero_(),
    ):
        memory = a_memory()
        before = [x._version for x in (memory.k, memory.v, memory.length, memory.position)]
        with torch.no_grad():
            write(memory)
        assert [x._version for x in (memory.k, memory.v, memory.length, memory.position)] != before
        q = heads(2, 4, 5, 16).requires_grad_()
        out = memory_attention(q, q[:, :2], q[:, 2:], memory, horizon=6, backend="sdpa")
        memory.v.mul_(2)
        with pytest.raises(RuntimeError, match="written to in place before the call's backward"):
            out.sum().backward()


def test_a_write_to_any_tensor_of_a_memory_is_noticed() -> None:
    """Scales, too; and that something was written at all is what a recomputation asks."""
    for dtype, count in ((torch.float32, 4), (torch.int8, 6)):
        memory = KVMemory.empty(2, 2, 6, 16, dtype=dtype)
        assert not memory.moved
        for x in memory.tensors().values():
            before = memory.versions()
            x.zero_()
            assert len(before) == count
            assert sum(a != b for a, b in zip(before, memory.versions(), strict=True)) == 1
        memory.append(heads(2, 2, 1, 16), heads(2, 2, 1, 16))
        assert memory.moved


def test_what_is_not_held_is_shown_as_zeros_whatever_the_capacity() -> None:
    for capacity in (1, 3):
        memory = KVMemory.empty(1, 2, capacity, 16)
        memory.append(heads(1, 2, 4, 16), heads(1, 2, 4, 16))
        memory.reset()
        k, v, mask = memory.ordered()
        assert not any(x.any() for x in (k, v, mask))


@pytest.mark.slow
@every
def test_strides_do_not_matter(backend: str) -> None:
    case = random_case(queries=20, capacity=12, seen=[20, 5], horizon=12)
    results = []
    for laid_out in (torch.clone, strided):
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
    for plain, other in zip(*results, strict=True):
        assert error(other, plain) < 1e-5


def _spoilt(dtype: torch.dtype, how: str) -> tuple[KVMemory, KVMemory]:
    """A memory whose row 0 held NaN and was reset, and one whose row 0 never held anything."""
    memory, fresh = a_memory(dtype=dtype), a_memory(dtype=dtype)
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
        new = heads(2, 2, 1, 16), heads(2, 2, 1, 16)
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
    q = heads(2, 4, 5, 16)
    for ring in (memory, fresh):
        ring.seen = 0
    results = []
    for ring in (memory, fresh):
        leaf = q.clone().requires_grad_()
        out = attend(ring, leaf, backend)
        out.sum().backward()
        ring.append(q[:, :2, :2], q[:, 2:, :2])
        decoded = [decode_attention(q[:, :, 2 - n : 2], ring, backend=backend) for n in (1, 2)]
        results.append([out, leaf.grad, *decoded, *ring.ordered()[:2]])
    for spoilt, clean in zip(*results, strict=True):
        assert bool(spoilt.isfinite().all())
        assert error(spoilt, clean) < 1e-6


def test_a_memory_made_in_inference_mode_may_be_used_anywhere() -> None:
    q = heads(2, 4, 5, 16)
    with torch.inference_mode():
        memory = a_memory()
        view = memory.snapshot()
        memory.append(heads(2, 2, 2, 16), heads(2, 2, 2, 16))  # copies first
        others = [
            KVMemory.empty(2, 2, 6, 16),
            memory.clone(),
            memory.to(dtype=torch.float64),
            memory.select([1, 0]),
            memory.repeat(2),
        ]
        assert view.seen == 9
    memory.append(heads(2, 2, 2, 16), heads(2, 2, 2, 16))
    leaf = q.clone().requires_grad_()
    attend(memory, leaf).sum().backward()
    for other in others:
        assert not any(x.is_inference() for x in other.tensors().values())
    with torch.inference_mode():
        foreign = KVMemory(**{name: x.clone() for name, x in memory.tensors().items()})
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        attend(foreign, leaf)
    assert not foreign.clone().k.is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_memories_travel(dtype: torch.dtype) -> None:
    memory = a_memory(dtype=dtype)
    held = memory.snapshot()
    file = io.BytesIO()
    torch.save(memory, file)
    file.seek(0)
    copies = [
        pickle.loads(pickle.dumps(memory)),
        torch.load(file, weights_only=False),
        copy.deepcopy(memory),
        copy.copy(memory),
        pickle.loads(pickle.dumps(held)).appended(heads(2, 2, 0, 16), heads(2, 2, 0, 16)),
    ]
    for other in copies:
        assert other.seen == memory.seen
        assert all(torch.equal(x, getattr(memory, name)) for name, x in other.tensors().items())
        other.append(heads(2, 2, 1, 16), heads(2, 2, 1, 16))
        assert not torch.equal(other.k, memory.k)


def test_a_memory_is_no_container_that_others_rebuild() -> None:
    """As FSDP does that casts a layer's inputs: a rebuilt memory would be appended to instead of the caller's."""
    from torch.utils._pytree import tree_map

    memory = a_memory()
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
    pieces = torch.tensor([[-1] * 6, [1] * 6, [-1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    begun = torch.zeros(3, 6, dtype=torch.int32)  # a piece begins, also in the row that takes nothing of it
    at_last = torch.tensor([[-1, -1, *[2] * 4], [0] * 6, [*[-1] * 5, 5]], dtype=torch.int32)  # with the last one taken
    for counts, starts in (
        ([2, 0, 5], None),
        ([3, 3, 3], pieces),
        ([0, 6, 1], None),
        ([4, 0, 1], begun),
        ([6, 1, 0], None),
        ([3, 1, 6], at_last),
    ):
        k, v = heads(3, 2, 6, 16), heads(3, 2, 6, 16)
        number = torch.tensor(counts)
        memory.append(k, v, starts, counts=number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the way that never looks
            scales = (elsewhere.k_scale, elsewhere.v_scale)
            append(elsewhere.k, elsewhere.v, *scales, elsewhere.length, elsewhere.position, k, v, starts, number)
        for row, (ring, count) in enumerate(zip(alone, counts, strict=True)):
            here = slice(row, row + 1)
            ring.append(k[here, :, :count], v[here, :, :count], None if starts is None else starts[here, :count])
        for row, ring in enumerate(alone):  # after each call, because a new piece hides what went wrong before it
            for whole in (memory, elsewhere):
                for found, expected in zip(whole.ordered(), ring.ordered(), strict=True):
                    assert torch.equal(found[row], expected[0])
                assert whole.position[row] == ring.position[0]
    assert isinstance(memory.seen, torch.Tensor)
    assert memory.seen.tolist() == [18, 11, 16]
    with pytest.raises(ValueError, match=r"counts must lie between 0 and the 6 tokens of the call, got \[7, 0, 0\]"):
        memory.append(k, v, counts=torch.tensor([7, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_that_advance_alike_are_stored_alike_by_the_way_that_never_looks(dtype: torch.dtype) -> None:
    from dsmr_kernels.appending import append

    memory = KVMemory.empty(2, 2, 5, 16, dtype=dtype)
    elsewhere = memory.clone()
    for count in (1, 3, 0, 5, 7, 2):
        k, v = heads(2, 2, count, 16), heads(2, 2, count, 16)
        memory.append(k, v)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            scales = (elsewhere.k_scale, elsewhere.v_scale)
            append(elsewhere.k, elsewhere.v, *scales, elsewhere.length, elsewhere.position, k, v, None, None)
        for found, expected in zip(elsewhere.ordered(), memory.ordered(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("compiling", [False, True])
def test_a_graph_holds_operators_that_say_what_they_write(monkeypatch: pytest.MonkeyPatch, compiling: bool) -> None:
    """And what is done eagerly does without them."""
    called = []
    for name in ("append", "retain", "settle"):
        for written in (name, f"{name}_operator"):
            monkeypatch.setattr(f"dsmr_kernels.memory.{written}", lambda *_, name=written: called.append(name))
    newest = KVMemory.empty(2, 2, 4, 16)
    chosen = KVMemory.empty(2, 2, 7, 16, retention="uniform", room=3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for memory in (newest, chosen):
        memory.append(heads(2, 2, 3, 16), heads(2, 2, 3, 16))
    chosen.settle()
    assert called == [name + "_operator" * compiling for name in ("append", "retain", "settle")]


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
    memory.select([0]).append(heads(1, 2, 1, 16), heads(1, 2, 1, 16))
    assert torch.equal(memory.k, before.k)

    kept = memory.clone()
    memory.append(heads(3, 2, 2, 16), heads(3, 2, 2, 16))
    memory.crop(2)
    assert memory.seen == 9
    assert memory.position.tolist() == [9, 2, 0]
    assert memory.length.tolist() == [4, 2, 0]  # two of row 0 were pushed out
    assert torch.equal(memory.ordered()[0][1], kept.ordered()[0][1])
    assert torch.equal(memory.ordered()[0][0, :, 2:], kept.ordered()[0][0, :, 2:])
    with pytest.raises(ValueError, match=r"the tokens that each row holds, \[4, 2, 0\], got 1"):
        memory.crop(1)
    alike = kept.clone()
    alike.crop(np.int64(0))  # a number of NumPy's
    assert torch.equal(alike.length, kept.length)
    with pytest.raises(ValueError, match="count must lie between 0 and the tokens that each row holds"):
        alike.crop(np.int64(-1))
