"""What Triton compiles of the kernels for NVIDIA's parts does the right thing: `compiled_cases.py`, on two of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak  # compiles thirty kernels, and runs them instruction by instruction
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize(
    ("part", "chosen"),
    [("sm_90", ()), ("sm_80", ("-k", "everything or head_dims"))],  # warpgroup products; the older matrix instructions
    ids=["sm_90", "sm_80"],
)
def test_compiled_kernels_agree_with_oracle(part: str, chosen: tuple[str, ...]) -> None:
    cases = Path(__file__).with_name("compiled_cases.py")
    paths = [str(cases.parents[2]), os.environ.get("PYTHONPATH", "")]  # the sources beside it, installed or not
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DSMR_VIRTUAL_GPU": part}
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
