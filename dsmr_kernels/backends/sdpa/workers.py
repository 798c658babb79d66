"""Independent jobs on all cores, each core with one job: many small products run faster so than all cores on each.

Splitting a product of a fraction of a millisecond over the cores costs a barrier a product, and on a machine that is
doing something else as well, every barrier waits for the core that was taken away.
"""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool = ThreadPoolExecutor(threads, "dsmr-attention", initializer=_alone_on_a_core)
    for started in [pool.submit(_wait_for_another, threads) for _ in range(threads)]:
        started.result()
    torch.set_num_threads(threads)  # what threads started later begin with; the workers keep their own setting
    return pool


def _alone_on_a_core() -> None:
    """One thread for this worker's operators.

    A thread that has not asked for the number first takes the global one at its first operator, whatever was set: each
    worker would start helpers of its own, and with more threads than cores OpenMP's barriers sleep, everywhere in the
    process and for good.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


def _wait_for_another(threads: int) -> None:
    """Hold a worker for a moment, so that the pool starts all of them."""
    if threads > 1:
        import time

        time.sleep(0.002)


# A forked child has the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def in_parallel(job: Callable[[Any], None], arguments: Sequence[Any], worthwhile: bool) -> None:
    """job(argument) for each argument, at once if it is `worthwhile` and there are arguments for every thread."""
    threads = torch.get_num_threads()
    if not worthwhile or threads == 1 or len(arguments) < threads:
        for argument in arguments:
            job(argument)
        return
    inference = torch.is_inference_mode_enabled()
    queue = iter(arguments)  # the workers share it, so that one that is held up takes fewer

    def alone(_: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both are settings of a thread
            for argument in queue:
                job(argument)

    for _ in _pool(threads).map(alone, range(threads)):
        pass
