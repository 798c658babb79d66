"""The Triton kernels against the oracle, on CPU through Triton's interpreter: correct here means correct arithmetic and
indexing; speed, bfloat16 and real memory bounds are for a GPU to show."""

import pytest
import torch
from test_attention import CASES

from dsmr_kernels import available_backends, memory_attention
from dsmr_kernels.testing import assert_agrees_with_oracle, error, random_case, run

if "triton" not in available_backends() or torch.cuda.is_available():
    pytest.skip(
        "needs Triton, and its interpreter (TRITON_INTERPRET=1) on a machine without a GPU", allow_module_level=True
    )


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output buffers begin as NaN, so that an element that no kernel writes is found."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr("dsmr_kernels.backends.triton.launch.torch.empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(
        "dsmr_kernels.backends.triton.launch.torch.empty_like", lambda *a, **k: poison(empty_like(*a, **k))
    )


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("head_dim", 16) >= 16])
def test_kernels_agree_with_oracle(name: str) -> None:
    case = {"batch": 1, "heads": 2, "kv_heads": 1, **CASES[name]}
    if {"batch", "heads"} & CASES[name].keys() or "alibi_slopes" in case or "piece_start" in case:
        case = {"heads": 4, **CASES[name]}
    elif "seen" in case and case["batch"] == 1:
        case["seen"] = case["seen"][-1:]
    assert_agrees_with_oracle(random_case(**case), "triton")


@pytest.mark.parametrize("head_dim", [16, 40, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_head_dims_and_half_precision(head_dim: int, dtype: torch.dtype) -> None:
    case = random_case(
        batch=1, heads=2, kv_heads=1, queries=19, seen=[30], capacity=24, head_dim=head_dim, horizon=20,
        segment_length=8, dtype=dtype,
    )  # fmt: skip
    assert_agrees_with_oracle(case, "triton")


def test_strided_inputs_are_read_where_they_lie() -> None:
    case = random_case(batch=1, heads=2, kv_heads=1, queries=19, seen=[30], capacity=24, horizon=20)
    expected = run(case, "triton")
    case.q, case.k, case.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.q, case.k, case.v))
    for name, value in run(case, "triton").items():
        assert error(value, expected[name]) == 0


def test_segments_in_one_launch_equal_sequential_calls() -> None:
    case = random_case(batch=1, heads=2, kv_heads=1, queries=21, seen=[30], capacity=11)
    memory = case.memory.clone()
    whole = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = memory_attention(*whole, case.memory, horizon=11, segment_length=7, backend="triton")
    out.backward(case.grad)
    parts = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    for begin in range(0, 21, 7):
        q, k, v = (x[:, :, begin : begin + 7] for x in parts)
        piece = memory_attention(q, k, v, memory, horizon=11, backend="triton")
        assert error(piece, out[:, :, begin : begin + 7]) < 1e-6
        piece.backward(case.grad[:, :, begin : begin + 7])
        memory.append(k, v)
    for one, many in zip(whole, parts, strict=True):
        assert error(one.grad, many.grad) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "it computes in .*, not torch.float64; the sdpa backend does"),
        ({"head_dim": 8}, "it serves head_dim from 16 to 256, not 8; the sdpa backend does"),
        ({"head_dim": 272}, "it serves head_dim from 16 to 256, not 272; the sdpa backend does"),
    ],
)
def test_what_it_cannot_serve_is_refused_with_what_can(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(random_case(queries=3, horizon=2, **change), "triton")
