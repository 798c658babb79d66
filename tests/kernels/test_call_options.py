"""What a call may be asked: gradients of the log-sum-exp, sinks, a learned bias, offsets, some gradients only."""

import pytest
import torch
from small_memories import BACKENDS, a_memory, every, heads, new

from dsmr_kernels import KVMemory, decode_attention, memory_attention
from dsmr_kernels.appending import append_operator
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import run
from dsmr_kernels.tolerance import error


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
    memory.append(heads(2, 2, 20, wide), heads(2, 2, 20, narrow))
    q, k, v = heads(2, 4, 9, wide), heads(2, 2, 9, wide), heads(2, 2, 9, narrow)
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


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] * (name != "reference")) for name in BACKENDS]
)
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


@every
def test_what_is_farther_than_all_buckets_has_the_last_column(backend: str) -> None:
    case, table = random_case(queries=5, capacity=12, seen=[20, 5], horizon=9), torch.randn(4, 4)
    near = torch.tensor([0, 1, 2, 3])
    found, exact = (
        memory_attention(
            case.q, case.k, case.v, case.memory, **case.options,
            distance_bias=table, distance_buckets=buckets, backend=backend,
        )
        for buckets in (near, torch.tensor([*near, *[3] * 36]))
    )  # fmt: skip
    assert error(found, exact) < 1e-6


@pytest.mark.slow
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
        out = memory_attention(*leaves[:3], here.memory, **here.options, **options)
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
    memory = a_memory(dtype=dtype)
    tensors = (memory.k, memory.v, memory.k_scale, memory.v_scale, memory.length, memory.position)
    starts = torch.tensor([[-1, 1, 1], [-1, -1, -1]], dtype=torch.int32)
    counts = torch.tensor([3, 2]) if ragged else None
    torch.library.opcheck(append_operator, (*tensors, *new(2, 3, 2), starts, counts))


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
    out = memory_attention(q, case.k, case.v, case.memory, **case.options, **options, backend=backend)
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


@pytest.mark.parametrize("options", [{}, {"biased": True}, {"visibility": "sliding"}], ids=str)
def test_results_do_not_depend_on_the_default_device(options: dict) -> None:
    case = random_case(queries=40, seen=[70, 9], horizon=31, **options)
    if not options:
        case.options["alibi_slopes"] = torch.linspace(0.1, 1.0, case.q.shape[1])
    given = (case.q, case.k, case.v, case.memory)
    expected, leaves = run(case, "sdpa"), [x.detach().requires_grad_() for x in given[:3]]
    with torch.device("meta"):
        out = memory_attention(*given, **case.options, backend="sdpa")
        learned = memory_attention(*leaves, case.memory, **case.options, backend="sdpa")
        found = torch.autograd.grad(learned, leaves, case.grad)
    for x, name in zip((out, *found), ("out", "dq", "dk", "dv"), strict=True):
        assert torch.allclose(x, expected[name], atol=1e-5)


@pytest.mark.slow
@every
@pytest.mark.parametrize("wanted", ["b", "qb", "kb", "v"])
def test_a_bias_takes_a_gradient_where_it_is_wanted(backend: str, wanted: str) -> None:
    options = {"queries": 20, "capacity": 12, "seen": [20, 5], "horizon": 9, "segment_length": 7, "biased": True}
    expected = run(random_case(**options), backend)
    found = run(random_case(**options, learning=wanted), backend)
    assert set(found) == {"out", "lse"} | {f"d{name}" for name in wanted}
    for name, x in found.items():
        assert error(x, expected[name]) < 1e-6


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


def test_sentences_for_what_does_not_fit() -> None:
    memory, q = a_memory(), heads(2, 4, 1, 16)
    sinks = torch.nn.Parameter(torch.zeros(4))
    assert not decode_attention(q, memory, sinks=sinks).requires_grad
    with pytest.raises(ValueError, match=r"rows must be indices, got torch\.bool"):
        memory.select(torch.tensor([False, True]))
    for start in (7, 2):
        with pytest.raises(ValueError, match=rf"piece_start must lie before the end of the call, got \[{start}, 0\]"):
            memory.append(*new(2, 2, 2), torch.tensor([[0, start], [0, 0]], dtype=torch.int32))
    half = KVMemory(memory.k.to(torch.int8), memory.v.to(torch.int8), memory.length, memory.position)
    with pytest.raises(ValueError, match="k_scale and v_scale exactly where it is int8"):
        decode_attention(q, half)
    with pytest.raises(ValueError, match="distance_buckets say nothing without distance_bias"):
        decode_attention(q, memory, distance_buckets=torch.tensor([0]))
