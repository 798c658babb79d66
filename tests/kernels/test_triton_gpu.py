"""The Triton kernels on a GPU: real sizes, every dtype, and what the interpreter cannot show.

    python -m pytest tests/kernels/test_triton_gpu.py -m gpu

Needs PyTorch, Triton and pytest alone.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attention_cases import CASES, MORE, pieces
from guard import Buffers, guarded, surrounded_case

from dsmr_kernels import available_backends, dispatch, memory_attention
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.testing import assert_agrees_with_oracle, run
from dsmr_kernels.tolerance import error

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"),
    pytest.mark.skipif(
        torch.cuda.is_available() and (_INTERPRETED or "triton" not in available_backends()),
        reason="needs Triton, without TRITON_INTERPRET=1",
    ),
]
SERVED = {name: case for name, case in (CASES | MORE).items() if case.get("head_dim", 16) >= 16}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    yield from guarded(monkeypatch)


def case_of(**options: object) -> Case:
    return random_case(**options).to(device="cuda")


@every_dtype
@pytest.mark.parametrize("name", SERVED)
def test_kernels_agree_with_oracle(name: str, dtype: torch.dtype) -> None:
    assert_agrees_with_oracle(case_of(dtype=dtype, **SERVED[name]), "triton")


@pytest.mark.parametrize("name", ["memory wrapped", "no memory", "gradients across segments", "sliding"])
def test_a_prepared_call_launches_by_address_and_gives_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsmr_kernels.backends.triton import launch

    monkeypatch.undo()  # tensors that lie anywhere are launched as others are
    case, by_address = case_of(dtype=torch.bfloat16, **SERVED[name]), []
    usual = launch.Launch.at
    monkeypatch.setattr(launch.Launch, "at", lambda self, *given: (by_address.append(self), usual(self, *given))[1])
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    found = []
    for _ in range(5):
        out = memory_attention(*leaves, case.memory, **case.options, backend="triton")
        found.append([out.detach(), *torch.autograd.grad(out, leaves, case.grad)])
    assert type(out.grad_fn).__name__ == "_SwiftNodeBackward"
    assert by_address
    assert all(torch.equal(x, y) for again in found[1:] for x, y in zip(again, found[0], strict=True))


LARGE = {
    "one segment": {"queries": 1024, "capacity": 4096, "seen": [9000, 3000], "horizon": 4096},
    "odd sizes": {"queries": 1001, "capacity": 2047, "seen": [2500, 1], "horizon": 1999},
    "many segments": {"queries": 4096, "capacity": 1000, "seen": [999, 5000], "horizon": 777, "segment_length": 333},
    "segments not detached": {
        "queries": 2048,
        "capacity": 512,
        "seen": [700, 0],
        "horizon": 512,
        "segment_length": 500,
        "segment_offset": 77,
        "detach_segments": False,
    },
    "sliding": {"queries": 2048, "capacity": 600, "seen": [700, 333], "horizon": 600, "visibility": "sliding"},
    "pieces, ALiBi, more keys than queries": {
        "queries": 1500,
        "tokens": 2000,
        "capacity": 1024,
        "seen": [1024, 3000],
        "horizon": 1024,
        "segment_length": 512,
        "piece_start": pieces([-1] * 700 + [700] * 1300, [0] * 5 + [5] * 1000 + [1005] * 995),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
    },
    "a learned bias": {"queries": 1024, "capacity": 2048, "seen": [3000, 700], "horizon": 2048, "biased": True},
    "a learned bias, many segments, ALiBi": {
        "queries": 1001,
        "tokens": 1111,
        "capacity": 1000,
        "seen": [999, 5000],
        "horizon": 777,
        "segment_length": 333,
        "segment_offset": torch.tensor([5, 200]),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.01]),
        "biased": True,
    },
    "pieces, sliding, not detached": {
        "queries": 2000,
        "capacity": 300,
        "seen": [1024, 30],
        "horizon": 900,
        "visibility": "sliding",
        "detach_segments": False,
        "piece_start": pieces([-1] * 700 + [700] * 1300, [0] * 5 + [5] * 1000 + [1005] * 995),
    },
}


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", LARGE)
def test_real_sizes_agree_with_oracle(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_agrees_with_oracle(case_of(dtype=dtype, head_dim=head_dim, **LARGE[name]), "triton")


@every_dtype
@pytest.mark.parametrize("head_dim", [16, 20, 32, 40, 72, 80, 96, 160, 192, 256])
def test_every_head_dim_agrees_with_oracle(head_dim: int, dtype: torch.dtype) -> None:
    case = case_of(
        queries=300, capacity=200, seen=[500, 77], horizon=190, segment_length=128, head_dim=head_dim, dtype=dtype
    )
    assert_agrees_with_oracle(case, "triton")


@every_dtype
@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128, 192, 256])
def test_a_bias_agrees_with_oracle_at_every_head_dim(
    head_dim: int, stored: torch.dtype | None, dtype: torch.dtype
) -> None:
    options = {"queries": 300, "capacity": 200, "seen": [500, 77], "horizon": 190, "segment_length": 128}
    case = case_of(**options, biased=True, head_dim=head_dim, stored=stored, dtype=dtype)
    assert_agrees_with_oracle(case, "triton")


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_query_groups_agree_with_oracle(kv_heads: int) -> None:
    options = {"queries": 257, "capacity": 300, "seen": [500, 77], "horizon": 300}
    assert_agrees_with_oracle(
        case_of(heads=8, kv_heads=kv_heads, head_dim=64, dtype=torch.bfloat16, **options), "triton"
    )


@pytest.mark.parametrize("name", LARGE)
def test_repeated_runs_give_the_same_bits(name: str) -> None:
    case = case_of(dtype=torch.bfloat16, head_dim=64, **LARGE[name])
    first = run(case, "triton")
    for _ in range(5):
        for result, value in run(case, "triton").items():
            assert torch.equal(value, first[result])


@pytest.mark.parametrize("name", LARGE)
def test_nothing_around_the_tensors_is_read_and_no_empty_slot(name: str) -> None:
    case = case_of(dtype=torch.bfloat16, head_dim=72, **LARGE[name])
    expected = run(case, "triton")
    for result, value in run(surrounded_case(case), "triton").items():
        assert error(value, expected[result]) == 0


@every_dtype
def test_segments_in_one_launch_equal_sequential_calls(dtype: torch.dtype) -> None:
    case = case_of(queries=1000, capacity=300, seen=[500, 77], head_dim=64, dtype=dtype)
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    parts = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    memory = case.memory.clone()
    out = memory_attention(*whole, case.memory, horizon=300, segment_length=200, backend="triton")
    out.backward(case.grad)
    bound = 8 * torch.finfo(dtype).eps
    for begin in range(0, 1000, 200):
        q, k, v = (x[:, :, begin : begin + 200] for x in parts)
        piece = memory_attention(q, k, v, memory, horizon=300, backend="triton")
        assert error(piece, out[:, :, begin : begin + 200]) < bound * float(out.detach().abs().max())
        piece.backward(case.grad[:, :, begin : begin + 200])
        memory.append(k, v)
    for one, many in zip(whole, parts, strict=True):
        assert error(one.grad, many.grad) < bound * float(one.grad.abs().max())


def test_it_serves_unasked_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the trial allocates for itself
    monkeypatch.delenv("DSMR_BACKEND", raising=False)
    dispatch._disagreements.clear()
    for dtype, name in ((torch.bfloat16, "triton"), (torch.float16, "triton"), (torch.float32, "sdpa")):
        q = torch.empty(1, 1, 1, 64, dtype=dtype, device="cuda")
        assert dispatch.choose(q, None).__name__ == f"dsmr_kernels.backends.{name}"
    assert set(dispatch._disagreements.values()) == {None}
    assert {key[:3] for key in dispatch._disagreements} == {
        (str(q.device), 64, name) for name in ("bfloat16", "float16")
    }


def test_a_call_does_not_wait_for_the_device() -> None:
    options = {"piece_start": pieces([-1] * 100, [3] * 100).clamp(max=0), "alibi_slopes": torch.rand(4)}
    options |= {"segment_offset": torch.tensor([3, 7]), "stored": torch.int8, "biased": True}
    case = case_of(queries=100, seen=[57, 30], horizon=40, segment_length=20, head_dim=64, **options)
    run(case, "triton")  # compiles
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    case.options["distance_bias"].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = memory_attention(*leaves, case.memory, **case.options, backend="triton")
        case.memory.append(leaves[1], leaves[2])
        out.backward(case.grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay_follows_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths and ring position are read on the device: a captured call serves whatever the memory holds by then."""
    monkeypatch.undo()  # the buffers of a graph belong to its pool
    options = {"queries": 128, "capacity": 200, "horizon": 200, "head_dim": 64, "dtype": torch.bfloat16}
    case = case_of(seen=[300, 17], **options)

    def step() -> dict[str, torch.Tensor]:
        return run(case, "triton")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed, seen in enumerate([[300, 17], [0, 777], [1, 200]]):
        other = case_of(seen=seen, seed=seed, **options)
        for name in ("q", "k", "v", "grad"):
            getattr(case, name).copy_(getattr(other, name))
        for name in ("k", "v", "length", "position"):
            getattr(case.memory, name).copy_(getattr(other.memory, name))
        graph.replay()
        for name, value in run(other, "triton").items():
            assert torch.equal(captured[name], value)


def test_a_sweep_compiles_nothing_anew() -> None:
    from dsmr_kernels.backends.triton.backward import dkv_kernel, dq_kernel
    from dsmr_kernels.backends.triton.forward import forward_kernel

    def compiled() -> int:
        kernels = (forward_kernel, dq_kernel, dkv_kernel)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    options = {"head_dim": 64, "dtype": torch.bfloat16}
    run(case_of(queries=33, capacity=40, seen=[57, 30], horizon=17, segment_length=9, **options), "triton")
    before = compiled()
    assert before >= 3
    for step in range(1, 30):
        length = (None, step, 16, 1 << 40)[step % 4]
        case = case_of(
            queries=8 * step + step % 3, tokens=9 * step + 3, capacity=7 * step, seen=[11 * step, 5], horizon=5 * step,
            segment_length=length, segment_offset=min(step, (length or 99) - 1), **options,
        )  # fmt: skip
        run(case, "triton")
    assert compiled() == before


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_fullgraph_gives_the_same_outputs_and_gradients(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # compilers know torch.empty, not what stands in for it
    torch._dynamo.reset()
    case = case_of(seen=[57, 30], horizon=17, segment_length=9, head_dim=64, dtype=torch.bfloat16)
    expected = run(case, "triton")
    compiled = torch.compile(memory_attention, fullgraph=True, backend=compiler)
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = compiled(*leaves, case.memory, **case.options, backend="triton")
    out.backward(case.grad)
    assert torch.equal(out, expected["out"])
    for leaf, gradient in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert torch.equal(leaf.grad, expected[gradient])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current_one() -> None:
    case = random_case(seen=[57, 30], horizon=17).to(device="cuda:1")
    with torch.cuda.device(0):
        assert_agrees_with_oracle(case, "triton")


def run_everything_once() -> None:
    """What the sanitizer watches: every case, forward and backward, in one dtype."""
    for case in SERVED.values():
        run(case_of(dtype=torch.bfloat16, **case), "triton")
    run(case_of(dtype=torch.float16, head_dim=72, **LARGE["odd sizes"]), "triton")
    torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer, which is not in PATH")
def test_no_access_out_of_bounds_under_the_sanitizer() -> None:
    """Slow: every memory access is checked. Each tensor is an allocation of its own, so that its ends are known."""
    here = Path(__file__).parent
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1]), environment.get("PYTHONPATH", "")])
    command = [shutil.which("compute-sanitizer"), "--tool", "memcheck", "--error-exitcode", "9"]
    command += [sys.executable, "-c", "import test_triton_gpu; test_triton_gpu.run_everything_once()"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    output = result.stdout + result.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or driver")
    assert result.returncode == 0, output[-4000:]
    assert "ERROR SUMMARY: 0 errors" in output
