"""What Triton compiles of the kernels for NVIDIA's parts does the right thing: cases of `compiled_cases.py`, on two.

Here a sample: every kernel, dtype and branch once on the part with warpgroup products, and a few with the older matrix
instructions. With DSMR_SOAK=full every case on every part.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
from soak import FULL
from warm_start import ROOT, WarmStart

WHOLE = [
    "test_what_else_a_call_may_be_told",
    "test_everything_at_once",
    "test_head_dims_and_dtypes",
    "test_tiles_that_programs_share",
    "test_storing_and_decoding",
    "test_the_trial_of_a_gpu_passes",
]
SAMPLE = {
    "sm_90": [
        "test_everything_at_once[segment-True]",
        "test_head_dims_and_dtypes[128]",
        "test_head_dims_and_dtypes[256]",
        "test_head_dims_and_dtypes[64, no memory]",
        "test_head_dims_and_dtypes[40, float16]",
        "test_head_dims_and_dtypes[16]",
        "test_head_dims_and_dtypes[64, float32]",
        "test_tiles_that_programs_share[int8, gradient of lse, sliding]",
        "test_what_else_a_call_may_be_told[int8, gradient of lse, values narrower, offsets]",
        "test_what_else_a_call_may_be_told[keys alone, values wider]",
        "test_what_else_a_call_may_be_told[values alone]",
        "test_what_else_a_call_may_be_told[bias]",
        "test_what_else_a_call_may_be_told[bias alone, int8]",
        "test_storing_and_decoding[one-as computed]",
        "test_storing_and_decoding[five-int8]",
        "test_storing_and_decoding[three, float16-as computed]",
        "test_the_trial_of_a_gpu_passes",
    ],
    "sm_80": [
        "test_everything_at_once[segment-True]",
        "test_head_dims_and_dtypes[40, float16]",
    ],
}
CHOSEN = {"sm_90": WHOLE, "sm_80": WHOLE, "sm_89": WHOLE, "sm_120": WHOLE} if FULL else SAMPLE


@pytest.fixture(scope="session")
def machine() -> Iterator[Callable[[str], WarmStart]]:
    """Processes on the virtual GPU of a part: Triton is told of it before it is imported."""
    started: dict[str, WarmStart] = {}

    def of(part: str) -> WarmStart:
        if part not in started:
            environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            paths = [str(ROOT), str(ROOT / "tests" / "kernels"), os.environ.get("PYTHONPATH", "")]
            environment |= {"DSMR_VIRTUAL_GPU": part, "PYTHONPATH": os.pathsep.join(paths)}
            modules = ["pytest", "torch", "torch._dynamo", "hypothesis", "triton", "virtual_gpu.driver"]
            started[part] = WarmStart(modules, environment)
        return started[part]

    yield of
    for one in started.values():
        one.close()


@pytest.mark.soak  # compiles kernels, and runs them instruction by instruction
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize(("part", "case"), [(part, case) for part, cases in CHOSEN.items() for case in cases])
def test_compiled_kernels_agree_with_oracle(part: str, case: str, machine: Callable[[str], WarmStart]) -> None:
    asked = [f"tests/kernels/compiled_cases.py::{case}", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = machine(part).run(asked, module="pytest")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
