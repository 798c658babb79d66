"""Who is the last of several programs: counters go back to zero, and calls that run at once do not share them."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsmr_kernels import KVMemory, append_rotated, available_backends, decode_attention
from dsmr_kernels.cases import filled_memory
from dsmr_kernels.tolerance import error

if "triton" not in available_backends():
    pytest.skip("needs Triton, and a GPU or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from dsmr_kernels.backends.triton import arrivals
from dsmr_kernels.backends.triton.decode import splits_of
from dsmr_kernels.backends.triton.step import programs_of

on_gpu = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
interpreted = pytest.mark.skipif(on_gpu, reason="runs through the interpreter, on a machine without a GPU")


@pytest.fixture(autouse=True)
def _own_counters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Counters that only this test uses; they end as zeros."""
    monkeypatch.setattr(arrivals, "_devices", {})
    yield
    for device in arrivals._devices.values():
        for counted in (*device._of_streams.values(), *device._reserves):
            assert not counted.any()


def used() -> int:
    """How many streams, or threads, have counters."""
    return sum(len(device._of_streams) for device in arrivals._devices.values())


def call(
    batch: int, kv_heads: int, group: int, new: int, capacity: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, KVMemory]:
    memory = filled_memory(batch, kv_heads, capacity, 16, [3 * capacity, 7, 50][:batch], dtype=dtype)
    return torch.randn(batch, kv_heads * group, new, 16).to(DEVICE, dtype), memory.to(DEVICE)


SHAPES = [(1, 1, 1, 1, 200), (2, 2, 4, 1, 150), (3, 1, 2, 5, 100), (1, 2, 3, 16, 300)]


@pytest.mark.slow
@interpreted
def test_calls_of_other_shapes_between_leave_the_bits_of_a_call_alone() -> None:
    calls = [call(*shape) for shape in SHAPES]
    first = [decode_attention(q, memory, backend="triton") for q, memory in calls]
    for (q, memory), out in zip(calls, first, strict=True):
        exact = decode_attention(q.double(), memory.to(dtype=torch.float64), backend="reference")
        assert error(out, exact) < 1e-5
    for order in ([3, 0, 2, 1], [1, 1, 0, 3]):
        for index in order:
            assert torch.equal(decode_attention(*calls[index], backend="triton"), first[index])
    assert used() == 1


@interpreted
@pytest.mark.parametrize("seen", [0, 1, 63])
def test_splits_without_a_slot_are_not_waited_for(seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmr_kernels.api.may_look", lambda tensor: False)  # as on a GPU
    memory = filled_memory(1, 1, 256, 16, [seen])
    q = torch.randn(1, 2, 1, 16)
    out = decode_attention(q, memory, backend="triton")
    assert used() == 1
    if seen == 0:
        assert not out.any()
    else:
        assert error(out, decode_attention(q, memory, backend="reference")) < 1e-5


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads", "new"), [(40, 8, 1), (6, 2, 16), (16, 16, 4)])
@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
def test_a_row_of_many_heads_is_stored_by_several_programs(
    heads: int, kv_heads: int, new: int, stored: torch.dtype
) -> None:
    memory = filled_memory(3, kv_heads, 40, 16, [97, 0, 39]).to(dtype=stored)
    other = memory.clone()
    for _ in range(3):
        q, k, v = (torch.randn(3, count, new, 16) for count in (heads, kv_heads, kv_heads))
        cos, sin = torch.rand(2, 3, 1, new, 8)
        turned = append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton")
        assert torch.equal(turned, append_rotated(q, k, v, other, cos=cos, sin=sin, backend="reference"))
        for name, x in memory.tensors().items():
            assert torch.equal(x, getattr(other, name)), name
    assert used() == 1


def test_few_heads_are_one_program_and_nothing_is_shared_beyond_the_counters() -> None:
    assert [programs_of(1, blocks) for blocks in (1, 3, 4, 10)] == [1, 1, 4, 10]
    assert programs_of(arrivals.MOST_COUNTERS + 1, 10) == 1
    assert splits_of(1 << 20, arrivals.MOST_COUNTERS + 1, 1 << 20, 16) == 1


@interpreted
def test_a_launch_that_fails_leaves_no_counts_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.backends.triton.launch import Launch

    q, memory = call(1, 1, 1, 1, 200)
    out = decode_attention(q, memory, backend="triton")

    def interrupted(self: Launch, stream: int, *tensors: Tensor) -> None:
        tensors[-1].fill_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode_attention(q, memory, backend="triton")
    assert used() == 0
    assert torch.equal(decode_attention(q, memory, backend="triton"), out)


def test_a_compiled_call_keeps_nothing_that_it_allocates() -> None:
    assert arrivals.counters(DEVICE, 5, keep=False).shape == (arrivals.MOST_COUNTERS,)
    assert used() == 0
    kept = arrivals.counters(DEVICE, 5, keep=True)
    assert arrivals.counters(DEVICE, 5, keep=False).data_ptr() == kept.data_ptr()


def test_captured_launches_share_counters_with_nobody() -> None:
    """Not even when the reserve is used up, and the next eager call makes another one."""
    device = arrivals._Device(DEVICE)
    device._taken = arrivals.RESERVE  # as on a GPU
    before = device.of_graph(40)  # there is no reserve yet
    assert device._reserves == []
    assert not before.any()
    for reserves in (1, 2):
        eager = device.of_stream(7, keep=True)
        assert len(device._reserves) == reserves
        taken = []
        while device._taken + 64 <= arrivals.RESERVE:
            taken.append(device.of_graph(40))
        places = [x.data_ptr() for x in taken]
        assert len(set(places)) == len(places) == arrivals.RESERVE // 64
        assert all(place % 128 == places[0] % 128 for place in places)
        assert eager.data_ptr() not in places


@pytest.mark.gpu
@pytest.mark.skipif(not on_gpu, reason="needs a GPU")
class TestOnGpu:
    def test_repeated_runs_give_the_same_bits(self) -> None:
        calls = [call(*shape, dtype=torch.bfloat16) for shape in [*SHAPES, (1, 8, 4, 1, 8192), (3, 2, 8, 4, 3000)]]
        first = [decode_attention(q, memory, backend="triton") for q, memory in calls]
        for _ in range(200):
            for (q, memory), out in zip(calls, first, strict=True):
                assert torch.equal(decode_attention(q, memory, backend="triton"), out)

    def test_two_streams_at_once(self) -> None:
        calls = [call(1, 2, 4, 1, 8192, torch.bfloat16), call(2, 4, 2, 3, 5000, torch.bfloat16)]
        first = [decode_attention(q, memory, backend="triton") for q, memory in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[], []]
        for _ in range(300):
            for stream, (q, memory), out in zip(streams, calls, found, strict=True):
                with torch.cuda.stream(stream):
                    out.append(decode_attention(q, memory, backend="triton"))
        torch.cuda.synchronize()
        assert used() == 3
        for out, others in zip(first, found, strict=True):
            assert all(torch.equal(out, other) for other in others)

    def test_graphs_replayed_many_times_beside_each_other_and_eager_calls(self) -> None:
        calls = [call(1, 2, 4, 1, 8192, torch.bfloat16), call(2, 4, 2, 3, 5000, torch.bfloat16)]
        first = [decode_attention(q, memory, backend="triton") for q, memory in calls]
        graphs, captured = [], []
        for q, memory in calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured.append([decode_attention(q, memory, backend="triton") for _ in range(3)])
            graphs.append(graph)
        streams = [torch.cuda.Stream() for _ in graphs]
        eager = []
        for _ in range(300):
            for stream, graph in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            eager.append(decode_attention(*calls[0], backend="triton"))
        torch.cuda.synchronize()
        assert all(torch.equal(out, first[0]) for out in eager)
        for outs, out in zip(captured, first, strict=True):
            assert all(torch.equal(other, out) for other in outs)

    def test_a_graph_that_nothing_eager_came_before_zeroes_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q, memory = call(1, 2, 4, 1, 8192, torch.bfloat16)
        out = decode_attention(q, memory, backend="triton")  # compiles
        monkeypatch.setattr(arrivals, "_devices", {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = decode_attention(q, memory, backend="triton")
        assert used() == 0
        for _ in range(100):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, out)

    def test_steps_of_many_heads_captured_and_replayed(self) -> None:
        memory = filled_memory(2, 8, 300, 128, [290, 20], dtype=torch.bfloat16).to(DEVICE)
        other = memory.clone()
        q, k, v = (torch.randn(2, heads, 1, 128, device=DEVICE).bfloat16() for heads in (64, 8, 8))
        append_rotated(q, k, v, memory, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            turned = append_rotated(q, k, v, memory, backend="triton")
        for step in range(50):
            append_rotated(q, k, v, other, backend="reference")
            if step == 49:
                break
            for x in (q, k, v):
                x.normal_()
            graph.replay()
            assert torch.equal(turned, q)
        for name, x in memory.tensors().items():
            assert torch.equal(x, getattr(other, name)), name
