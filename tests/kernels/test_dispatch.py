"""Who serves a call: what is missing is said in a sentence, before any work; nothing of it needs a GPU."""

import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode

from dsmr_kernels import KVMemory, alike, available_backends, dispatch, memory_attention, trial
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.dispatch import choose

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton and its interpreter",
)


@pytest.fixture(autouse=True)
def _looked_for_anew() -> Iterator[None]:
    dispatch._disagreements.clear()
    alike.forget()
    yield
    dispatch._disagreements.clear()


def call(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 16, **options: Any) -> Any:
    q = torch.empty(1, 2, 3, head_dim, device=device, dtype=dtype)
    return memory_attention(q, q, q, horizon=0, **options)


def test_what_is_found_out_is_a_constant_as_pytorch_marks_one() -> None:
    marked = vars(torch.compiler.assume_constant_result(lambda: None))
    assert marked
    for name in ("_why_no_triton", "_settle_tiles", "_tried_out", "_settle_hopper"):
        assert marked.items() <= vars(getattr(dispatch, name)).items()


def test_without_triton_its_absence_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="backend 'triton' cannot serve: Triton is not installed"):
        call(backend="triton")
    assert available_backends() == ("sdpa", "reference")
    assert call().shape == (1, 2, 3, 16)


def test_without_a_gpu_its_absence_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve: there is no GPU \(TRITON_INTERPRET=1"):
        call(backend="triton")
    assert "triton" not in available_backends()


@needs_triton
def test_gpu_tensors_are_refused_by_the_interpreter_and_cpu_tensors_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), pytest.raises(ValueError, match="CPU tensors under TRITON_INTERPRET=1, not on cuda:0"):
        call(device="cuda:0", backend="triton")
    from dsmr_kernels.backends import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="cannot serve these inputs: it runs on GPUs, not on cpu"):
        call(backend="triton")


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "in float16, bfloat16, float32, not float64; nearest: float32; backend 'sdpa'"),
        ({"dtype": torch.float8_e5m2}, "in .*, not float8_e5m2; nearest: float16; backend 'sdpa'"),
        ({"head_dim": 15}, "head_dim from 16 to 256, not 15; nearest: 16; backend 'sdpa'"),
        ({"head_dim": 257}, "head_dim from 16 to 256, not 257; nearest: 256; backend 'sdpa'"),
    ],
)
def test_on_a_gpu_the_nearest_supported_is_named(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsmr_kernels.backends import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    with FakeTensorMode(), pytest.raises(ValueError, match=message):
        call(device="cuda:0", backend="triton", **change)


def test_bfloat16_is_not_trusted_to_the_interpreter() -> None:
    if "triton" not in available_backends() or torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter")
    with pytest.raises(ValueError, match="in float16, float32, not bfloat16; nearest: float16"):
        call(dtype=torch.bfloat16, backend="triton")


@pytest.mark.parametrize("asked", ["argument", "environment"])
def test_a_backend_that_was_asked_for_is_never_replaced(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_TRITON_INSTALLED", False)
    if asked == "environment":
        monkeypatch.setenv("DSMR_BACKEND", "triton")
    with pytest.raises(ValueError, match="Triton is not installed"):
        call(backend="triton" if asked == "argument" else None)


Tried = tuple[torch.device, int, torch.dtype, bool]
CPU16 = (torch.device("cpu"), 16, torch.float16, False)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Tried]:
    """Takes CPU tensors for a GPU's, and the interpreter for its kernels; returns what was tried out."""
    tried: list[Tried] = []

    def disagreement(*what: Any) -> None:
        tried.append(what)

    monkeypatch.setattr(dispatch, "GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "disagreement", disagreement)
    return tried


def half(head_dim: int) -> torch.Tensor:
    return torch.empty(1, 1, 1, head_dim, dtype=torch.float16)


@needs_triton
def test_on_a_gpu_the_kernels_serve_unasked_once_they_have_been_tried_out(as_gpu: list[Tried]) -> None:
    for _ in range(3):
        assert choose(half(16), None).__name__ == "dsmr_kernels.backends.triton"
    assert as_gpu == [CPU16]
    assert choose(half(8), None).__name__ == "dsmr_kernels.backends.sdpa"  # no head_dim of theirs
    assert choose(half(16).float(), None).__name__ == "dsmr_kernels.backends.sdpa"  # faster there


@needs_triton
def test_each_class_of_head_dim_and_each_dtype_is_tried_out_once(as_gpu: list[Tried]) -> None:
    for head_dim in (16, 17, 32, 96, 128, 100, 256, 16):
        choose(half(head_dim), None)
        choose(half(head_dim).to(torch.float16), None, v_head_dim=16)
    assert as_gpu == [(CPU16[0], width, torch.float16, False) for width in (16, 32, 128, 256)]
    from dsmr_kernels.backends.triton.configs import padded

    assert all(trial.class_of(head_dim) == padded(head_dim) for head_dim in range(1, 257))
    choose(half(16), None, v_head_dim=64)
    assert as_gpu[4:] == [(CPU16[0], 64, torch.float16, False)]


@needs_triton
def test_a_bias_is_tried_out_only_where_one_is_asked_for(as_gpu: list[Tried]) -> None:
    for biased in (False, True, False, True):
        assert choose(half(16), None, biased=biased).__name__ == "dsmr_kernels.backends.triton"
    assert as_gpu == [CPU16, (*CPU16[:3], True)]


@needs_triton
@pytest.mark.slow
def test_the_trial_of_a_bias_passes_and_sees_one_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.backends import triton

    def small(**options: Any) -> Case:
        assert options["biased"]  # with tiles of its own, and with shared ones
        seen = [30, 7][: options.get("batch", 2)]
        return random_case(**options | {"queries": 9, "capacity": 20, "seen": seen, "horizon": 20})

    what = torch.device("cpu"), 16, torch.float16, True
    monkeypatch.setattr(trial, "random_case", small)
    assert trial.disagreement(*what) is None
    bucketed, decodes = triton.training.bucketed, triton.decode_attention
    with monkeypatch.context() as wrong:
        wrong.setattr(triton.training, "bucketed", lambda *given: bucketed(*given).roll(1, 1))
        assert "db errs by" in str(trial.disagreement(*what))
    with monkeypatch.context() as wrong:
        wrong.setattr(triton, "decode_attention", lambda *given: decodes(*given[:5], None, None, given[7]))
        assert "decode_attention: out errs by" in str(trial.disagreement(*what))


def _in_the_trial(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case of the trial, small enough for the interpreter."""
    from dsmr_kernels.backends.triton import decode

    monkeypatch.setattr(decode, "processors", lambda device: 1)
    return random_case(queries=3, capacity=20, seen=[30, 7], horizon=20, head_dim=20, dtype=torch.float16)


@needs_triton
def test_one_unit_in_the_last_place_of_a_rotation_passes_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.backends import triton

    stores = triton.append_rotated

    def differently(*arguments: Any, units: int) -> torch.Tensor:
        turned = stores(*arguments)
        memory = arguments[3]
        newest = (memory.position - 1).remainder(memory.capacity)
        for row, slot in enumerate(newest.tolist()):
            memory.k[row, :, slot].view(torch.int16).add_(units)
        return turned

    trial._compare_a_step(_in_the_trial(monkeypatch))
    monkeypatch.setattr(triton, "append_rotated", functools.partial(differently, units=1))
    trial._compare_a_step(_in_the_trial(monkeypatch))
    monkeypatch.setattr(triton, "append_rotated", functools.partial(differently, units=20))
    with pytest.raises(AssertionError, match="append_rotated: turned k errs by"):
        trial._compare_a_step(_in_the_trial(monkeypatch))


@needs_triton
def test_kernels_that_disagree_with_the_oracle_are_replaced_with_a_warning(
    as_gpu: list[Tried], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "disagreement", lambda *what: "AssertionError: out errs by 1, allowed 0.1")
    said = r"fail on cpu at a head_dim of 16 in float16 and backend 'sdpa' serves .* \(AssertionError: out errs by 1"
    with pytest.warns(UserWarning, match=said):
        assert choose(half(16), None).__name__ == "dsmr_kernels.backends.sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(half(16), None).__name__ == "dsmr_kernels.backends.sdpa"
        assert choose(half(16), "triton").__name__ == "dsmr_kernels.backends.triton"


@needs_triton
def test_a_graph_has_them_tried_out_too_and_is_not_compiled_anew_for_it(as_gpu: list[Tried]) -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 5, 16).half()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(memory_attention, fullgraph=True, backend=counter)
    expected = memory_attention(q, q, q, horizon=0, backend="triton")
    for _ in range(3):
        assert torch.equal(compiled(q, q, q, horizon=0), expected)
        assert as_gpu == [CPU16]
    memory_attention(q, q, q, horizon=0)
    compiled(q, q, q, horizon=0)
    assert counter.frame_count == 1


@needs_triton
def test_nothing_is_tried_out_in_a_capture(as_gpu: list[Tried], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose(half(16), None).__name__ == "dsmr_kernels.backends.triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not as_gpu
    choose(half(16), None)
    assert as_gpu


@needs_triton
@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_tuned_file_that_is_missing_is_no_fault_of_the_kernels(
    backend: str | None, as_gpu: list[Tried], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsmr_kernels.backends.triton import launch

    monkeypatch.setenv("DSMR_TUNED", str(tmp_path / "missing.json"))
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_tiles_settled", False)  # as in a process that begins
    for _ in range(2):  # not only the first call complains
        with pytest.raises(ValueError, match=r"tuned configurations .*missing\.json cannot be read"):
            choose(half(16), backend)
    assert not as_gpu
    assert choose(half(8), None).__name__ == "dsmr_kernels.backends.sdpa"  # serves, and has no tiles
    monkeypatch.setenv("DSMR_TUNED_FALLBACK", "1")
    with pytest.warns(UserWarning, match=r"missing\.json cannot be read.*; the fixed table is used"):
        assert choose(half(16), backend).__name__ == "dsmr_kernels.backends.triton"


@needs_triton
def test_whatever_goes_wrong_in_the_trial_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter has no bfloat16, in which the trial computes.
    with torch.inference_mode():
        reason = trial.disagreement(torch.device("cpu"), 64, torch.bfloat16)
    assert reason is not None
    assert re.fullmatch(r"ValueError: backend 'triton' cannot serve these inputs: .*not bfloat16.*", reason)
    monkeypatch.setattr(trial, "_compare", lambda *what: None)
    assert trial.disagreement(torch.device("cpu"), 64, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "v",
            torch.zeros(1, 2, 7, 8),
            r"memory.v must have shape \(1, 2, 7, 16\) to fit memory.k and v, got \(1, 2, 7, 8\)",
        ),
        (
            "length",
            torch.zeros(2, dtype=torch.int32),
            r"memory.length must be torch.int32 of shape \(1,\) on cpu, got ",
        ),
        ("length", torch.zeros(1), r"memory.length must be .*, got torch.float32 of shape \(1,\) on cpu"),
        ("position", torch.zeros(1, dtype=torch.int32), r"memory.position must be torch.int64 .*, got torch.int32"),
        ("position", torch.zeros(1, dtype=torch.int64, device="meta"), r"memory.position must be .*, got .* on meta"),
    ],
)
def test_a_memory_put_together_wrongly_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    """Kernels read where the shapes say: nothing else would stop them."""
    memory = KVMemory.empty(1, 2, 7, 16)
    setattr(memory, name, value)
    with pytest.raises(ValueError, match=message):
        call(memory=memory)
