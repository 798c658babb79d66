"""A retained set is read as the tokens that it keeps: by attention, by steps, in compiled calls; what it refuses."""

import pytest
import torch
from retained_rows import DIM, HEADS, a_set, every, policies, rows_of, tokens
from torch.utils.checkpoint import checkpoint

from dsmr_kernels import KVMemory, append_rotated, decode_attention, memory_attention


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
