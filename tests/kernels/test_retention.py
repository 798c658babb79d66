"""Memories that keep every n-th token, or a sample, hold what a list that is told token by token holds."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retained_rows import DIM, HEADS, a_set, drawn, holds, policies, rows_of, tokens

from dsmr_kernels import KVMemory
from dsmr_kernels.retention import UNKNOWN, _passes, hashed, uniform_slots


def test_the_hash_is_that_of_the_oracle() -> None:
    seeds = torch.tensor([0, 1, -1, 2**40, -(2**63)])
    numbers = torch.tensor([0, 1, 2, 1000, 2**31, 2**50])
    found = hashed(seeds[:, None], numbers)
    assert found.tolist() == [[drawn(int(s) % 2**64, int(n)) for n in numbers] for s in seeds]


@policies
@pytest.mark.parametrize("room", [0, 4])
@pytest.mark.parametrize("kept", [1, 2, 3, 5, 8, 13])
def test_token_by_token(retention: str, room: int, kept: int) -> None:
    memory = a_set(retention, kept, room)
    rows = rows_of(memory)
    assert memory.retention == retention
    assert (memory.kept, memory.capacity) == (kept, kept + room)
    for number in range(10 * kept + 40):
        memory.append(*tokens(2, 1, number))
        for b, row in enumerate(rows):
            row.add(1000 * b + number + 1)
        assert holds(memory) == [row.held for row in rows]
        assert memory.position.tolist() == [number + 1] * 2


@policies
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens(retention: str, data: st.DataObject) -> None:
    kept, room, batch = (data.draw(st.integers(*ends)) for ends in ((1, 9), (0, 5), (1, 3)))
    memory = a_set(retention, kept, room, batch)
    rows, number = rows_of(memory), 0
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["append", "append", "piece", "counts", "reset", "clone", "settle"]))
        count = data.draw(st.integers(1, 14))
        k, v = tokens(batch, count, number)
        if what == "append":
            memory.append(k, v)
        elif what == "counts":
            counts = data.draw(st.lists(st.integers(0, count), min_size=batch, max_size=batch))
            memory.append(k, v, counts=torch.tensor(counts))
        elif what == "piece":
            starts = data.draw(st.lists(st.integers(-1, count - 1), min_size=batch, max_size=batch))
            index = torch.arange(count)
            start = torch.tensor(starts)[:, None]
            memory.append(k, v, torch.where(index < start, -1, start).int())
        elif what == "reset":
            chosen = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
            memory.reset(torch.tensor(chosen))
        elif what == "clone":
            memory = pickle.loads(pickle.dumps(memory.clone()))
        else:
            memory.settle()
        for b, row in enumerate(rows):
            if what == "reset" and chosen[b]:
                row.new_piece()
            if what == "settle" and row.room and row.in_segment == row.room:
                row.settle()
            if what not in ("append", "piece", "counts"):
                continue
            for t in range(counts[b] if what == "counts" else count):
                if what == "piece" and t == starts[b]:
                    row.new_piece()
                row.add(1000 * b + number + t + 1)
        number += count
        assert holds(memory) == [row.held for row in rows]
        assert memory.position.tolist() == [row.position for row in rows]


@policies
@pytest.mark.parametrize("room", [0, 4])
def test_a_row_that_takes_no_token_of_a_new_piece_stays_in_its_own(retention: str, room: int) -> None:
    memory = a_set(retention, 5, room)
    memory.append(*tokens(2, 10))
    before = holds(memory)
    memory.append(*tokens(2, 3, 10), torch.zeros(2, 3, dtype=torch.int32), counts=torch.tensor([0, 3]))
    assert holds(memory) == [before[0], [1011.0, 1012.0, 1013.0]]
    assert memory.position.tolist() == [10, 3]


@pytest.mark.parametrize("kept", [1, 2, 3, 8, 13])
def test_every_nth_token_whatever_its_number(kept: int) -> None:
    """In Python's integers, which nothing overflows."""
    numbers = sorted(
        {max(0, (kept << level) // part + more) for level in range(57) for part in (1, 2) for more in range(-2, 3)}
    )

    def slot_of(number: int) -> int:
        level = next(level for level in range(64) if number < kept << level)
        place, cycle = number >> level, kept if kept % 2 else kept - 1
        if place << level != number:
            return -1
        return place if place == cycle else place * 2**level % cycle

    assert uniform_slots(torch.tensor(numbers), kept).tolist() == [slot_of(number) for number in numbers]


@policies
def test_who_looks_at_a_set_sees_what_it_held_before_it_chose(retention: str) -> None:
    memory = a_set(retention, 3, 4)
    memory.append(*tokens(2, 4))
    memory.append(*tokens(2, 4, 4))
    view = memory.held()
    shown = {name: x.clone() for name, x in view.tensors().items()}
    memory.settle()
    assert not torch.equal(memory.mark, shown["mark"])
    assert all(torch.equal(x, shown[name]) for name, x in view.tensors().items())
    memory.append(*tokens(2, 1, 8))
    view, where = memory.held(), memory.k.data_ptr()
    memory.settle()  # there is nothing to choose from, and so nothing to copy
    assert view.k.data_ptr() == memory.k.data_ptr() == where


@policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_any_cut_of_a_stream_keeps_the_same_in_the_same_slots(retention: str, dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 2, HEADS, 200, DIM)
    if dtype == torch.bfloat16:
        k, v = k.bfloat16(), v.bfloat16()
    found = []
    for size in (1, 7, 50, 200):
        memory = KVMemory.empty(2, HEADS, 13, DIM, dtype=dtype, retention=retention, seed=3)
        for start in range(0, 200, size):
            memory.append(k[:, :, start : start + size], v[:, :, start : start + size])
        found.append(memory)
    roomy = KVMemory.empty(2, HEADS, 13 + 50, DIM, dtype=dtype, retention=retention, seed=3, room=50)
    for start in range(0, 200, 30):
        roomy.append(k[:, :, start : start + 30], v[:, :, start : start + 30])
    roomy.settle()
    for other in found[1:]:
        for name, tensor in found[0].tensors().items():
            assert torch.equal(tensor, getattr(other, name)), name
    for mine, other in zip(found[0].storage(), roomy.storage(), strict=True):
        assert torch.equal(mine, other[:, :, :13])


@policies
def test_a_million_tokens(retention: str) -> None:
    memory = KVMemory.empty(1, 1, 64, 1, retention=retention, dtype=torch.float64)
    for start in range(0, 2**20, 2**15):
        k = torch.arange(start, start + 2**15, dtype=torch.float64).view(1, 1, -1, 1)
        memory.append(k, k)
    held = sorted(memory.ordered()[0].flatten().tolist())
    if retention == "uniform":
        assert held == [2**14 * i for i in range(64)]
    else:
        assert len(set(held)) == 64
        assert abs(sum(held) / 64 / 2**20 - 0.5) < 4 / math.sqrt(12 * 64)


def test_a_reservoir_holds_every_token_with_the_same_probability() -> None:
    rows, kept, count = 4096, 16, 200
    memory = KVMemory.empty(rows, 1, kept, 1, retention="random", seed=torch.arange(rows), dtype=torch.float32)
    k = torch.arange(count).float().view(1, 1, -1, 1).expand(rows, -1, -1, -1)
    memory.append(k, k)
    often = torch.bincount(memory.k.flatten().long(), minlength=count)
    expected = rows * kept / count
    chi_squared = float(((often - expected) ** 2 / expected).sum())
    assert abs(chi_squared - count) < 5 * math.sqrt(2 * count)
    pairs = torch.corrcoef(torch.zeros(rows, count).scatter_(1, memory.k.flatten(1).long(), 1.0).T)
    assert float((pairs - torch.eye(count)).abs().max()) < 0.12  # no two tokens stand or fall together


@policies
def test_a_snapshot_stays_and_copies_are_apart(retention: str) -> None:
    memory = a_set(retention, 5, 3)
    memory.append(*tokens(2, 12))
    before = holds(memory)
    snapshot, clone, shallow = memory.snapshot(), memory.clone(), copy.copy(memory)
    settled = holds(memory)
    memory.append(*tokens(2, 9, 12))
    for other in (clone, shallow, snapshot):
        k, _, mask = other.ordered()
        assert [sorted(k[b, 0, mask[b], 0].tolist()) for b in range(2)] == settled
    assert snapshot.retention == retention
    assert holds(snapshot.appended(*tokens(2, 9, 12))) == holds(memory) != before


@policies
def test_rows_that_move_take_their_sample_with_them(retention: str) -> None:
    memory = a_set(retention, 5, 3, batch=3)
    memory.append(*tokens(3, 40))
    chosen = memory.select([2, 0]).repeat(2)
    k, v = tokens(3, 40, 40)
    memory.append(k, v)
    chosen.append(k[[2, 2, 0, 0]], v[[2, 2, 0, 0]])
    expected = holds(memory)
    assert holds(chosen) == [expected[2], expected[2], expected[0], expected[0]]
    moved = memory.to(dtype=torch.float64)
    assert moved is not memory
    assert holds(moved) == expected
    assert (moved.retention, moved.room) == (memory.retention, 3)


def test_rows_whose_segments_differ_take_as_many_stretches_as_one_of_them_may_need() -> None:
    """Each is a round of copies, so that one more would be paid at every token."""
    for room in range(1, 9):
        for count in range(1, 30):
            alone = [len(_passes(count, room, filled)) for filled in range(room)]
            assert _passes(count, room, UNKNOWN) == [(True, min(count, room))] * max(alone)


@pytest.mark.parametrize(("before", "after"), [(10, 17), (12, 12)])
def test_a_whole_reset_begins_a_segment(before: int, after: int) -> None:
    """Also where the memory has chosen after as many tokens before."""
    memory = a_set("random", 5, 3)
    memory.append(*tokens(2, before))
    memory.settle()
    memory.reset()
    fresh = a_set("random", 5, 3)
    for each in (memory, fresh):
        each.append(*tokens(2, after))
        each.settle()
    assert holds(memory) == holds(fresh)
    assert torch.equal(memory.length, fresh.length)
    assert memory.seen == after
