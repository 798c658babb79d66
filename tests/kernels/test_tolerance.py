"""The one rule of how far a result may lie from the oracle, where a call showed that it needs saying."""

import pytest
import torch

from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import run, run_plain
from dsmr_kernels.tolerance import allowed_error, error

F16 = torch.float16


def test_a_gradient_of_a_bias_may_err_by_what_the_rounded_output_does() -> None:
    """Two queries, of whose rows nearly everything cancels: 0.00102 beside plain attention's 0.0002, of 0.15."""
    exact = torch.tensor([[-0.15084, 0.15084]], dtype=torch.float64)
    plain = exact + 2.02e-4
    assert allowed_error("db", plain, exact, F16) > 1.02e-3 > allowed_error("dq", plain, exact, F16)
    assert allowed_error("db", plain, exact, torch.float32) < 1e-3


@pytest.mark.parametrize("dtype", [F16, torch.float32], ids=str)
def test_the_rule_still_finds_a_bias_whose_gradient_is_wrong(dtype: torch.dtype) -> None:
    case = random_case(heads=2, kv_heads=2, queries=20, horizon=20, dtype=dtype, biased=True, learning="b")
    exact, plain = run(case.to(torch.float64), "reference"), run_plain(case)
    wrong = exact["db"] * 1.1
    assert error(wrong, exact["db"]) > allowed_error("db", plain["db"], exact["db"], dtype)
