"""What Triton compiles of the kernels for NVIDIA's parts does the right thing: cases of `compiled_cases.py`, on two.

Here a sample: every kernel, dtype and branch once on the part with warpgroup products, and a few with the older matrix
instructions. With DSMR_SOAK=full every case on every part, and a GPU's whole trial.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator

import pytest
from soak import FULL
from warm_start import ROOT, WarmStart

WHOLE = {
    name: [name]
    for name in (
        "test_what_else_a_call_may_be_told",
        "test_everything_at_once",
        "test_head_dims_and_dtypes",
        "test_tiles_that_programs_share",
        "test_storing_and_decoding",
        "test_the_trial_of_a_gpu_passes",
    )
}
TOLD, HEAD_DIM, DECODING = "test_what_else_a_call_may_be_told", "test_head_dims_and_dtypes", "test_storing_and_decoding"
SAMPLE = {  # a process each: of about as much work, so that cores share it
    "sm_90": {
        "everything": ["test_everything_at_once[segment-True]"],
        "head_dim 128": [f"{HEAD_DIM}[128]"],
        "head_dim 256": [f"{HEAD_DIM}[256]"],
        "no memory": [f"{HEAD_DIM}[64, no memory]"],
        "small and odd head_dims, float16, float32": [
            f"{HEAD_DIM}[40, float16]",
            f"{HEAD_DIM}[16]",
            f"{HEAD_DIM}[64, float32]",
        ],
        "splits, int8": ["test_tiles_that_programs_share[int8, gradient of lse, sliding]"],
        "int8, value head_dims, parts of the gradient": [
            f"{TOLD}[int8, gradient of lse, values narrower, offsets]",
            f"{TOLD}[keys alone, values wider]",
            f"{TOLD}[values alone]",
        ],
        "bias": [f"{TOLD}[bias]", f"{TOLD}[bias alone, int8]"],
        "decoding, sinks": [
            f"{DECODING}[one-as computed]",
            f"{DECODING}[five-int8]",
            f"{DECODING}[three, float16-as computed]",
        ],
    },
    "sm_80": {
        "everything, odd head_dim, float16": ["test_everything_at_once[segment-True]", f"{HEAD_DIM}[40, float16]"],
    },
}
CHOSEN = dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_120"), WHOLE) if FULL else SAMPLE


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
@pytest.mark.parametrize(("part", "of"), [(part, name) for part, groups in CHOSEN.items() for name in groups])
def test_compiled_kernels_agree_with_oracle(part: str, of: str, machine: Callable[[str], WarmStart]) -> None:
    cases = CHOSEN[part][of]
    asked = [*(f"tests/kernels/compiled_cases.py::{case}" for case in cases), "-q", "-p", "no:cacheprovider"]
    result = machine(part).run([*asked, "-p", "no:xdist"], module="pytest", seconds=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert (" passed" if FULL else f"\n{len(cases)} passed") in result.stdout
    assert " skipped" not in result.stdout
