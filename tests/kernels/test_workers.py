"""Independent jobs side by side: all done, errors passed on, and no threads beyond those that PyTorch has."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr_kernels.backends.sdpa import workers
from dsmr_kernels.backends.sdpa.workers import in_parallel
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import assert_agrees_with_oracle, run

shared = pytest.mark.skipif(workers._region() is None, reason="PyTorch's threads cannot be asked here")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_job_is_done_once() -> None:
    found: list[int] = []
    in_parallel(found.append, range(20))
    assert sorted(found) == list(range(20))
    assert torch.get_num_threads() == 2


@shared
@pytest.mark.usefixtures("two_threads")
def test_jobs_run_side_by_side_and_without_gradients() -> None:
    meeting = threading.Barrier(2, timeout=20)  # passed only by two at once

    def job(_: int) -> None:
        meeting.wait()
        assert not torch.is_grad_enabled()

    in_parallel(job, range(2))


@shared
def test_the_threads_are_those_that_pytorch_has_already() -> None:
    """Others would compete for the cores with PyTorch's, which spin for a while when they have nothing to do."""
    code = """if True:
        import os, torch
        from dsmr_kernels.backends.sdpa.workers import in_parallel
        torch.set_num_threads(2)
        torch.ones(1 << 22).add_(1)
        threads = lambda: len(os.listdir("/proc/self/task"))
        before, inside = threads(), []
        def job(_):
            torch.ones(1 << 22).add_(1), torch.randn(512, 512) @ torch.randn(512, 512)
            inside.append(threads())
        in_parallel(job, range(8))
        print(before, max(inside), threads())
    """
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, inside, after = done.stdout.split()
    assert before == inside == after


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_job_is_raised() -> None:
    def job(number: int) -> None:
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        in_parallel(job, range(8))


@shared
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("two_threads")
def test_an_interrupt_that_python_drops_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes just where a thread enters its jobs: what its handler raises leaves a callback."""
    kind, main = workers._BODY, threading.get_ident()

    def interrupted(body: Any) -> Any:
        def enter(nothing: Any) -> None:
            if threading.get_ident() == main:
                raise KeyboardInterrupt
            body(nothing)

        return kind(enter)

    monkeypatch.setattr(workers, "_BODY", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(time.sleep, [0.001] * 4)


@pytest.mark.usefixtures("two_threads")
def test_a_mode_that_watches_operators_sees_those_of_every_job() -> None:
    """As `torch.utils.flop_counter` does: a mode belongs to the thread that entered it."""

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    def job(x: torch.Tensor) -> None:
        time.sleep(0.005)  # long enough for the other thread to take the next one
        torch.abs(x)

    jobs = list(torch.ones(20, 1))
    with Counting() as mode:
        in_parallel(job, jobs)
    assert mode.count == len(jobs)


def test_one_thread_stays_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    names: list[str] = []
    in_parallel(lambda _: names.append(threading.current_thread().name), range(3))
    torch.set_num_threads(before)
    assert names == [threading.current_thread().name] * 3


@shared
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("options", [{}, {"visibility": "sliding"}, {"biased": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_that_is_shared_agrees_with_the_oracle_and_with_itself(
    dtype: torch.dtype, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SHARED_PAIRS", 0)
    case = random_case(batch=3, queries=40, seen=[70, 9, 30], horizon=31, segment_length=17, dtype=dtype, **options)
    assert_agrees_with_oracle(case, "sdpa")
    first, again = run(case, "sdpa"), run(case, "sdpa")
    assert all(torch.equal(first[name], again[name]) for name in first)  # whoever was first
