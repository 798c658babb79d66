"""Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors: see `tests/conftest.py`. With
DSMR_VIRTUAL_GPU=sm_90 (or sm_80, sm_89, sm_120) they run as compiled for that part, in the machine of `virtual_gpu`:

    DSMR_VIRTUAL_GPU=sm_90 python -m pytest tests/kernels/compiled_cases.py
"""

import os

if part := os.environ.get("DSMR_VIRTUAL_GPU"):
    from virtual_gpu.driver import pretend

    pretend(part)
