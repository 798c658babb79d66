"""Independent jobs side by side: all done, errors passed on, and no threads beyond the workers themselves."""

import threading
from collections.abc import Iterator

import pytest
import torch

from dsmr_kernels.backends.sdpa.workers import in_parallel


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_operators_of_a_worker_stay_on_its_thread() -> None:
    """Helpers of the workers' own make more threads than cores, and then OpenMP's barriers sleep everywhere."""
    found: list[tuple[str, int]] = []

    def job(_: int) -> None:
        torch.ones(1 << 20).add_(1)  # large enough to be shared out
        found.append((threading.current_thread().name, torch.get_num_threads()))

    in_parallel(job, range(8), worthwhile=True)
    assert len(found) == 8
    assert {threads for _, threads in found} == {1}
    assert all(name.startswith("dsmr-attention") for name, _ in found)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_job_is_raised() -> None:
    def job(number: int) -> None:
        if number == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"):
        in_parallel(job, range(8), worthwhile=True)


def test_what_is_not_worthwhile_stays_here() -> None:
    names: list[str] = []
    in_parallel(lambda _: names.append(threading.current_thread().name), range(3), worthwhile=False)
    assert names == [threading.current_thread().name] * 3
