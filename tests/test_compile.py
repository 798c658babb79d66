"""Under `torch.compile` a call is one operator: no graph breaks, and no compilation for a new horizon or length."""

import pytest
import torch

from dsmr_kernels import KVMemory, available_backends, memory_attention
from dsmr_kernels.testing import error, random_case, run

every = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@every
@pytest.mark.parametrize("name", ["memory", "no memory", "pieces and ALiBi"])
def test_fullgraph_gives_the_same_outputs_and_gradients(backend: str, name: str) -> None:
    options = {
        "memory": {"seen": [57, 30]},
        "no memory": {},
        "pieces and ALiBi": {
            "seen": [57, 30],
            "piece_start": torch.tensor([[-1] * 12 + [12] * 21, [0] * 33], dtype=torch.int32),
            "alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0]),
        },
    }[name]
    case = random_case(horizon=17, segment_length=9, **options)
    expected = run(case, backend)
    compiled = torch.compile(memory_attention, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = compiled(*leaves, case.memory, **case.options, backend=backend)
    out.backward(case.grad)
    assert error(out, expected["out"]) < 1e-6
    for leaf, gradient in zip(leaves, ("dq", "dk", "dv"), strict=True):
        assert error(leaf.grad, expected[gradient]) < 1e-6


def test_a_sweep_of_horizons_lengths_and_offsets_compiles_nothing_anew() -> None:
    def step(q: torch.Tensor, memory: KVMemory, horizon: int, offset: int) -> torch.Tensor:
        out = memory_attention(
            q, q, q, memory, horizon=horizon, segment_length=64, segment_offset=offset, backend="sdpa"
        )
        memory.append(q, q)
        return out

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    memory, other = (KVMemory.empty(1, 2, 40, 8) for _ in range(2))
    with torch.no_grad():
        for index in range(3):  # the compiler learns which integers vary
            compiled(torch.randn(1, 2, 8, 8), memory, 5 + index, 2 + index)
        before = counter.frame_count
        for index in range(20):
            q = torch.randn(1, 2, 8, 8)
            memory_before = memory.clone()
            out = compiled(q, memory, 2 * index, (8 * index) % 64)
            exact = memory_attention(
                q, q, q, memory_before, horizon=2 * index, segment_length=64, segment_offset=(8 * index) % 64
            )
            memory_before.append(q, q)
            assert error(out, exact) < 1e-6
            assert torch.equal(memory.k, memory_before.k)
    assert counter.frame_count == before
    del other


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


def test_operators_pass_opcheck() -> None:
    case = random_case(queries=9, seen=[57, 30], horizon=17)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    memory = case.memory
    arguments = (
        q,
        k,
        v,
        memory.k,
        memory.v,
        memory.length,
        memory.position,
        None,
        None,
        17,
        4,
        1,
        "segment",
        True,
        0.25,
    )
    torch.library.opcheck(torch.ops.dsmr_kernels.sdpa_forward, arguments)
    without_memory = (q, k, v, None, None, None, None, None, None, 17, 0, 0, "sliding", False, 0.25)
    torch.library.opcheck(torch.ops.dsmr_kernels.sdpa_forward, without_memory)
