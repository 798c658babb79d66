"""Memories that keep every n-th token, or a sample, hold what a list that is told token by token holds."""

import copy
import math
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_memories import BACKENDS
from torch.utils.checkpoint import checkpoint

from dsmr_kernels import KVMemory, append_rotated, decode_attention, memory_attention
from dsmr_kernels.retention import hashed

HEADS, DIM = 2, 16


def tokens(batch: int, count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that tell their token: number t in row b is 1000 * b + t + 1, values are negative."""
    number = torch.arange(first + 1, first + count + 1) + 1000 * torch.arange(batch)[:, None]
    k = number[:, None, :, None].expand(batch, HEADS, count, DIM).float().clone()
    return k, -k


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64, in Python's integers."""
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def drawn(seed: int, number: int) -> int:
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    return splitmix(splitmix(seed + golden & mask) + number * golden & mask) >> 32


@dataclass
class Row:
    """What one row of the set claims to be: the segment in progress, and the tokens chosen of those before."""

    retention: str
    kept: int
    room: int
    seed: int = 0
    slots: dict[int, float] = field(default_factory=dict)
    waiting: list[float] = field(default_factory=list)
    offered: int = 0
    in_segment: int = 0
    position: int = 0

    def new_piece(self) -> None:
        self.slots, self.waiting, self.offered, self.position = {}, [], 0, 0

    def add(self, value: float) -> None:
        if self.room and self.in_segment == self.room:
            self.settle()
        self.waiting.append(value)
        self.position += 1
        self.in_segment += self.room > 0
        if not self.room:
            self.settle()

    def settle(self) -> None:
        for value in self.waiting:
            self.offer(value)
        self.waiting, self.in_segment = [], 0

    def offer(self, value: float) -> None:
        number, self.offered = self.offered, self.offered + 1
        if self.retention == "random":
            slot = number if number < self.kept else drawn(self.seed, number) * (number + 1) >> 32
            if slot < self.kept:
                self.slots[slot] = value
            return
        # By what is held alone: the multiples of the coarsest step that leaves room, the oldest odd ones making way.
        step = 1
        while number // step >= self.kept:
            step *= 2
        if number % step:
            return
        self.slots[number] = value
        if len(self.slots) > self.kept:
            del self.slots[min(n for n in self.slots if n % step)]

    @property
    def held(self) -> list[float]:
        return sorted([*self.slots.values(), *self.waiting])


def holds(memory: KVMemory) -> list[list[float]]:
    """The tokens of each row, by their keys, and that values and all heads agree."""
    k, v, mask = memory.ordered()
    assert mask.sum(1).tolist() == memory.length.tolist()
    assert torch.equal(k, -v)
    assert bool((k == k[:, :1, :, :1]).all())
    return [sorted(k[row, 0, mask[row], 0].tolist()) for row in range(memory.batch)]


def a_set(retention: str, kept: int, room: int = 0, batch: int = 2, seed: int = 5, **more) -> KVMemory:
    seeds = seed + torch.arange(batch)
    return KVMemory.empty(
        batch, HEADS, kept + room, DIM, retention=retention, room=room, seed=seeds, dtype=torch.float32, **more
    )


def rows_of(memory: KVMemory, seed: int = 5) -> list[Row]:
    return [Row(memory.retention, memory.kept, memory.room, seed + row) for row in range(memory.batch)]


SLOW = {"triton": [pytest.mark.slow]}  # in Triton's interpreter
every = pytest.mark.parametrize("backend", [pytest.param(name, marks=SLOW.get(name, [])) for name in BACKENDS])
policies = pytest.mark.parametrize("retention", ["uniform", "random"])


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


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]):
    """Attention of a segment over each row's retained keys and values (heads, n, DIM) and, causally, over itself."""
    out = []
    for row, (pk, pv) in enumerate(past):
        keys, values = torch.cat([pk, k[row]], 1), torch.cat([pv, v[row]], 1)
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores = q[row] @ keys.transpose(1, 2) * DIM**-0.5
        new = q.shape[2]
        hidden = torch.ones(new, new, dtype=torch.bool).triu(1)
        scores[:, :, pk.shape[1] :].masked_fill_(hidden, -torch.inf)
        out.append(scores.softmax(-1) @ values)
    return torch.stack(out)


@every
@policies
@pytest.mark.parametrize("room", [0, 6])
def test_attention_is_that_over_the_retained_set(backend: str, retention: str, room: int) -> None:
    torch.manual_seed(0)
    memory = a_set(retention, 5, room)
    kept: list[dict[float, tuple[torch.Tensor, torch.Tensor]]] = [{}, {}]
    rows = rows_of(memory)
    for segment in range(3 if backend == "triton" else 8):
        q = torch.randn(2, 2 * HEADS, 6, DIM, requires_grad=True)
        k, v = (torch.randn(2, HEADS, 6, DIM, requires_grad=True) for _ in range(2))
        held = [[*row.slots.values()] for row in rows]
        past = []
        for b in range(2):
            none = (torch.zeros(HEADS, DIM),) * 2
            chosen = [kept[b][name] for name in held[b]] or [none]
            pk, pv = (torch.stack([pair[i] for pair in chosen], 1) for i in range(2))
            past.append((pk, pv) if held[b] else (pk[:, :0], pv[:, :0]))
        options = {"horizon": 5, "segment_length": 6} if segment % 2 else {"horizon": 9}
        out = memory_attention(q, k, v, memory, backend=backend, **options)
        memory.append(k, v)  # before the backward, which needs what was there
        expected = dense(q, k, v, past)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, (q, k, v), grad)
        for mine, theirs in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        for b, row in enumerate(rows):
            for t in range(6):
                kept[b][6.0 * segment + t] = (k[b, :, t].detach(), v[b, :, t].detach())
                row.add(6.0 * segment + t)
            row.settle()


@every
@policies
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_steps_within_a_segment_see_what_the_segment_sees(backend: str, retention: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = KVMemory.empty(2, HEADS, 12, DIM, dtype=dtype, retention=retention, room=7)
    stepped = whole.clone()
    segments = 2 if backend == "triton" else 6
    for segment in range(segments):
        q = torch.randn(2, 2 * HEADS, 7, DIM)
        k, v = torch.randn(2, 2, HEADS, 7, DIM)
        start = torch.full((2, 7), -1, dtype=torch.int32)
        if segment == 1:
            start[1, 4:] = 4
            stepped.settle()
        seen = memory_attention(
            q, whole.as_stored(k), whole.as_stored(v), whole, horizon=5, piece_start=start, backend=backend
        )
        whole.append(k, v, start)
        for t in range(7):
            if segment == 1 and t == 4:
                stepped.reset(torch.tensor([False, True]))
            some = slice(t, t + 1)
            turned = append_rotated(q[:, :, some], k[:, :, some], v[:, :, some], stepped, backend=backend)
            out = decode_attention(turned, stepped, backend=backend)
            torch.testing.assert_close(out, seen[:, :, some], atol=2e-5, rtol=2e-5)
    assert stepped.seen == whole.seen == 7 * segments
    for name, tensor in whole.tensors().items():
        if name not in ("k", "v", "k_scale", "v_scale"):
            assert torch.equal(tensor, getattr(stepped, name)), name
    for mine, theirs in zip(whole.ordered(), stepped.ordered(), strict=True):
        torch.testing.assert_close(mine, theirs)


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


def test_a_whole_reset_begins_a_segment() -> None:
    memory = a_set("random", 5, 3)
    memory.append(*tokens(2, 10))
    memory.reset()
    fresh = a_set("random", 5, 3)
    for each in (memory, fresh):
        each.append(*tokens(2, 17))
    assert holds(memory) == holds(fresh)
    assert memory.seen == 17


@pytest.mark.parametrize("room", [0, 4])
@policies
def test_compiled(retention: str, room: int) -> None:
    plain, compiled = a_set(retention, 5, room), a_set(retention, 5, room)

    def step(memory: KVMemory, x: torch.Tensor) -> torch.Tensor:
        out = memory_attention(x, x[:, :2], x[:, 2:], memory, horizon=5)
        memory.append(x[:, :2], x[:, 2:])
        return out

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        x = torch.randn(2, 4, 4, DIM)
        with torch.no_grad():
            torch.testing.assert_close(run(compiled, x), step(plain, x))
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(tensor, getattr(compiled, name))


def test_operators_say_what_they_mutate() -> None:
    for room in (0, 4):
        memory = a_set("random", 5, room)
        memory.append(*tokens(2, 11))
        held = {name: x.clone() for name, x in memory.tensors().items()}
        counters = (held["length"], held["position"], held["settled"], held["mark"])
        arguments = (held["k"], held["v"], None, None, *counters, *tokens(2, 3), None, None, held["seeds"], room, -1)
        torch.library.opcheck(torch.ops.dsmr_kernels.retain.default, arguments)
    counters = (held["length"], held["settled"], held["mark"])
    arguments = (held["k"], held["v"], None, None, *counters, held["seeds"], room)
    torch.library.opcheck(torch.ops.dsmr_kernels.settle.default, arguments)


@policies
def test_what_a_set_cannot_do_is_a_sentence(retention: str) -> None:
    memory = a_set(retention, 5, 3)
    memory.append(*tokens(2, 2))
    q, k, v = torch.randn(2, 4, 3, DIM), *torch.randn(2, 2, HEADS, 3, DIM)

    def refused(sentence: str, **options) -> None:
        with pytest.raises(ValueError, match=sentence):
            memory_attention(q, k, v, memory, **{"horizon": 5, **options})

    refused("does not know how old its slots are", visibility="sliding")
    refused("does not know how old its slots are", alibi_slopes=torch.ones(4))
    refused("horizon must be at least the 5 tokens", horizon=4)
    refused("must lie in one segment, but 3 tokens from token 2", segment_length=3, segment_offset=2)
    refused("must lie in one segment", segment_length=3, segment_offset=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="cannot be cropped"):
        memory.crop(1)
    with pytest.raises(ValueError, match="has room for 1 more tokens of the segment in progress, but 2 are"):
        append_rotated(q[:, :, :2], k[:, :, :2], v[:, :, :2], memory)
    with pytest.raises(ValueError, match="has room for 0 more"):
        decode_attention(q[:, :, :1], a_set(retention, 5))
    with pytest.raises(ValueError, match="does not know how old"):
        decode_attention(q[:, :, :1], memory, visible=torch.ones(2, dtype=torch.int32))
    for sentence, options in (
        ("retention must be one of newest, uniform, random, got 'oldest'", {"retention": "oldest"}),
        ("room must be 0 for the newest", {"room": 2}),
        ("needs 1 to 2,147,483,647 slots besides its room", {"retention": retention, "room": 5}),
    ):
        with pytest.raises(ValueError, match=sentence):
            KVMemory.empty(2, HEADS, 5, DIM, **options)
    with pytest.raises(ValueError, match=r"seed must be an integer or int64 of shape \(batch,\)"):
        KVMemory.empty(2, HEADS, 5, DIM, retention="random", seed=torch.ones(3))


@pytest.mark.parametrize("length", [4, None])
def test_a_place_in_the_segment_that_leaves_tokens_out_is_refused(length: int | None) -> None:
    memory = KVMemory.empty(1, 1, 8, 16, retention="uniform", room=4)
    memory.append(torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16))
    q = torch.randn(1, 1, 1, 16)
    options = {"horizon": 4, "segment_length": length, "return_lse": True}
    with pytest.raises(ValueError, match=r"keeps 4 tokens and holds 2 of the segment .* give segment_offset=2"):
        memory_attention(torch.zeros_like(q), q, q, memory, **options)
    _, lse = memory_attention(torch.zeros_like(q), q, q, memory, segment_offset=2, **options)
    assert float(lse.exp()) == pytest.approx(7)  # four kept, two of the segment, and itself


def test_a_set_that_has_chosen_is_read_without_copying_it() -> None:
    memory = KVMemory.empty(1, 1, 8, 16, retention="uniform", room=4)
    assert memory.snapshot().k.data_ptr() == memory.k.data_ptr()  # nothing to choose from
    for _ in range(3):
        memory.append(torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 16))
        first = memory.snapshot()
        assert memory.snapshot().k.data_ptr() == first.k.data_ptr() == memory.k.data_ptr()


def test_a_fresh_set_may_be_read_again_by_a_recomputation() -> None:
    q, k, v = (torch.randn(1, 1, 3, 16, requires_grad=True) for _ in range(3))
    found = []
    for wrapped in (False, True):
        memory = KVMemory.empty(1, 1, 8, 16, retention="random", room=4)

        def attend(q, k, v, memory=memory):
            return memory_attention(q, k, v, memory, horizon=4, segment_length=4)

        out = checkpoint(attend, q, k, v, use_reentrant=False) if wrapped else attend(q, k, v)
        found.append(torch.autograd.grad(out.sum(), (q, k, v)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
