"""Freed memory is kept for the next step where that is asked for, and given back where it is not to be counted."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from dsmr.console.heap import give_back_freed_memory, keep_freed_memory
from dsmr.profiling.row import resident_bytes

def work():
    tensors = [torch.ones(4 << 18) for _ in range(8)]  # 4 MiB each

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
kept = keep_freed_memory()
work()
again = faults()
full = resident_bytes("VmRSS")
give_back_freed_memory()
print(int(kept), again, full - resident_bytes("VmRSS"))
"""


@pytest.mark.slow  # PyTorch starts
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is asked")
def test_memory_that_a_step_freed_is_there_for_the_next_and_can_be_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, faults, given = map(int, said.split())
    if not kept:
        pytest.skip("the C library is another than glibc")
    size = 8 * (4 << 20)  # bytes of a step
    assert faults < 0.01 * 4 * size / resource.getpagesize()
    assert given > 0.9 * size
