"""One thread a test process: the suite runs in parallel, and results do not depend on how sums are split.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. With DSMR_VIRTUAL_GPU=sm_90 (or sm_80,
sm_89, sm_120) they run as compiled for that part, in the machine of `virtual_gpu`:

    DSMR_VIRTUAL_GPU=sm_90 python -m pytest tests/compiled_cases.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if part := os.environ.get("DSMR_VIRTUAL_GPU"):
    os.environ.pop("TRITON_INTERPRET", None)
    from virtual_gpu.driver import pretend

    pretend(part)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported; ignored where it is missing

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
