"""Freed memory is kept for the next step where that is asked for, and given back where it is not to be counted."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from dsmr.console.heap import give_back_freed_memory, keep_freed_memory

def work():
    blocks = [bytearray(4 << 20) for _ in range(8)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])  # pages

kept = keep_freed_memory()
work()
again, full = faults(), resident()
give_back_freed_memory()
print(int(kept), again, full - resident(), resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is asked")
def test_memory_that_a_step_freed_is_there_for_the_next_and_can_be_given_back() -> None:
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout
    kept, faults, given, page = map(int, said.split())
    if not kept:
        pytest.skip("the C library is another than glibc")
    pages = 8 * (4 << 20) // page  # of a step
    assert faults < 0.01 * 4 * pages
    assert given > 0.9 * pages
