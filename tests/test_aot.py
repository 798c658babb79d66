"""The Triton kernels compile for GPUs that this machine does not have, without spills: see `dsmr_kernels.aot`."""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)


@pytest.mark.parametrize(
    ("target", "head_dim", "dtype", "kernels"),
    [
        ("sm_90", 128, "bfloat16", ("forward", "dq", "dkv")),
        ("sm_80", 64, "float16", ("forward",)),
        ("gfx942", 64, "bfloat16", ("forward",)),
        ("sm_90", 128, "bfloat16", ("decode", "decode_int8", "combine", "step")),
        ("sm_89", 80, "bfloat16", ("decode_many",)),
        ("gfx942", 64, "bfloat16", ("decode", "step_int8")),
    ],
)
def test_shipped_configurations_compile_clean(target: str, head_dim: int, dtype: str, kernels: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "dsmr_kernels.aot", "--target", target, "--dim", str(head_dim), "--dtype", dtype]
    for kernel in kernels:
        command += ["--kernel", kernel]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all configurations are clean" in result.stdout
