"""The ring equals concatenate-and-slice whatever happens to it, in storage that never grows, moves or is shared."""

import gc
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmr_kernels import KVMemory, appending, available_backends, memory_attention
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import run
from dsmr_kernels.tolerance import error

every = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])
HEADS, DIM = 2, 3


def tokens(batch: int, count: int, first: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell their token: number t in row b is 1000 * b + t, values are negative."""
    number = torch.arange(first, first + count) + 1000 * torch.arange(batch)[:, None]
    k = number[:, None, :, None].expand(batch, HEADS, count, DIM).float().clone()
    k += torch.arange(HEADS)[None, :, None, None] * 0.25
    return k, -k


class Concatenated:
    """What the ring claims to be: a list of the tokens of the piece, cut to the newest `capacity`."""

    def __init__(self, batch: int, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch)]
        self.seen = [0] * batch

    def append(self, k: torch.Tensor, v: torch.Tensor, starts: list[list[int]] | None) -> None:
        for b in range(len(self.rows)):
            for t in range(k.shape[2]):
                if starts is not None and starts[b][t] == t:
                    self.reset(b)
                self.rows[b].append((k[b, :, t], v[b, :, t]))
                self.seen[b] += 1
            self.rows[b] = self.rows[b][len(self.rows[b]) - min(len(self.rows[b]), self.capacity) :]

    def reset(self, row: int) -> None:
        self.rows[row], self.seen[row] = [], 0


def assert_same(memory: KVMemory, model: Concatenated) -> None:
    k, v, mask = memory.ordered()
    assert memory.position.tolist() == model.seen
    assert memory.length.tolist() == [len(row) for row in model.rows]
    assert (memory.length.dtype, memory.position.dtype) == (torch.int32, torch.int64)
    assert k.shape == v.shape == memory.k.shape
    assert mask.sum(1).tolist() == memory.length.tolist()
    for b, row in enumerate(model.rows):
        assert mask[b].tolist() == [False] * (model.capacity - len(row)) + [True] * len(row)
        for index, (key, value) in enumerate(reversed(row)):
            assert torch.equal(k[b, :, -1 - index], key)
            assert torch.equal(v[b, :, -1 - index], value)
            slot = (model.seen[b] - 1 - index) % model.capacity  # the docstring's promise to the backends
            assert torch.equal(memory.k[b, :, slot], key)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_ring_equals_concatenate_and_slice(data: st.DataObject) -> None:
    draw = data.draw
    batch, capacity = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    memory, model = KVMemory.empty(batch, HEADS, capacity, DIM), Concatenated(batch, capacity)
    pointers = memory.k.data_ptr(), memory.v.data_ptr()
    seen = 0
    for _ in range(draw(st.integers(1, 8))):
        action = draw(st.sampled_from(["append", "append", "pieces", "reset rows", "reset"]))
        if action == "reset":
            memory.reset()
            for row in range(batch):
                model.reset(row)
        elif action == "reset rows":
            rows = draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
            memory.reset(torch.tensor(rows, dtype=torch.bool))
            for row in range(batch):
                if rows[row]:
                    model.reset(row)
        else:
            count = draw(st.integers(0, 25))
            k, v = tokens(batch, count, seen + 1)
            seen += count
            starts = None
            if action == "pieces":
                starts = []
                for _ in range(batch):
                    start, row = -draw(st.integers(1, 5)), []
                    for t in range(count):
                        start = t if draw(st.integers(0, 5)) == 0 else start
                        row.append(start)
                    starts.append(row)
            memory.append(
                k, v, None if starts is None else torch.tensor(starts, dtype=torch.int32).reshape(batch, count)
            )
            model.append(k, v, starts)
        assert_same(memory, model)
    assert (memory.k.data_ptr(), memory.v.data_ptr()) == pointers


@pytest.mark.parametrize("sizes", [[1] * 40, [7, 7, 7, 7, 7, 5], [40], [3, 37], [10, 10, 10, 10], [11, 29]])
def test_the_sizes_of_the_calls_never_matter(sizes: list[int]) -> None:
    k, v = tokens(2, 40)
    memory, whole = KVMemory.empty(2, HEADS, 10, DIM), KVMemory.empty(2, HEADS, 10, DIM)
    whole.append(k, v)
    for a, b in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True):
        memory.append(a, b)
    for name in ("k", "v", "length", "position"):
        assert torch.equal(getattr(memory, name), getattr(whole, name))


def test_a_part_full_ring_is_right_aligned() -> None:
    memory = KVMemory.empty(1, HEADS, 5, DIM)
    memory.append(*tokens(1, 3))
    k, v, mask = memory.ordered()
    assert mask.tolist() == [[False, False, True, True, True]]
    assert k[0, 0, 2:, 0].tolist() == [1, 2, 3]
    assert v[0, 1, 2:, 0].tolist() == [-1.25, -2.25, -3.25]


@pytest.mark.parametrize("capacity", [1, 4, 7])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_without_looking_the_same_is_stored_as_row_by_row(capacity: int, count: int) -> None:
    """As on a GPU, where nobody waits to know where a row stands."""
    kept = min(count, capacity)
    for seed in range(6):
        torch.manual_seed(seed)
        rings = [torch.randn(4, HEADS, capacity, DIM), torch.randn(4, HEADS, capacity)]
        new = [torch.randn(4, HEADS, count, DIM), torch.randn(4, HEADS, count)]
        counts = torch.randint(0, count + 1, (4,))
        before = torch.randint(0, 30, (4,))
        found, expected = ([ring.clone() for ring in rings] for _ in range(2))
        appending._each_its_own(found, new, before + counts, counts, kept)
        appending._row_by_row(expected, new, (before + counts).tolist(), counts.tolist())
        assert all(map(torch.equal, found, expected))
        newest = [x[:, :, count - kept :] for x in new]
        appending._scattered(found, newest, before + count)
        appending._row_by_row(expected, newest, (before + count).tolist(), [kept] * 4)
        assert all(map(torch.equal, found, expected))


def test_ordered_gives_copies() -> None:
    memory = KVMemory.empty(1, HEADS, 4, DIM)
    memory.append(*tokens(1, 4))
    k, v, _ = memory.ordered()
    k.zero_()
    v.zero_()
    assert memory.k.all()
    assert memory.v.all()


def test_append_is_detached_and_copies_what_it_is_given() -> None:
    memory = KVMemory.empty(1, HEADS, 4, DIM)
    k, v = (x.requires_grad_() for x in tokens(1, 3))
    memory.append(k * 2, v * 2)
    assert not memory.k.requires_grad
    assert not memory.v.requires_grad
    with torch.no_grad():
        source = k * 3
        memory.append(source, source)
        before = memory.k.clone()
        source.zero_()
    assert torch.equal(memory.k, before)


def test_append_takes_any_strides() -> None:
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens(2, 9))
    memory, plain = KVMemory.empty(2, HEADS, 4, DIM), KVMemory.empty(2, HEADS, 4, DIM)
    memory.append(k, v)
    plain.append(k.contiguous(), v.contiguous())
    assert torch.equal(memory.k, plain.k)


def test_capacity_0_is_legal_and_stays_empty() -> None:
    memory = KVMemory.empty(2, HEADS, 0, DIM)
    memory.append(*tokens(2, 5))
    memory.append(*tokens(2, 4), torch.tensor([[-1, 1, 1, 1], [-1, -1, -1, 3]], dtype=torch.int32))
    k, _, mask = memory.ordered()
    assert (memory.nbytes, memory.length.tolist(), memory.position.tolist()) == (0, [0, 0], [3, 1])
    assert (tuple(k.shape), tuple(mask.shape)) == ((2, HEADS, 0, DIM), (2, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bytes_reported_are_bytes_allocated(dtype: torch.dtype) -> None:
    memory = KVMemory.empty(3, 2, 7, 5, dtype=dtype)
    assert memory.nbytes == 2 * 3 * 2 * 7 * 5 * dtype.itemsize
    assert memory.nbytes == memory.k.untyped_storage().nbytes() + memory.v.untyped_storage().nbytes()


# The lease: what a backward still needs is kept, and only then


def attend(memory: KVMemory, backend: str) -> torch.Tensor:
    k, v = (x.requires_grad_() for x in tokens(1, 2))
    return memory_attention(k.tanh(), k, v, memory, horizon=5, backend=backend)


@every
@pytest.mark.parametrize("when", ["no grad", "after backward", "graph dropped"])
def test_append_writes_in_place_when_no_backward_waits(backend: str, when: str) -> None:
    memory = KVMemory.empty(1, HEADS, 5, DIM)
    memory.append(*tokens(1, 5))
    pointers = memory.k.data_ptr(), memory.v.data_ptr()
    if when == "no grad":
        with torch.no_grad():
            out = attend(memory, backend)
        assert not out.requires_grad
    else:
        out = attend(memory, backend)
        if when == "after backward":
            out.sum().backward()
        else:
            del out
            gc.collect()
    memory.append(*tokens(1, 2))
    assert (memory.k.data_ptr(), memory.v.data_ptr()) == pointers


def test_append_copies_while_a_backward_waits_and_only_once() -> None:
    memory = KVMemory.empty(1, HEADS, 5, DIM)
    memory.append(*tokens(1, 5))
    old, before = memory.k, memory.k.clone()
    out = attend(memory, "sdpa")
    memory.append(*tokens(1, 2, 50))
    new = memory.k.data_ptr()
    assert new != old.data_ptr()
    assert torch.equal(old, before)
    memory.append(*tokens(1, 2, 60))  # the waiting backward has its own copy now
    assert memory.k.data_ptr() == new
    out.sum().backward()


@every
def test_several_appends_before_several_backwards_in_any_order(backend: str) -> None:
    case = random_case(seen=[9, 30], horizon=12, capacity=12, queries=5, dtype=torch.float64)
    calls = []
    memory = case.memory
    for _ in range(4):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        snapshot = memory.clone()
        calls.append((leaves, snapshot, memory_attention(*leaves, memory, horizon=12, backend=backend)))
        memory.append(leaves[1], leaves[2])
    for leaves, snapshot, out in calls[::-1]:
        out.backward(case.grad)
        case.memory = snapshot
        exact = run(case, "reference")
        for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
            assert error(leaf.grad, exact[name]) < 1e-12


# Moving and copying


def test_to_moves_everything_and_clone_shares_nothing() -> None:
    memory = KVMemory.empty(2, HEADS, 4, DIM)
    memory.append(*tokens(2, 6))
    double, copy = memory.to(dtype=torch.float64), memory.clone()
    assert double.k.dtype == double.v.dtype == torch.float64
    assert (double.length.dtype, double.position.dtype) == (torch.int32, torch.int64)
    assert torch.equal(double.k.float(), memory.k)
    meta = memory.to("meta")
    assert {meta.k.device.type, meta.v.device.type, meta.length.device.type, meta.position.device.type} == {"meta"}
    memory.append(*tokens(2, 3, 50))
    assert copy.position.tolist() == double.position.tolist() == [6, 6]
    assert torch.equal(copy.k, double.k.float())
    assert not torch.equal(copy.k, memory.k)


def test_to_without_a_change_never_makes_two_memories_over_one_storage() -> None:
    memory = KVMemory.empty(1, HEADS, 4, DIM)
    assert memory.to("cpu", torch.float32) is memory


# Streaming


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_streaming_never_grows_or_moves_the_storage() -> None:
    memory = KVMemory.empty(1, 1, 37, 4)
    before = memory.k.data_ptr(), memory.v.data_ptr(), memory.nbytes
    k = torch.randn(1, 1, 11, 4)
    for _ in range(500):
        memory.append(k, k)
    assert (memory.k.data_ptr(), memory.v.data_ptr(), memory.nbytes) == before
    assert (memory.length.tolist(), memory.position.tolist()) == ([37], [5500])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
@every
def test_a_million_tokens_do_not_grow_the_process(backend: str) -> None:
    """In calls of 2000, attending and appending; 1 MB would be a hundredth of what concatenation kept (128 MB)."""
    memory = KVMemory.empty(1, 1, 64, 16)
    x = torch.randn(1, 1, 2000, 16)

    def play(calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                memory_attention(x[:, :, :8], x[:, :, :8], x[:, :, :8], memory, horizon=64, backend=backend)
                memory.append(x, x)

    play(100)
    gc.collect()
    before = resident()
    play(500)
    gc.collect()
    assert resident() - before < 1_000_000
    assert memory.position.item() == 1_200_000


# Errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 1, 1), "batch must be an integer >= 0, got -1"),
        ((1, 0, 1, 1), "kv_heads must be an integer >= 1, got 0"),
        ((1, 1, -2, 1), "capacity must be an integer >= 0, got -2"),
        ((1, 1, 1, 0), "head_dim must be an integer >= 1, got 0"),
        ((1, 1, 1.5, 1), "capacity must be an integer >= 0, got 1.5"),
    ],
)
def test_impossible_sizes_are_refused(sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVMemory.empty(*sizes)


@pytest.mark.parametrize(
    ("k", "v", "start", "kind", "message"),
    [
        ((2, 2, 5, 3), (2, 2, 4, 3), None, ValueError, r"v must have shape .* got \(2, 2, 4, 3\)"),
        ((1, 2, 5, 3), (1, 2, 5, 3), None, ValueError, r"k must have shape .*\(2, 2, S, 3\).* got \(1, 2, 5, 3\)"),
        ((2, 2, 15), (2, 2, 15), None, ValueError, r"k must have shape .* got \(2, 2, 15\)"),
        ((2, 2, 5, 3), (2, 2, 5, 3), (2, 4), ValueError, r"piece_start must .* = \(2, 5\), got .* \(2, 4\)"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_changes(
    k: tuple, v: tuple, start: tuple | None, kind: type, message: str
) -> None:
    memory = KVMemory.empty(2, HEADS, 4, DIM)
    memory.append(*tokens(2, 3))
    before = memory.clone()
    with pytest.raises(kind, match=message):
        memory.append(torch.ones(k), torch.ones(v), None if start is None else torch.zeros(start, dtype=torch.int32))
    for name in ("k", "v", "length", "position"):
        assert torch.equal(getattr(memory, name), getattr(before, name))


def test_another_dtype_is_refused() -> None:
    memory = KVMemory.empty(1, HEADS, 4, DIM)
    k, v = tokens(1, 3)
    with pytest.raises(TypeError, match=r"v must have the memory's dtype torch.float32, got torch.bfloat16"):
        memory.append(k, v.bfloat16())


@pytest.mark.parametrize("rows", [torch.tensor([True]), torch.tensor([1, 0])], ids=["shape", "dtype"])
def test_rows_must_be_a_mask(rows: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"rows must be a boolean tensor of shape \(2,\), got list"):
        KVMemory.empty(2, HEADS, 4, DIM).reset([True, False])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rows must be a boolean mask of shape \(2,\), got"):
        KVMemory.empty(2, HEADS, 4, DIM).reset(rows)


def test_it_prints_as_its_sizes() -> None:
    assert repr(KVMemory.empty(2, 3, 5, 16)) == "KVMemory(batch=2, kv_heads=3, capacity=5, head_dim=16, float32 on cpu)"
