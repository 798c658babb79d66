"""What tests and benchmarks ask of a backend: its results through the public call, held against the oracle.

The cases are made by `dsmr_kernels.cases`, and the rule for how far a result may lie from the oracle's is that of
`dsmr_kernels.tolerance`.
"""

import torch
from torch import Tensor

from dsmr_kernels.api import memory_attention
from dsmr_kernels.backends import reference
from dsmr_kernels.cases import Case, filled_memory, random_case
from dsmr_kernels.tolerance import allowed_error, assert_within_rule, error

__all__ = [
    "Case",
    "allowed_error",
    "assert_agrees_with_oracle",
    "error",
    "filled_memory",
    "random_case",
    "run",
    "run_plain",
]


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """out, lse and the gradients of q, k and v, and of a bias by distance and sinks."""
    return case.differentiated(
        lambda q, k, v, **learned: memory_attention(
            q, k, v, case.memory, **(case.options | learned), return_lse=True, backend=backend
        )
    )


def run_plain(case: Case) -> dict[str, Tensor]:
    """What plain PyTorch attention gives when all of it is computed in the case's own dtype."""
    return case.computed_by(reference.memory_attention, work=case.q.dtype)


def assert_agrees_with_oracle(case: Case, backend: str) -> None:
    """Fail, with the figures, if a backend's outputs or gradients lie further from the oracle than the rule allows."""
    exact = run(case.to(torch.float64), "reference")
    assert_within_rule(backend, run(case, backend), run_plain(case), exact, case.q.dtype)
