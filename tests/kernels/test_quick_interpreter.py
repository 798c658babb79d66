"""The interpreter of the tests, which leaves out what Triton's does for nothing, gives the bits of Triton's."""

import os
import time

import pytest
import torch
from quick_interpreter import quicken

from dsmr_kernels import available_backends
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import run

if "triton" not in available_backends() or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)


@pytest.mark.slow  # by Triton's own, too, which takes three times as long
def test_it_gives_the_bits_of_tritons_own_and_sooner(quick_interpreter: pytest.MonkeyPatch) -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 9, "seen": [20], "capacity": 12, "horizon": 9}
    cases = [
        random_case(**sizes, segment_length=4, biased=True),
        random_case(**sizes, stored=torch.int8, dtype=torch.float16, visibility="sliding"),
    ]
    run(cases[0], "triton")  # the kernels are read in
    found, seconds = [], []
    try:
        for undo in (False, True):
            if undo:
                quick_interpreter.undo()
            begin = time.process_time()
            found.append([run(case, "triton") for case in cases])
            seconds.append(time.process_time() - begin)
    finally:
        quicken(quick_interpreter)
    for quick, own in zip(*found, strict=True):
        assert quick.keys() == own.keys()
        assert all(torch.equal(x, own[name]) for name, x in quick.items())
    assert seconds[0] < seconds[1]
