"""Every backend agrees with the oracle, forward and backward; the oracle agrees with the definition, pair by pair."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from attention_cases import CASES, pieces
from attention_strategy import attention_calls
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr_kernels import KVMemory, append_rotated, available_backends, decode_attention, memory_attention
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.testing import assert_agrees_with_oracle, run, run_plain
from dsmr_kernels.tolerance import allowed_error, error

BACKENDS = [name for name in available_backends() if name != "triton"]
fast = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
every = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.slow
@fast
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_backend_agrees_with_oracle(name: str, dtype: torch.dtype, backend: str) -> None:
    assert_agrees_with_oracle(random_case(dtype=dtype, **CASES[name]), backend)


def _only(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one of the ways of the sdpa backend serve calls of any size, in tiles of a few tokens and parts of a head."""
    sdpa = "dsmr_kernels.backends.sdpa"
    for name, least in (("BLOCK_QUERIES", 5), ("BLOCK_KEYS", 5), ("DIAGONAL_KEYS", 3), ("TILE_BYTES", 5)):
        monkeypatch.setattr(f"{sdpa}.products.{name}", least)
    monkeypatch.setattr(f"{sdpa}.workers.SHARED_PAIRS", 0)
    if way == "products":
        monkeypatch.setattr(f"{sdpa}.flash.AVAILABLE", False)
    if way == "masked":
        monkeypatch.setattr(f"{sdpa}._may_look", lambda inputs: False)
        monkeypatch.setattr(f"{sdpa}.masked.TILE_SCORES", 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["flash", "products", "masked"])
def test_each_way_of_sdpa_agrees_with_oracle(
    way: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which way serves depends on the call's size and on what PyTorch offers: each must serve every call."""
    _only(way, monkeypatch)
    assert_agrees_with_oracle(random_case(dtype=dtype, **CASES[name]), "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["memory wrapped", "rows differ", "segments", "pieces, sliding"])
@pytest.mark.parametrize("way", ["flash", "products", "masked"])
def test_each_way_reads_eight_bit_memories(
    way: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    _only(way, monkeypatch)
    case = random_case(dtype=dtype, **CASES[name])
    assert case.memory is not None
    case.memory = case.memory.to(dtype=torch.int8)
    assert_agrees_with_oracle(case, "sdpa")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_without_products_of_a_dtype_it_computes_in_float32_and_rounds(
    dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsmr_kernels.backends.sdpa.processor.instruction_set", lambda: "AVX2")
    case = random_case(dtype=dtype, **CASES[name])
    assert_agrees_with_oracle(case, "sdpa")
    wide = run(case.to(torch.float32), "sdpa")["out"]
    assert torch.equal(run(case, "sdpa")["out"], wide.to(dtype))  # rounded once, at the end


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_with_avx512_alone_the_kernel_computes_in_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmr_kernels.backends.sdpa.processor.instruction_set", lambda: "AVX-512")
    assert_agrees_with_oracle(random_case(dtype=torch.bfloat16, **CASES[name]), "sdpa")


@pytest.mark.slow
def test_an_instruction_set_that_pytorch_may_not_use_does_not_count() -> None:
    """On a processor of any kind: with AVX2 forced, bfloat16 is computed in float32."""
    code = (
        "import torch; from dsmr_kernels.backends.sdpa.tuned import choose, instruction_set;"
        "print(torch.backends.cpu.get_cpu_capability(), choose(torch.bfloat16, 'backward').dtype, instruction_set())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    capability, dtype, *named = done.stdout.split()
    assert capability != "AVX2" or (dtype, named) == ("torch.float32", ["AVX2"])


def test_nothing_is_looked_at_on_other_devices() -> None:
    """On the meta device there is nothing to look at: a call that waited for a length or a position would fail."""
    case = random_case(seen=[57, 30], horizon=17, segment_length=7, visibility="sliding").to(device="meta")
    q, k, v = (x.requires_grad_() for x in (case.q, case.k, case.v))
    pieces = torch.empty(2, 33, dtype=torch.int32, device="meta")
    offsets = torch.empty(2, dtype=torch.int64, device="meta")
    memory, options = case.memory, {**case.options, "piece_start": pieces, "segment_offset": offsets}
    assert memory is not None
    out, lse = memory_attention(q, k, v, memory, **options, return_lse=True, backend="sdpa")
    (out.sum() + lse.sum()).backward()
    assert q.grad is not None
    with torch.no_grad():
        memory.append(k, v, pieces)
        memory.append(k, v, counts=offsets)
        turned = append_rotated(q[:, :, :2], k[:, :, :2], v[:, :, :2], memory, backend="sdpa")
        assert decode_attention(turned, memory, backend="sdpa").shape == turned.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_far_above_that_of_the_query_itself(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take a query's score with its own key for the pivot of its softmax, whatever the others are."""
    _only("products", monkeypatch)
    case = random_case(queries=9, capacity=7, seen=[9, 4], heads=2, dtype=dtype, horizon=7)
    case.k[:, :, 2] *= 8  # as an attention sink has
    case.q[:, :, 5:] = 15 * case.k[:, :, 2:3] / case.k[:, :, 2:3].norm(dim=-1, keepdim=True)  # some 2 ** 170 above
    found, plain, exact = run(case, "sdpa"), run_plain(case), run(case.to(torch.float64), "reference")
    # In bfloat16, gradients of scores so large are differences of rounding errors, in flash attention as well.
    for name in ("out", "dq", "dk", "dv") if dtype == torch.float32 else ("out",):
        assert error(found[name], exact[name]) <= allowed_error(name, plain[name], exact[name], dtype), name


class _Multiplied(TorchDispatchMode):
    """How many products of two numbers batched matrix products have taken."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm, torch.ops.aten.baddbmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.count += a.numel() * b.shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_leave_out_most_of_what_lies_above_the_causal_edge(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two products forward and five backward over 64 queries and keys in tiles of 16: 10 of 16 tiles."""
    monkeypatch.setattr("dsmr_kernels.backends.sdpa.flash.AVAILABLE", False)
    monkeypatch.setattr("dsmr_kernels.backends.sdpa.products.DIAGONAL_KEYS", 16)
    monkeypatch.setattr("dsmr_kernels.backends.sdpa._dtype_of_products", lambda inputs: dtype)
    q, k, v = (torch.randn(1, 2, 64, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    with _Multiplied() as multiplied:
        memory_attention(q, k, v, horizon=0, backend="sdpa").sum().backward()
    columns = 34 / 32 if dtype == torch.bfloat16 else 1  # which hold addends
    assert multiplied.count == pytest.approx((3 * columns + 4) * 2 * 32 * 64 * 64 * 10 / 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_oracle_agrees_with_the_definition_pair_by_pair(name: str) -> None:
    case = random_case(dtype=torch.float64, **CASES[name])
    out = memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend="reference")
    options = {"segment_length": None, "segment_offset": 0, "visibility": "segment", **case.options}
    length, offset, horizon = (options[name] for name in ("segment_length", "segment_offset", "horizon"))
    batch, heads, queries, dim = case.q.shape
    tokens, group = case.k.shape[2], heads // case.k.shape[1]
    slopes, starts = options.get("alibi_slopes"), options.get("piece_start")
    for b in range(batch):
        held = 0 if case.memory is None else int(case.memory.length[b])
        past_k, past_v, _ = case.memory.ordered() if case.memory is not None else (case.k, case.v, None)
        for p in range(tokens - queries, tokens):
            segment = 0 if length is None else (p + offset) // length
            low = p - horizon if options["visibility"] == "sliding" else segment * (length or 0) - offset - horizon
            if starts is not None and starts[b, p] >= 0:
                low = max(low, int(starts[b, p]))
            for h in range(heads):
                seen = range(max(low, -held), p + 1)
                keys = torch.stack([(past_k if j < 0 else case.k)[b, h // group, j] for j in seen])
                values = torch.stack([(past_v if j < 0 else case.v)[b, h // group, j] for j in seen])
                row = p - (tokens - queries)
                scores = keys @ case.q[b, h, row] * options.get("scale", dim**-0.5)
                if slopes is not None:
                    scores = scores - slopes[h].double() * torch.tensor([p - j for j in seen])
                assert error(out[b, h, row], scores.softmax(0) @ values) < 1e-12


@every
@pytest.mark.parametrize("seed", range(3))
def test_no_gradient_reaches_memory_or_other_segments(backend: str, seed: int) -> None:
    case = random_case(seen=[57, 57], horizon=40, segment_length=11, seed=seed)
    k, v = case.k.requires_grad_(), case.v.requires_grad_()
    out = memory_attention(case.q, k, v, case.memory, **case.options, backend=backend)
    out[:, :, 11:22].sum().backward()  # the second of three segments
    for grad in (k.grad, v.grad):
        assert not grad[:, :, :11].any()
        assert grad[:, :, 11:22].any()
        assert not grad[:, :, 22:].any()


@every
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize(("capacity", "horizon", "length"), [(13, 13, 8), (40, 31, 8), (5, 5, 16), (64, 64, 1)])
def test_segments_in_one_call_equal_sequential_calls(
    backend: str, visibility: str, capacity: int, horizon: int, length: int
) -> None:
    case = random_case(queries=4 * length + 3, seen=[57, 6], capacity=capacity, dtype=torch.float64)
    whole_memory, memory = case.memory.clone(), case.memory.clone()
    options = {"horizon": horizon, "visibility": visibility, "backend": backend}
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*whole, whole_memory, segment_length=length, **options)
    out.backward(case.grad)
    whole_memory.append(whole[1], whole[2])
    parts = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    outs = []
    for begin in range(0, case.q.shape[2], length):
        q, k, v = (x[:, :, begin : begin + length] for x in parts)
        outs.append(memory_attention(q, k, v, memory, **options))
        outs[-1].backward(case.grad[:, :, begin : begin + length])
        memory.append(k, v)
    assert error(torch.cat(outs, 2), out) < 1e-12
    for one, many in zip(whole, parts, strict=True):
        assert error(many.grad, one.grad) < 1e-12
    for name in ("k", "v", "length", "position"):
        assert torch.equal(getattr(memory, name), getattr(whole_memory, name))


@every
def test_backward_may_come_after_the_memory_has_moved_on(backend: str) -> None:
    """The usual order is forward, append, backward: the append must not disturb what the backward reads."""
    case = random_case(seen=[57, 57], horizon=40, dtype=torch.float64)
    exact = run(case, "reference")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*leaves, case.memory, horizon=40, backend=backend)
    case.memory.append(leaves[1], leaves[2])
    out.backward(case.grad)
    for leaf, name in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert error(leaf.grad, exact[name]) < 1e-12


@fast
def test_memory_written_behind_the_back_of_a_backward_is_an_error(backend: str) -> None:
    case = random_case(seen=[57, 57], horizon=40)
    q = case.q.requires_grad_()
    out = memory_attention(q, case.k, case.v, case.memory, horizon=40, backend=backend)
    case.memory.k.zero_()
    with pytest.raises(RuntimeError, match="written to in place"):
        out.sum().backward()


@fast
def test_double_backward_is_refused_with_a_sentence(backend: str) -> None:
    case = random_case(seen=[57, 57], horizon=40)
    q = case.q.requires_grad_()
    out = memory_attention(q, case.k, case.v, case.memory, horizon=40, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dq.sum().backward()


@fast
@pytest.mark.parametrize("layout", ["tokens before heads", "padded head_dim", "batch expanded"])
def test_any_strides_with_a_contiguous_last_dimension(backend: str, layout: str) -> None:
    case = random_case(seen=[57, 30], horizon=17, segment_length=9)
    expected = run(case, backend)
    if layout == "tokens before heads":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v, case.grad)]
    elif layout == "padded head_dim":
        tensors = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (case.q, case.k, case.v, case.grad)]
    else:
        tensors = [x[:1].expand(2, -1, -1, -1) for x in (case.q, case.k, case.v, case.grad)]
        expected = run(
            Case(*(x.contiguous() for x in tensors[:3]), case.memory, tensors[3].contiguous(), case.options), backend
        )
    found = run(Case(*tensors[:3], case.memory, tensors[3], case.options), backend)
    for name, value in found.items():
        assert error(value, expected[name]) < 1e-6


@pytest.mark.slow
@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_need_several_tiles(backend: str, dtype: torch.dtype) -> None:
    """Long enough that a run is cut into tiles and a head's scores fill the scratch."""
    case = random_case(
        batch=1,
        heads=2,
        kv_heads=1,
        queries=700,
        capacity=3000,
        seen=[4500],
        horizon=3000,
        segment_length=600,
        dtype=dtype,
    )
    assert_agrees_with_oracle(case, backend)


@fast
def test_autocast_does_not_change_what_the_call_computes_in(backend: str) -> None:
    case = random_case(seen=[57, 30], horizon=17)
    expected = run(case, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, backend)
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_autocast_does_not_change_what_the_oracle_computes_in() -> None:
    """Its forward: its backward is PyTorch's own, which belongs outside of autocast."""
    case = random_case(seen=[57, 30], horizon=17)
    expected = memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend="reference")
    assert torch.equal(found, expected)


@fast
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=attention_calls())
def test_any_arguments_agree_with_oracle(backend: str, case: Case) -> None:
    """Property: over the whole argument space."""
    assert_agrees_with_oracle(case, backend)


@every
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": torch.zeros(2, 4, 5)}, ValueError, r"q must have shape \(batch, heads, tokens, head_dim\)"),
        ({"q": torch.zeros(2, 4, 5, 16, dtype=torch.int64)}, TypeError, "q must be of a floating dtype"),
        ({"k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 8)}, ValueError, "k must have shape"),
        (
            {"v": torch.zeros(2, 2, 6, 16)},
            ValueError,
            r"v must have the shape of k, \(2, 2, 5, 16\), save",
        ),
        ({"k": torch.zeros(2, 2, 5, 16).double()}, TypeError, "k must have the dtype of q, torch.float32, got"),
        ({"k": torch.zeros(2, 3, 5, 16), "v": torch.zeros(2, 3, 5, 16)}, ValueError, "multiple of the KV heads, got 3"),
        (
            {"k": torch.zeros(2, 2, 4, 16), "v": torch.zeros(2, 2, 4, 16)},
            ValueError,
            "at least the 5 tokens of q, got 4",
        ),
        ({"horizon": -1}, ValueError, "horizon must be >= 0, got -1"),
        ({"horizon": 2.5}, TypeError, "horizon must be an integer, got 2.5"),
        ({"segment_length": 0}, ValueError, "segment_length must be >= 1, got 0"),
        ({"segment_length": 4, "segment_offset": 4}, ValueError, "segment_offset must be < segment_length = 4, got 4"),
        ({"visibility": "all"}, ValueError, "visibility must be one of segment, sliding, got 'all'"),
        (
            {"memory": KVMemory.empty(2, 4, 7, 16)},
            ValueError,
            r"memory must have .* = \(2, 2, 16\) .*, got \(2, 4, 16\)",
        ),
        (
            {"memory": KVMemory.empty(2, 2, 7, 16).to(dtype=torch.float64)},
            TypeError,
            "memory.k must have the dtype of q",
        ),
        ({"memory": torch.zeros(3)}, TypeError, "memory must be a KVMemory or a snapshot of one, got Tensor"),
        ({"piece_start": torch.zeros(2, 5)}, TypeError, "piece_start must be an int32 tensor"),
        ({"piece_start": pieces([0] * 4, [0] * 4)}, ValueError, r"piece_start must have shape .* = \(2, 5\)"),
        ({"piece_start": pieces([0] * 5, [0, 0, 4, 4, 4])}, ValueError, "row 1 token 2 has piece_start 4"),
        ({"piece_start": pieces([0] * 5, [0, 1, 0, 3, 3])}, ValueError, "must not decrease"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be a floating tensor of shape \(4,\)"),
        ({"scale": "small"}, TypeError, "scale must be a number or None, got 'small'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"backend": "cudnn"}, ValueError, "backend must be one of triton, sdpa, reference, got 'cudnn'"),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected(backend: str, change: dict, kind: type, message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 5, 16),
        "k": torch.zeros(2, 2, 5, 16),
        "v": torch.zeros(2, 2, 5, 16),
        "horizon": 7,
        "backend": backend,
    }
    with pytest.raises(kind, match=message):
        memory_attention(**(arguments | change))


def test_environment_variable_sets_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(horizon=3)
    monkeypatch.setenv("DSMR_BACKEND", "no such thing")
    with pytest.raises(ValueError, match="got 'no such thing'"):
        memory_attention(case.q, case.k, case.v, horizon=3)
    monkeypatch.setenv("DSMR_BACKEND", "reference")
    assert math.isfinite(float(memory_attention(case.q, case.k, case.v, horizon=3).sum()))
