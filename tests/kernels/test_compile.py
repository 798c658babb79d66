"""Under `torch.compile` a call is one operator: no graph breaks, and no compilation for a new horizon or length."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing  # not there unasked in PyTorch 2.14

from dsmr_kernels import KVMemory, available_backends, memory_attention
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.testing import run
from dsmr_kernels.tolerance import error

# On a GPU the Triton kernels take CUDA tensors: there `test_triton_gpu.py` compiles them.
BACKENDS = [name for name in available_backends() if name != "triton" or not torch.cuda.is_available()]
every = pytest.mark.parametrize("backend", BACKENDS)
operators = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@every
@pytest.mark.parametrize("name", ["memory", "no memory", "pieces and ALiBi", "a learned bias"])
def test_fullgraph_gives_the_same_outputs_and_gradients(backend: str, name: str) -> None:
    options = {
        "memory": {"seen": [57, 30]},
        "no memory": {},
        "pieces and ALiBi": {
            "seen": [57, 30],
            "piece_start": torch.tensor([[-1] * 6 + [6] * 11, [0] * 17], dtype=torch.int32),
            "alibi_slopes": torch.tensor([0.5, 0.25]),
        },
        "a learned bias": {"seen": [57, 30], "biased": True},
    }[name]
    case = random_case(heads=2, kv_heads=1, queries=17, horizon=17, segment_length=9, **options)
    expected = run(case, backend)
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    named = dict(zip(("dq", "dk", "dv"), leaves, strict=True))
    if "distance_bias" in case.options:
        named["db"] = case.options["distance_bias"].requires_grad_()
    out = compiled(*leaves, case.memory, **case.options, backend=backend)
    out.backward(case.grad)
    assert error(out, expected["out"]) < 1e-6
    for gradient, leaf in named.items():
        assert error(leaf.grad, expected[gradient]) < 1e-6


@pytest.mark.slow
@every
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_scale_may_be_a_symbol(backend: str, dynamic: bool | None) -> None:
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    q = torch.randn(1, 2, 5, 16)
    for scale in (0.3, 0.4, 0.5, -0.2, 0.0, 1e-40):
        options = {"horizon": 0, "scale": scale, "backend": backend}
        assert error(compiled(q, q, q, **options), memory_attention(q, q, q, **options)) < 1e-6


@pytest.mark.slow
@operators
def test_a_sweep_of_sizes_horizons_and_offsets_compiles_nothing_anew(backend: str) -> None:
    def step(q: torch.Tensor, memory: KVMemory, horizon: int, length: int, offset: int) -> torch.Tensor:
        out = memory_attention(
            q, q, q, memory, horizon=horizon, segment_length=length, segment_offset=offset, backend=backend
        )
        memory.append(q, q)
        return out

    torch._dynamo.utils.counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    memory = KVMemory.empty(1, 1, 40, 16)
    with torch.no_grad():
        for index in range(3):  # the compiler learns which integers vary
            compiled(torch.randn(1, 1, 8 + index, 16), memory, 5 + index, 64 + index, 2 + index)
        before = counter.frame_count, torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for index in range(6):
            q = torch.randn(1, 1, 2 + 6 * index, 16)
            memory_before = memory.clone()
            sizes = (10 * index, 30 + 6 * index, (8 * index) % 30)
            out = compiled(q, memory, *sizes)
            exact = step(q, memory_before, *sizes)
            assert error(out, exact) < 1e-6
            assert torch.equal(memory.k, memory_before.k)
    assert (counter.frame_count, torch._dynamo.utils.counters["stats"]["unique_graphs"]) == before
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.fixture(scope="module")
def launch_keys() -> dict[str, Any]:
    """What `launch_keys.py` prints."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    script = Path(__file__).with_name("launch_keys.py")
    paths = [str(script.parents[2]), os.environ.get("PYTHONPATH", "")]  # the sources beside it, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_one_sweep_is_one_compilation_of_each_triton_kernel(launch_keys) -> None:
    """T, S, batch, GQA group, capacity, ring position, horizon, segment length and offset are run-time values."""
    found = launch_keys["keys"]
    assert set(found) == {"16", "20", "40", "64", "80"}
    for head_dim, keys in found.items():
        assert keys == {"forward_kernel": 1, "dq_kernel": 1, "dkv_kernel": 1}, f"head_dim {head_dim}"


@pytest.mark.slow
def test_with_a_bias_it_is_one_of_each_again(launch_keys) -> None:
    """And the number of its buckets and distances is a run-time value, too."""
    kernels = ("table", "forward", "dq", "dkv", "dbias", "bucket")
    assert launch_keys["with a bias"] == {f"{kernel}_kernel": 1 for kernel in kernels}


@pytest.mark.slow
def test_a_launch_like_an_earlier_one_asks_triton_for_nothing(launch_keys) -> None:
    """And it runs the kernel that Triton would have chosen: `launch_keys.py` works that out at every launch."""
    first, second = launch_keys["starts"], launch_keys["starts again"]
    assert first["from the dictionary"] > 5 * first["by Triton"]
    decoding = {name: second[name] - first[name] for name in first}
    assert decoding["from the dictionary"] >= 24  # the calls once more, every other one with rows out of line
    assert decoding["by Triton"] <= 2 * 12


def test_training_step_with_append_in_the_graph() -> None:
    case = random_case(seen=[57, 30], horizon=40)
    eager_memory, memory = case.memory.clone(), case.memory.clone()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: KVMemory) -> torch.Tensor:
        out = memory_attention(q, k, v, memory, horizon=40)
        memory.append(k, v)
        return out

    grads = []
    for function, ring in ((step, eager_memory), (torch.compile(step, fullgraph=True, backend="aot_eager"), memory)):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        function(*leaves, ring).backward(case.grad)
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert error(one, other) < 1e-6
    assert torch.equal(memory.k, eager_memory.k)


def _operator_arguments(case: Case) -> tuple:
    memory = case.memory
    ring = (None,) * 4 if memory is None else (memory.k, memory.v, memory.length, memory.position)
    options = {"piece_start": None, "alibi_slopes": None, **case.options}
    buckets, bias = options.get("distance_buckets"), options.get("distance_bias")
    tensors = (None, None, options["piece_start"], options["alibi_slopes"], None, buckets)  # scales, ..., offsets, ...
    leaves = (None if x is None else x.clone().requires_grad_() for x in (case.q, case.k, case.v, bias))
    return *leaves, *ring, *tensors, options["horizon"], 4, 1, "segment", True, 0.25, False


@pytest.mark.slow
@operators
@pytest.mark.parametrize("name", ["no memory", "memory, pieces and ALiBi", "a learned bias"])
def test_operators_pass_opcheck(backend: str, name: str) -> None:
    options = {
        "no memory": {},
        "memory, pieces and ALiBi": {
            "seen": [7],
            "piece_start": torch.tensor([[-1] * 3 + [3] * 4], dtype=torch.int32),
            "alibi_slopes": torch.tensor([0.5, 0.25]),
        },
        "a learned bias": {"seen": [7], "biased": True},
    }[name]
    case = random_case(batch=1, heads=2, kv_heads=1, queries=7, horizon=9, **options)
    arguments = _operator_arguments(case)
    forward, backward = (getattr(torch.ops.dsmr_kernels, f"{backend}_{way}") for way in ("forward", "backward"))
    torch.library.opcheck(forward, arguments)
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    biased = arguments[3] is not None
    for needs in ([True, True, True, biased], [False, True, False, False]):
        torch.library.opcheck(backward, (case.grad, case.grad[..., 0].float(), *forward(*plain), needs, *plain))
