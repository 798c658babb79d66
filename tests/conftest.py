"""One thread a test process: the suite runs in parallel, and results do not depend on how sums are split.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors, unless DSMR_VIRTUAL_GPU asks for the
machine of `tests/kernels/virtual_gpu`.
"""

import os
import signal
import sys
from collections.abc import Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it in its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from quick_interpreter import quicken
from warm_start import WarmStart

# Read when Triton is imported, which must be later than here; ignored where it is missing.
if os.environ.get("DSMR_VIRTUAL_GPU"):
    os.environ.pop("TRITON_INTERPRET", None)
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: begun last, one of them would hold up the end alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[pytest.MonkeyPatch]:
    """Where the tests that were collected have taken Triton in."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and "triton" in sys.modules:
            quicken(patch)
        yield patch


@pytest.fixture(scope="session")
def warm_start() -> Iterator[WarmStart]:
    """For tests that start one process after another."""
    server = WarmStart()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
