"""The forwards with tensor descriptors on a Hopper GPU, against the oracle: every tile that may serve, at real sizes.

python -m pytest tests/kernels/test_hopper_gpu.py -m gpu
"""

import os

import pytest
import torch

from dsmr_kernels import available_backends
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import assert_agrees_with_oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1" or "triton" not in available_backends(),
        reason="needs Triton, without TRITON_INTERPRET=1",
    ),
]
CASES = {
    "one segment": {"queries": 1024, "capacity": 4096, "seen": [9000, 3000], "horizon": 4096},
    "odd sizes": {"queries": 1001, "capacity": 2047, "seen": [2500, 1], "horizon": 1999},
    "many segments": {"queries": 4096, "capacity": 1000, "seen": [999, 5000], "horizon": 777, "segment_length": 333},
    "no memory": {"queries": 300, "horizon": 40, "segment_length": 100},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_forwards_with_descriptors_agree_with_oracle(name: str, head_dim: int, dtype: torch.dtype) -> None:
    from dsmr_kernels.backends.triton import bulk

    assert bulk.available(torch.device("cuda:0")) is None
    case = random_case(head_dim=head_dim, dtype=dtype, **CASES[name]).to(device="cuda")
    with bulk.trying():
        assert_agrees_with_oracle(case, "triton")
