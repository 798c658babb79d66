"""Decoding with the Triton kernels: against the oracle and the whole-piece call through the interpreter, and on a GPU,
where there is one, in bfloat16 and captured in a graph."""

import pytest
import torch
from torch import Tensor

from dsmr_kernels import KVMemory, append_rotated, available_backends, decode_attention, memory_attention
from dsmr_kernels.cases import filled_memory
from dsmr_kernels.costing.cost import memory_capacity
from dsmr_kernels.tolerance import error

if "triton" not in available_backends():
    pytest.skip("needs Triton, and a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

on_gpu = torch.cuda.is_available()
interpreted = pytest.mark.skipif(on_gpu, reason="runs through the interpreter, on a machine without a GPU")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not on_gpu, reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and scratch buffers begin as NaN, so that what no kernel writes, or reads unwritten, is found."""
    empty = torch.empty

    def poisoned(*arguments, **options) -> Tensor:
        x = empty(*arguments, **options)
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch, "empty", poisoned)


def poison_what_is_not_held(memory: KVMemory) -> KVMemory:
    """NaN in every slot that holds no token of the row's piece."""
    age = (memory.position[:, None] - 1 - torch.arange(memory.capacity)).remainder(memory.capacity) + 1
    unheld = (age > memory.length[:, None])[:, None, :, None]
    memory.k.masked_fill_(unheld, float("nan"))
    memory.v.masked_fill_(unheld, float("nan"))
    return memory


def expected(q: Tensor, memory: KVMemory, **options) -> Tensor:
    """The oracle's answer, in float64."""
    clean = KVMemory(memory.k.nan_to_num(), memory.v.nan_to_num(), memory.length, memory.position)
    return decode_attention(q.double(), clean.to(dtype=torch.float64), backend="reference", **options)


def a_bias(heads: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A bias by distance of fewer buckets than there are distances."""
    return {
        "distance_bias": torch.randn(heads, 5).to(dtype),
        "distance_buckets": torch.tensor([0, 1, 2, 2, 3, 3, 3, 3, 4]),
    }


def allowed(memory: KVMemory) -> float:
    return 8 * torch.finfo(memory.k.dtype).eps * float(memory.v.nan_to_num().abs().max())


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("group", "new", "head_dim", "seen", "capacity", "dtype"),
    [
        (1, 1, 16, [250, 3], 100, torch.float32),  # wrapped, and nearly empty: most splits of that row are empty
        (2, 3, 40, [30, 101], 100, torch.float16),
        (8, 1, 64, [77], 128, torch.float16),
        (8, 5, 16, [300], 64, torch.float32),  # more stacked queries than one tile holds
        (1, 16, 80, [16, 40], 33, torch.float32),  # nothing but the new tokens
        (2, 16, 16, [50], 16, torch.float16),  # as many new tokens as slots
        (2, 7, 128, [90], 37, torch.float16),
        (1, 1, 17, [5], 1, torch.float32),  # one slot, and a head_dim that no tile fits
    ],
)
def test_decode_agrees_with_oracle(
    group: int, new: int, head_dim: int, seen: list[int], capacity: int, dtype: torch.dtype
) -> None:
    kv_heads = 1 if group == 8 else 2
    memory = filled_memory(len(seen), kv_heads, capacity, head_dim, seen, dtype=dtype)
    poison_what_is_not_held(memory)
    q = torch.randn(len(seen), kv_heads * group, new, head_dim).to(dtype)
    limited = torch.tensor([max(new, count // 3) for count in seen], dtype=torch.int32)
    more = {"visible": limited, "alibi_slopes": torch.rand(kv_heads * group)}
    for options in ({}, more, a_bias(kv_heads * group), more | a_bias(kv_heads * group, dtype)):
        out = decode_attention(q, memory, backend="triton", **options)
        assert out.dtype == dtype
        assert error(out, expected(q, memory, **options)) <= allowed(memory)
    assert torch.equal(out, decode_attention(q, memory, backend="triton", **options))


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("processors", [1, 4], ids=["one split", "several splits"])
@pytest.mark.parametrize(("head_dim", "v_head_dim", "stored"), [(16, 40, None), (40, 17, None), (32, 16, torch.int8)])
def test_sinks_and_values_of_another_head_dim(
    head_dim: int, v_head_dim: int, stored: torch.dtype | None, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that stores the new tokens, and its attention, in which a logit without a value takes part."""
    monkeypatch.setattr("dsmr_kernels.backends.triton.decode.processors", lambda device: processors)
    memory = filled_memory(2, 2, 70, head_dim, [90, 3], v_head_dim=v_head_dim).to(dtype=stored)
    other = memory.clone()
    q, k, v = (torch.randn(2, heads, 2, dim) for heads, dim in ((4, head_dim), (2, head_dim), (2, v_head_dim)))
    cos, sin = torch.rand(2, 2, 1, 2, head_dim // 2)
    turned = append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton")
    assert torch.equal(turned, append_rotated(q, k, v, other, cos=cos, sin=sin, backend="reference"))
    for name, x in memory.tensors().items():
        assert error(x.float(), getattr(other, name).float()) == 0, name
    held = memory.to(dtype=torch.float32)
    for sinks in (torch.randn(4), torch.tensor([-torch.inf, 50.0, -50.0, 0.0])):
        out = decode_attention(turned, memory, sinks=sinks, backend="triton")
        assert out.shape == (2, 4, 2, v_head_dim)
        assert error(out, expected(turned, held, sinks=sinks)) <= allowed(held)


@interpreted
def test_all_numbers_of_new_tokens_up_to_16() -> None:
    memory = filled_memory(1, 1, 30, 16, [70])
    for new in range(1, 17):
        q = torch.randn(1, 2, new, 16)
        assert error(decode_attention(q, memory, backend="triton", scale=0.5), expected(q, memory, scale=0.5)) < 1e-5


@interpreted
@pytest.mark.parametrize("processors", [1, 4, 64])
def test_the_number_of_splits_does_not_change_the_result(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = poison_what_is_not_held(filled_memory(2, 1, 128, 16, [500, 40]))
    q = torch.randn(2, 2, 2, 16)
    monkeypatch.setattr("dsmr_kernels.backends.triton.decode.processors", lambda device: processors)
    visible = torch.tensor([128, 35], dtype=torch.int32)
    out = decode_attention(q, memory, backend="triton", visible=visible)
    assert error(out, expected(q, memory, visible=visible)) < 1e-6


def test_the_number_of_splits_depends_on_capacity_and_device_alone() -> None:
    from dsmr_kernels.backends.triton.decode import splits_of

    assert splits_of(8192, programs=256, processors=132, block=64) == 2
    assert splits_of(4096, programs=8, processors=132, block=64) == 32  # two blocks each
    assert splits_of(100, programs=1, processors=132, block=64) == 1
    assert splits_of(1 << 20, programs=1, processors=132, block=64) == 128


@interpreted
def test_strided_queries_and_memory_are_read_where_they_lie() -> None:
    memory = filled_memory(2, 2, 40, 16, [70, 20])
    q = torch.randn(2, 4, 3, 16)
    plain = decode_attention(q, memory, backend="triton")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, memory.k, memory.v)]
    wide = torch.zeros(2, 4, 3, 32)
    wide[..., ::2] = q  # not even the last dimension is contiguous
    strided = KVMemory(turned[1], turned[2], memory.length, memory.position)
    assert torch.equal(decode_attention(turned[0], strided, backend="triton"), plain)
    assert torch.equal(decode_attention(wide[..., ::2], strided, backend="triton"), plain)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
@pytest.mark.parametrize("alibi", [False, True])
def test_token_by_token_equals_the_whole_piece_past_ten_turns_of_the_ring(visibility: str, alibi: bool) -> None:
    length, horizon, dim = 3, 4, 16
    capacity = memory_capacity(horizon, length, visibility)
    tokens = 10 * capacity + length + 2
    q, k, v = (torch.randn(1, heads, tokens, dim) for heads in (2, 1, 1))
    slopes = torch.tensor([0.5, 0.1]) if alibi else None
    rule = {"horizon": horizon, "segment_length": length, "visibility": visibility, "alibi_slopes": slopes}
    whole = memory_attention(q, k, v, **rule, backend="triton")
    memory = KVMemory.empty(1, 1, capacity, dim)
    wanted = {1, length - 1, length, length + 1, *range(10 * capacity, tokens)}
    for token in range(tokens):
        step = slice(token, token + 1)
        turned = append_rotated(q[:, :, step], k[:, :, step], v[:, :, step], memory, backend="triton")
        if token in wanted:
            sees = horizon + (token % length if visibility == "segment" else 0) + 1
            out = decode_attention(
                turned,
                memory,
                visible=torch.full((1,), sees, dtype=torch.int32),
                alibi_slopes=slopes,
                backend="triton",
            )
            assert error(out, whole[:, :, step]) < 1e-5
    assert int(memory.position) == tokens


def test_no_gradient_is_promised() -> None:
    memory = filled_memory(1, 1, 8, 16, [9])
    device = "cuda" if on_gpu else "cpu"
    with pytest.raises(RuntimeError, match=r"gives no gradient, but q requires one: call it under torch.no_grad\(\)"):
        decode_attention(
            torch.randn(1, 1, 1, 16, device=device, requires_grad=True), memory.to(device), backend="triton"
        )


@interpreted
def test_operators_pass_opcheck() -> None:
    memory = filled_memory(2, 1, 40, 16, [50, 9])
    q = torch.randn(2, 2, 1, 16)
    ring = (memory.k, memory.v, None, None, memory.length, memory.position)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.dsmr_kernels.triton_decode,
        (q, *ring, memory.length, torch.rand(2), torch.rand(2), *a_bias(2).values(), 0.25),
        test_utils=checks,
    )
    cos, sin = torch.rand(2, 1, 1, 8), torch.rand(2, 1, 1, 8)
    torch.library.opcheck(
        torch.ops.dsmr_kernels.triton_step, (q, q[:, :1], q[:, 1:], cos, sin, *ring), test_utils=checks
    )


@interpreted
def test_a_compiled_step_is_two_operators_and_gives_the_same() -> None:
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, memory: KVMemory) -> Tensor:
        return decode_attention(
            append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton"), memory, backend="triton"
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    memory = filled_memory(2, 1, 20, 16, [50, 9])
    other = memory.clone()
    with torch.no_grad():
        for _ in range(3):
            inputs = [torch.randn(2, heads, 1, 16) for heads in (2, 1, 1)]
            inputs += [torch.rand(2, 1, 1, 8) for _ in range(2)]
            assert torch.equal(compiled(*inputs, memory), step(*inputs, other))
    for name in ("k", "v", "length", "position"):
        assert torch.equal(getattr(memory, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("group", "new", "head_dim"), [(1, 1, 64), (4, 1, 128), (8, 16, 128), (1, 3, 80), (2, 1, 256)])
class TestOnGpu:
    pytestmark = gpu

    def test_decode_agrees_with_oracle(self, group: int, new: int, head_dim: int, dtype: torch.dtype) -> None:
        memory = poison_what_is_not_held(filled_memory(3, 2, 2000, head_dim, [9000, 17, 1500], dtype=dtype))
        q = torch.randn(3, 2 * group, new, head_dim).to(dtype)
        visible = torch.tensor([1999, 16, 700], dtype=torch.int32)
        exact = expected(q, memory, visible=visible)
        out = decode_attention(q.cuda(), memory.to("cuda"), visible=visible.cuda(), backend="triton")
        assert error(out.cpu(), exact) <= allowed(memory)

    def test_a_bias_by_distance_agrees_with_oracle(
        self, group: int, new: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        memory = filled_memory(3, 2, 700, head_dim, [9000, 17, 650], dtype=dtype)
        q = torch.randn(3, 2 * group, new, head_dim).to(dtype)
        given = a_bias(2 * group) | {
            "distance_buckets": torch.arange(1, 600).log2().long().clamp(max=4),
            "alibi_slopes": torch.full((2 * group,), 0.01),
        }
        for stored in (dtype, torch.int8):
            held = memory.to(dtype=stored)
            exact = expected(q, held.to(dtype=torch.float32), **given)
            on_device = {name: x.cuda() for name, x in given.items()}
            out = decode_attention(q.cuda(), held.to("cuda"), **on_device, backend="triton")
            assert error(out.cpu(), exact) <= allowed(memory)

    def test_a_captured_step_advances_on_the_device(
        self, group: int, new: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        def inputs() -> list[Tensor]:
            heads = (2 * group, 2, 2)
            return [torch.randn(2, h, new, head_dim, device="cuda").to(dtype) for h in heads] + [
                torch.rand(2, 1, new, head_dim // 2, device="cuda") for _ in range(2)
            ]

        def step(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, memory: KVMemory) -> Tensor:
            turned = append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton")
            return decode_attention(turned, memory, backend="triton")

        start = filled_memory(2, 2, 300, head_dim, [290, 20], dtype=dtype).to("cuda")
        memory, eager, static = start.clone(), start.clone(), inputs()
        side = torch.cuda.Stream()
        with torch.no_grad():
            with torch.cuda.stream(side):  # compiled before the capture
                step(*static, start.clone())
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(*static, memory)
            for name in ("k", "v", "length", "position"):  # as before the capture
                getattr(memory, name).copy_(getattr(start, name))
            for _ in range(20):
                fresh = inputs()
                for old, value in zip(static, fresh, strict=True):
                    old.copy_(value)
                graph.replay()
                assert torch.equal(out, step(*fresh, eager))
        assert torch.equal(memory.position, start.position + 20 * new)
