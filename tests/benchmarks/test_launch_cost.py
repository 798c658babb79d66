"""The host's cost of a call can be measured without a GPU, and what follows from shapes alone is worked out once."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.launch_cost import FLOOR, why_not


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.soak  # builds a libcuda and Triton's launcher against it, and compiles the kernels
def test_it_measures_forward_backward_and_a_decode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if reason := why_not():
        pytest.skip(reason)
    command = [sys.executable, "-m", "benchmarks.launch_cost"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment())
    assert result.returncode == 0, result.stderr
    found = dict(re.findall(r"(\S.*?) +([\d.]+) µs", result.stdout))
    assert set(found) == {"forward", FLOOR, "forward and backward", "decode step", "decode step, split"}
    both, floor = float(found["forward and backward"]), float(found[FLOOR])
    assert 0 < float(found["forward"]) < both
    over = re.search(r"forward and backward over its floor: ([\d.]+)", result.stdout)
    assert over is not None
    assert float(over[1]) == pytest.approx(both / floor, rel=0.01)
    assert floor < both


def test_under_the_interpreter_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not() == "unset TRITON_INTERPRET: under the interpreter nothing is launched"
