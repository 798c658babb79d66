"""A call like an earlier one, which a backend has prepared, gives what others give and keeps their promises.

`benchmarks.launch_cost` says what it costs.
"""

import gc
import importlib
import itertools
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_memories import BACKENDS
from torch import Tensor
from torch.autograd import forward_ad

from dsmr_kernels import KVMemory, alike, memory_attention
from dsmr_kernels.backends import autograd
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.spec import Alike

if "triton" not in BACKENDS:
    pytest.skip("needs Triton that takes CPU tensors, as in its interpreter", allow_module_level=True)

from dsmr_kernels.backends.triton import bulk, configs, launch
from dsmr_kernels.backends.triton import prepared as room_of


@pytest.fixture(autouse=True)
def _known_of_nothing() -> None:
    alike.forget()


def small(**options: Any) -> Case:
    given: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 5, "capacity": 9, "seen": [20]}
    case = random_case(**given | {"horizon": 9, "dtype": torch.float32} | options)
    for x in (case.q, case.k, case.v):
        x.requires_grad_()
    return case


def attend(case: Case, **options: Any) -> Tensor:
    return memory_attention(case.q, case.k, case.v, case.memory, **case.options | {"backend": "triton"} | options)


def results(case: Case, **options: Any) -> list[Tensor]:
    out = attend(case, **options)
    wanted = [x for x in (case.q, case.k, case.v) if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, case.grad)]


def assert_equal(found: list[Tensor], right: list[Tensor]) -> None:
    assert len(found) == len(right)
    for x, y in zip(found, right, strict=True):
        assert torch.equal(x, y)


def prepared(case: Case) -> Tensor:
    """out of a call that is prepared, for certain."""
    for _ in range(3):
        out = attend(case)
    assert out.grad_fn is None or type(out.grad_fn).__name__ == "_SwiftNodeBackward"
    return out


@pytest.mark.parametrize("guarded", [True, False], ids=["known by guards", "known by key"])
@pytest.mark.parametrize("frozen", [(), ("q", "k")], ids=str)
def test_it_gives_the_bits_of_the_first_call(
    guarded: bool, frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:
        monkeypatch.setattr(alike, "guards_of", None)
    for options in ({}, {"seen": None}, {"v_head_dim": 24, "segment_length": 3}):
        case = small(**options)
        for name in frozen:
            getattr(case, name).requires_grad_(False)
        first = results(case)
        prepared(case)
        assert bool(alike._again) == guarded
        assert_equal(results(case), first)


def test_no_call_of_another_kind_passes_for_it() -> None:
    case, starts = small(), torch.tensor([[-1, -1, 2, 2, 2]], dtype=torch.int32)
    others: list[Callable[[], list[Tensor]]] = [
        lambda: results(case, piece_start=starts),
        lambda: results(case, alibi_slopes=torch.tensor([0.5, 0.25])),
        lambda: results(case, horizon=3),
        lambda: results(case, segment_length=7, segment_offset=torch.tensor([6])),
        lambda: results(case, sinks=torch.tensor([0.5, 2.0])),
    ]
    right = [other() for other in others]
    prepared(case)
    for other, expected in zip(others, right, strict=True):
        assert_equal(other(), expected)
    with pytest.raises(ValueError, match="distance_buckets say nothing without distance_bias"):
        attend(case, distance_buckets=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"horizon must be an integer, got 9\.0"):
        attend(case, horizon=9.0)
    whole = case.k, case.v
    case.k, case.v = (x.detach()[:, :, :4] for x in whole)
    with pytest.raises(ValueError, match="k must hold at least the 5 tokens of q, got 4"):
        attend(case)
    case.k, case.v = whole
    case.memory.k.data = case.memory.k.data[..., :-1]
    with pytest.raises(ValueError, match="memory must have"):
        attend(case)


def test_a_memory_is_copied_before_it_is_written_to_until_the_backward_has_run() -> None:
    case = small()
    first = results(case)
    prepared(case)
    memory, out = case.memory, attend(case)
    before = memory.k
    memory.append(case.k, case.v)
    assert memory.k is not before
    assert_equal([out.detach(), *torch.autograd.grad(out, (case.q, case.k, case.v), case.grad)], first)
    before = memory.k
    memory.append(case.k, case.v)
    assert memory.k is before, "nobody needs it any longer"


def test_what_is_written_past_the_memory_is_noticed() -> None:
    case = small()
    prepared(case)
    for name in ("k", "v", "length", "position"):
        out = attend(case)
        getattr(case.memory, name).add_(0)
        with pytest.raises(RuntimeError, match="memory_attention call was written to in place before"):
            out.sum().backward()
    out = attend(case)
    case.v.data.add_(0)
    with torch.no_grad():
        case.v.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_recomputation_by_a_memory_that_has_moved_on_is_refused() -> None:
    case = small()
    prepared(case)
    case.memory.append(case.k, case.v)

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            attend(case)
            return grad

    with pytest.raises(RuntimeError, match="may have moved on since"):
        Again.apply(case.q).sum().backward()


def test_a_second_differentiation_says_which_backend_can() -> None:
    case = small()
    prepared(case)
    (grad,) = torch.autograd.grad(attend(case).square().sum(), case.q, create_graph=True)
    with pytest.raises(RuntimeError, match='use backend="reference", which can'):
        grad.sum().backward()


def test_forward_differentiation_is_refused_rather_than_left_out() -> None:
    case = small()
    prepared(case)
    q = case.q.detach()
    with forward_ad.dual_level():
        for x in (forward_ad.make_dual(q, torch.ones_like(q)), forward_ad.make_dual(case.q, torch.ones_like(q))):
            with pytest.raises(RuntimeError, match='use backend="reference", which can'):
                memory_attention(x, case.k, case.v, case.memory, **case.options | {"backend": "triton"})


def test_the_tangent_of_a_gradient_is_refused_rather_than_left_out() -> None:
    case, slopes = small(), torch.rand(2)
    out = prepared(case)
    step = torch.ones_like(out)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match='use backend="reference", which can'):
            torch.autograd.grad(out, case.q, forward_ad.make_dual(step, step))
        with pytest.raises(RuntimeError, match='use backend="reference", which can'):
            attend(case, alibi_slopes=forward_ad.make_dual(slopes, slopes))


def test_what_hooks_bring_back_in_another_layout_is_read_as_it_lies() -> None:
    case = small()
    first = results(case)
    prepared(case)

    def turned(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).clone().transpose(-1, -2) if x.dim() == 4 else x.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, turned):
        out = attend(case)
    assert type(out.grad_fn).__name__ == "_SwiftNodeBackward"
    assert_equal([out.detach(), *torch.autograd.grad(out, (case.q, case.k, case.v), case.grad)], first)


@pytest.mark.parametrize("how", ["expanded", "turned", "not aligned"])
def test_a_gradient_may_lie_in_any_way(how: str) -> None:
    case = small()
    if how == "expanded":
        case.grad = torch.ones(()).expand_as(case.grad)
    elif how == "turned":
        case.grad = case.grad.transpose(1, 3).clone().transpose(1, 3)
    else:
        case.grad = torch.cat([case.grad.new_zeros(1), case.grad.flatten()])[1:].view_as(case.grad)
    right = [x.clone() for x in results(case, backend="reference")]
    prepared(case)
    for found, expected in zip(results(case), right, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_transforms_take_their_own_way() -> None:
    case = small()
    right = results(case)[1]
    prepared(case)

    def loss(q: Tensor) -> Tensor:
        out = memory_attention(q, case.k, case.v, case.memory, **case.options, backend="triton")
        return (out * case.grad).sum()

    assert torch.equal(torch.func.grad(loss)(case.q.detach()), right)


def test_an_inference_memory_is_refused_outside_also_once_it_was_known_inside() -> None:
    with torch.inference_mode():
        memory = KVMemory.empty(1, 1, 9, 16)
        memory.k = torch.zeros(1, 1, 9, 16)
        case = random_case(batch=1, heads=2, kv_heads=1, queries=5, capacity=9, seen=[3], head_dim=16, horizon=9)
        case.memory = memory
        prepared(case)
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        attend(case)


def test_other_tiles_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small()
    prepared(case)
    (kind,) = alike._known.values()
    before = kind.swift
    monkeypatch.setattr(configs, "generation", configs.generation + 1)
    first = attend(case)
    assert kind.swift is not before
    assert torch.equal(first, prepared(case))
    assert kind.swift is not before


def test_nothing_is_kept_of_it() -> None:
    case = small()
    prepared(case)
    assert alike._again
    gone = [weakref.ref(x) for x in (case.q, case.k, case.v, case.memory, case.memory.k, case.memory.length)]
    del case
    gc.collect()
    assert [x() for x in gone] == [None] * 6


def test_a_frozen_call_costs_no_gradient_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = small(), []
    case.k.requires_grad_(False)
    prepared(case)
    usual = autograd.Swift.gradients

    def noted(self: autograd.Swift, *given: Any) -> Any:
        asked.append(given[-1])
        return usual(self, *given)

    monkeypatch.setattr(autograd.Swift, "gradients", noted)
    out = attend(case)
    found = torch.autograd.grad(out, (case.q, case.v), case.grad)
    assert asked == [(True, False, True)]
    assert [x.shape for x in found] == [case.q.shape, case.v.shape]


def noted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    """The function, which then leaves its first argument in `calls`."""

    def called(*given: Any, **named: Any) -> Any:
        calls.append(given[0])
        return function(*given, **named)

    return called


def test_while_other_kernels_may_serve_nothing_is_prepared_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = small(), list[Any]()
    monkeypatch.setattr(room_of.Prepared, "__init__", noted(room_of.Prepared.__init__, made))
    monkeypatch.setattr(bulk, "serving", {("cuda:0", 128, torch.float16)})
    for _ in range(4):
        attend(case)
    assert not made


def test_a_tensor_that_is_there_twice_has_no_guards_made_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = small(), list[Any]()
    monkeypatch.setattr(alike, "guards_of", noted(alike.guards_of, made))
    case.v = case.k
    prepared(case)
    assert not made
    case.v = case.k.detach().requires_grad_()
    prepared(case)
    assert len(made) == 1


def test_devices_do_not_displace_each_others_kinds() -> None:
    """As where one process trains on eight of them."""
    kind = Alike(None)
    for device in ("cpu", "meta"):
        x, y, z = torch.empty(3, 1, 2, 5, 16, device=device).unbind()
        alike.learn_again(kind, x, y, z, None, "options")
        assert alike.recall(x, y, z, None, "options") is kind
    assert [len(kinds) for kinds in alike._again.values()] == [1, 1]


NEEDS = [needs for needs in itertools.product([True, False], repeat=3) if any(needs)]


@pytest.mark.parametrize("remembering", [True, False])
def test_kernels_are_handed_addresses_as_they_are_handed_tensors(
    remembering: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU: in the interpreter nothing is launched by address."""
    case = small(seen=[20] if remembering else None)
    out = prepared(case)
    torch.autograd.grad(out, (case.q, case.k, case.v), case.grad)
    (kind,) = alike._known.values()
    swift = kind.swift.prepared
    memory = case.memory
    stored = (memory.k, memory.v, memory.length, memory.position) if remembering else None
    launched: list[tuple[str, Any, list[int]]] = []

    def by_tensor(self: Any, stream: int, *tensors: Tensor) -> None:
        launched.append(("tensors", self, [x.data_ptr() for x in tensors]))

    def by_address(self: Any, stream: int, *addresses: int) -> None:
        launched.append(("addresses", self, [*addresses]))

    rooms = [torch.empty(4096) for _ in range(6)]

    def again(how: bool, call: Callable[[], object]) -> list[tuple[str, Any, list[int]]]:
        """What is launched, by address or not, where rooms for results are the same each time."""
        given = iter(rooms)
        monkeypatch.setattr(room_of, "room", lambda x: next(given)[: x.numel()].view(x.shape))
        monkeypatch.setattr(torch, "empty_strided", lambda size, *_, **__: next(given)[: math.prod(size)].view(size))
        for plan in (swift._plans.forward, *(plan for plans, _ in swift._backwards.values() for plan in plans if plan)):
            plan.launch.by_address = how
        launched.clear()
        call()
        return [*launched]

    monkeypatch.setattr(launch.Launch, "start", by_tensor)
    monkeypatch.setattr(launch.Launch, "at", by_address)

    def forward() -> object:
        return swift.forward(case.q, case.k, case.v, stored)

    def assert_alike(call: Callable[[], object], launches: int, straight: bool) -> None:
        for _ in range(2):  # what is launched by the first is told apart before the second
            found = again(True, call)
        expected = again(False, call)
        assert [who for who, _, _ in expected] == ["tensors"] * launches
        assert [who for who, _, _ in found] == ["addresses" if straight else "tensors"] * launches
        assert [launch for _, launch, _ in found] == [launch for _, launch, _ in expected]
        assert [at for _, _, at in found] == [at for _, _, at in expected]

    assert_alike(forward, 1, True)
    out, lse = torch.empty(1, 2, 5, 16), torch.empty(1, 2, 5)
    for needs in NEEDS:
        kinds = (needs[0] or needs[1]) + (needs[1] or needs[2])
        assert_alike(
            lambda needs=needs: swift.backward(case.q, case.k, case.v, stored, out, lse, case.grad, needs),
            kinds,
            kinds == 2,
        )
    case.k = torch.cat([case.k.new_zeros(1), case.k.detach().flatten()])[1:].view_as(case.k)  # not aligned
    assert_alike(forward, 1, False)


class _Launcher:
    """What Triton compiles, with its own launcher for NVIDIA's parts, which tells what it calls in C."""

    def __init__(self) -> None:
        self.called: list[tuple[Any, ...]] = []
        nvidia = importlib.import_module("triton.backends.nvidia.driver")
        run = self.run = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        run.launch, run.num_ctas = lambda *given: self.called.append(given), 1
        run.global_scratch_size = run.profile_scratch_size = 0
        run.global_scratch_align = run.profile_scratch_align = 1
        run.launch_cooperative_grid, run.launch_pdl = "cooperative", "pdl"
        run.arg_annotations, run.kernel_signature = "annotations", "signature"
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return self.called.append


def test_what_is_called_in_c_is_what_tritons_launcher_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    if not launch.triton.__version__.startswith("3.7."):
        pytest.skip("another Triton is called as it offers")
    compiled, order = _Launcher(), []

    class Noted(launch.Launch):
        def __setattr__(self, name: str, value: Any) -> None:
            order.append(name)
            super().__setattr__(name, value)

    one = Noted(None, (2, 3, 1), torch.device("cpu"), (), (7, 0.5), {}, {})
    one._key = ("a launch",)
    monkeypatch.setitem(launch._compiled, one._key, (compiled, ["constant"]))
    order.clear()
    assert one._find()
    # Another thread may launch in between: it sees nothing whose arguments are not there.
    for what, arguments in (("_runner", "_behind"), ("_run", "_loaded"), ("_straight", "_arguments")):
        assert order.index(arguments) < order.index(what)
    assert order.index("_run") < order.index("by_address")
    one.at(5, 16, 32)
    one._straight = None
    one.at(5, 16, 32)
    assert compiled.called[0] == compiled.called[1]
    assert compiled.called[0][:5] == (2, 3, 1, 5, "function")
    assert compiled.called[0][-1] == (16, 32, 7, 0.5, "constant")
    for name in ("global_scratch_size", "profile_scratch_size"):  # which only Triton knows how to get
        monkeypatch.setattr(compiled.run, name, 128)
        assert launch._straight(compiled) is None
        monkeypatch.setattr(compiled.run, name, 0)
    assert launch._straight(compiled) is not None
