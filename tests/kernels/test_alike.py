"""Of calls that are alike the first one's findings serve the others, and nothing else does: what follows from values,
types or the environment is looked at each time. What a call does in Python is counted, not timed."""

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_memories import BACKENDS
from torch.autograd import forward_ad

from dsmr_kernels import (
    KVMemory,
    alike,
    append_rotated,
    decode_attention,
    dispatch,
    memory_attention,
    watch,
)
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.tolerance import error

needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton that takes CPU tensors")


@pytest.fixture(autouse=True)
def _looked_for_anew() -> None:
    alike.forget()


def small(**options: Any) -> Case:
    given = {"batch": 1, "heads": 4, "kv_heads": 2, "queries": 5, "capacity": 9, "seen": [20], "horizon": 9}
    return random_case(**given | options)


def attend(case: Case, **options: Any) -> torch.Tensor:
    return memory_attention(case.q, case.k, case.v, case.memory, **case.options | options)


@pytest.mark.parametrize("horizon", [True, 1.0, "1", [1], torch.tensor(1)])
def test_what_equals_a_right_option_and_is_none_is_refused_all_the_same(horizon: Any) -> None:
    case = small()
    attend(case, horizon=1)
    with pytest.raises(TypeError, match="horizon must be an integer, got"):
        attend(case, horizon=horizon)
    attend(case, horizon=1, scale=1.0)
    with pytest.raises(TypeError, match="scale must be a number or None, got True"):
        attend(case, horizon=1, scale=True)


def test_no_offset_is_refused_also_behind_calls_with_an_offset_for_each_row() -> None:
    case = small()
    attend(case, segment_length=7, segment_offset=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="segment_offset must be an integer, got None"):
        attend(case, segment_length=7, segment_offset=None)


def test_a_memory_that_became_another_is_seen_by_the_next_call() -> None:
    case = small()
    attend(case)
    memory = case.memory
    memory.k.data = memory.k.data[..., :-1]
    with pytest.raises(ValueError, match=r"memory must have \(batch, kv_heads, head_dim\) = "):
        attend(case)
    case = small()
    attend(case)
    case.memory.length = case.memory.length.long()
    with pytest.raises(ValueError, match=r"memory.length must be torch.int32"):
        attend(case)


def test_values_are_looked_at_in_every_call() -> None:
    case = small()
    starts = torch.zeros(1, 5, dtype=torch.int32)
    attend(case, piece_start=starts)
    with pytest.raises(ValueError, match="piece_start must not lie after its token"):
        attend(case, piece_start=starts + 3)
    offsets = torch.zeros(1, dtype=torch.int64)
    attend(case, segment_offset=offsets, segment_length=7)
    with pytest.raises(ValueError, match="segment_offset must be >= 0 and < segment_length = 7"):
        attend(case, segment_offset=offsets + 7, segment_length=7)
    with pytest.raises(ValueError, match="distance_buckets say nothing without distance_bias"):
        attend(case, distance_buckets=offsets)
    q = case.q[:, :, :3]
    decode_attention(q, case.memory)
    case.memory.length.fill_(2)
    with pytest.raises(ValueError, match="each of the 3 new tokens must see itself, but row 0 sees 2"):
        decode_attention(q, case.memory)


def test_whether_a_gradient_is_asked_for_is_looked_at_in_every_call() -> None:
    case = small()
    q, k, v = (x[:, :, :1] for x in (case.q, case.k, case.v))
    append_rotated(q, k, v, case.memory)
    decode_attention(q, case.memory)
    with pytest.raises(RuntimeError, match="decode_attention gives no gradient"):
        decode_attention(q.clone().requires_grad_(), case.memory)
    with pytest.raises(RuntimeError, match="append_rotated is for inference"):
        append_rotated(q, k.clone().requires_grad_(), v, case.memory)
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="decode_attention cannot be differentiated forwards"):
            decode_attention(forward_ad.make_dual(q, q), case.memory)
        with pytest.raises(RuntimeError, match="append_rotated is for inference: it cannot be differentiated forwards"):
            append_rotated(q, k, forward_ad.make_dual(v, v), case.memory)
    assert not attend(case).requires_grad
    case.v.requires_grad_()
    assert attend(case).requires_grad


def test_the_environment_is_asked_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small()
    attend(case)
    monkeypatch.setenv("DSMR_BACKEND", "none such")
    with pytest.raises(ValueError, match="backend must be one of triton, sdpa, reference, got 'none such'"):
        attend(case)


@needs_triton
def test_a_choice_that_no_longer_stands_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small()
    for _ in range(2):
        attend(case, backend="triton")
    settled = []
    monkeypatch.setattr(dispatch, "_settle_tiles", settled.append)
    monkeypatch.setattr(dispatch, "_tiles_settled", False)  # a file of measured tiles is read before they are used
    attend(case, backend="triton")
    assert len(settled) == 1
    monkeypatch.setattr(dispatch, "_tiles_settled", True)
    if case.q.device.type == "cpu":
        monkeypatch.setattr(dispatch, "_why_no_triton", lambda: "it has gone")
        with pytest.raises(ValueError, match="backend 'triton' cannot serve: it has gone"):
            attend(case, backend="triton")


def test_no_tensor_is_kept() -> None:
    case = small()
    for _ in range(2):
        attend(case)
    assert alike._known
    gone = [weakref.ref(x) for x in (case.q, case.k, case.v, case.memory, case.memory.k)]
    del case
    gc.collect()
    assert [x() for x in gone] == [None] * 5


def test_no_tensor_is_kept_that_was_given_for_an_option() -> None:
    case = small()
    attend(case, detach_segments=torch.tensor(True), return_lse=torch.tensor(True))
    assert not alike._known


@needs_triton
@pytest.mark.parametrize("shared_first", [False, True])
def test_a_memory_that_a_step_copies_is_written_where_the_copy_lies(shared_first: bool) -> None:
    """Rows of a wider tensor lie apart; those of a copy, which somebody's snapshot asks for, do not."""
    token = [torch.randn(1, heads, 1, 16) for heads in (4, 2, 2)]
    expected = KVMemory.empty(1, 2, 9, 16)
    append_rotated(*token, expected, backend="triton")
    alike.forget()
    for shared in (shared_first, not shared_first, shared_first):  # the second call leaves its launch to the third
        memory, wide = KVMemory.empty(1, 2, 9, 16), torch.zeros(2, 1, 2, 9, 40)
        memory.k, memory.v = wide[..., 8:24]
        held = memory.snapshot() if shared else None
        append_rotated(*token, memory, backend="triton")
        assert torch.equal(memory.k, expected.k)
        assert torch.equal(memory.v, expected.v)
        assert not wide[..., :8].any()
        assert not wide[..., 24:].any()
        assert held is None or not held.k.any()


def test_no_more_kinds_are_kept_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "_MOST", 3)
    case = small()
    for horizon in (1, 2, 3, 4, 5, 4):
        attend(case, horizon=horizon)
        assert 1 <= len(alike._known) <= 3


@needs_triton
def test_tensors_that_hooks_bring_back_in_another_layout_give_the_same_gradients() -> None:
    """As offloading does it, and whatever else packs what is saved."""
    case = small()
    wide = torch.randn(1, 4, 5, 40)
    case.q = wide[..., 8:24]  # rows that lie apart
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = memory_attention(leaves[0], leaves[1], leaves[2], case.memory, **case.options, backend="triton")
        return torch.autograd.grad(out, leaves, case.grad)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.mT.contiguous().mT.clone(), lambda x: x.contiguous()):
        found = gradients()
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 1e-6


def calls_of_ours(call: Callable[[], object]) -> int:
    """How many functions of this package the last of four calls runs."""
    for _ in range(3):  # it is found out, prepared, and known again
        call()
    seen: list[str] = []

    def noted(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and "dsmr_kernels" in frame.f_code.co_filename:
            seen.append(frame.f_code.co_qualname)

    sys.setprofile(noted)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(seen)


@needs_triton
def test_little_is_done_in_python_where_a_call_is_like_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks.launch_cost` says how long it takes."""
    from dsmr_kernels.backends.triton.launch import Launch

    monkeypatch.setattr(Launch, "start", lambda *given: None)  # most of all in the interpreter
    monkeypatch.setattr(watch, "every", 0)
    case = small(dtype=torch.float16)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    case.memory.append(case.k, case.v)

    def both() -> object:
        return torch.autograd.grad(attend(case, backend="triton"), leaves, case.grad)

    token = [x.detach()[:, :, :1] for x in leaves]
    memory = KVMemory.empty(1, 2, 9, 16, dtype=torch.float16)
    memory.length.fill_(9)

    def step() -> object:
        turned = append_rotated(token[0], token[1], token[2], memory, backend="triton")
        return decode_attention(turned, memory, backend="triton")

    with torch.no_grad():
        forward = calls_of_ours(lambda: attend(case, backend="triton"))
        stepped = calls_of_ours(step)
    # As counted, and a little room.
    assert forward <= 18
    assert calls_of_ours(both) <= 34
    assert stepped <= 43
