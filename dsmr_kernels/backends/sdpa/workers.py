"""Independent jobs on PyTorch's own threads, in one parallel region for all of them.

Each thread takes the next job when it is done with one, and the operators of a job stay on its thread. A call so waits
for the other threads once, however many operators it has: where they meet at every operator, each meeting waits for the
thread whose core another program has taken. And that thread then does fewer jobs, where PyTorch's operators give all
threads alike. The threads are those of PyTorch's OpenMP, which are awake already: others would compete with them. Like
PyTorch's operators a region hangs in a process that was forked after one: `torch.set_num_threads(1)` comes first there,
as in a DataLoader's workers.
"""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from dsmr_kernels.denormals import WithoutDenormals

# Query-key pairs of a call, over all heads, at a head_dim of 64. With fewer than the first its operators are so short
# that threads mostly wait for Python's lock: alone on a machine all cores on each operator are faster by a fifth, and
# beside another program a region would be by far. The choice never depends on the load, since sums would round
# otherwise. Each thread's work is cut into a share for every so many as the second, but no more than `MOST_SHARES`:
# more shares are fairer where a core is taken, and each costs operators of its own, which weigh more in a short call.
SHARED_PAIRS, SHARE_PAIRS, MOST_SHARES = 1 << 21, 1 << 24, 4
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_TEAM = threading.local()  # how many threads each thread's operators were last seen to run on
_FORKED = threading.Event()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_FORKED.set)


@functools.cache
def _region() -> Callable[..., None] | None:
    """What compilers turn a parallel region into: calls a function once on each thread. None where PyTorch has other
    threads than OpenMP's, or an OpenMP without this entry, which only those for Linux have."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:  # what PyTorch itself depends on: another OpenMP in the process would be another set of threads
        runtime = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"))
        entry = runtime.GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.restype, entry.argtypes = None, [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return entry


def shares(pairs: int, dim: int) -> int:
    """Into how many jobs a call should be cut for `in_parallel`; 1 where its operators should rather have all cores.

    Args:
        pairs: query-key pairs of the call, over all heads.
        dim: the keys' head_dim.
    """
    pairs, threads = pairs * dim // 64, torch.get_num_threads()
    if threads == 1 or pairs < SHARED_PAIRS or _region() is None:
        return 1
    return threads * min(max(pairs // SHARE_PAIRS, 1), MOST_SHARES)


def in_parallel(job: Callable[[Any], None], arguments: Sequence[Any]) -> None:
    """job(argument) for each argument, several at once where there is more than one and they can.

    What watches operators on this thread would miss those of the others: where it is a dispatch mode, as one that
    counts operations, every job stays here. A profiler, which should see the call as it is, shows this thread's alone.
    """
    region = _region() if len(arguments) > 1 and torch.get_num_threads() > 1 else None
    if region is None or _len_torch_dispatch_stack():
        for argument in arguments:
            job(argument)
        return
    inference = torch.is_inference_mode_enabled()
    queue = iter(arguments)  # the threads share it, so that one that is held up takes fewer
    failures: list[BaseException] = []

    def alone() -> None:
        # All are settings of a thread.
        with torch.inference_mode(inference), torch.no_grad(), WithoutDenormals():
            for argument in queue:
                if failures:
                    return
                job(argument)

    _once_each(region, alone, failures)


def _once_each(
    region: Callable[..., None], job: Callable[[], None], failures: list[BaseException], threads: int = 0
) -> None:
    """job() once on each of so many threads, 0 = as many as PyTorch has; what one raises is added to `failures`, and
    the first of these raised behind the region, which nothing may leave."""
    begun: set[int] = set()

    def alone(_: Any) -> None:
        try:
            begun.add(threading.get_ident())
            job()
        except BaseException as failure:
            failures.append(failure)

    body = _BODY(alone)
    region(body, None, threads, 0)
    if failures:
        raise failures[0]
    if threading.get_ident() not in begun:  # what a signal raised before `try`, Python prints and drops
        raise KeyboardInterrupt


class HereWithoutDenormals(WithoutDenormals):
    """`WithoutDenormals` for this thread alone, although operators in it may run on PyTorch's others."""

    __slots__ = ()

    def __enter__(self) -> Self:
        threads = torch.get_num_threads()
        if getattr(_TEAM, "threads", 1) != threads:  # one that is made in the context would keep what it inherits
            _TEAM.threads = threads
            _on_all(_nothing, threads)
        return super().__enter__()


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """`WithoutDenormals` for this thread and for those that PyTorch's operators run on."""
    before = torch.get_num_threads()
    with HereWithoutDenormals() as here:
        if here.changes:
            _on_all(_flush, before)
        try:
            yield
        finally:
            if here.changes:  # also those that are not asked any more
                _on_all(_count, max(before, torch.get_num_threads()))


def _nothing() -> None:
    pass


def _flush() -> None:
    torch.set_flush_denormal(True)


def _count() -> None:
    torch.set_flush_denormal(False)


def _on_all(job: Callable[[], None], threads: int) -> None:
    """Once on each of so many of PyTorch's threads, where these can be asked: in a process that was forked they are
    gone."""
    region = _region() if threads > 1 and not _FORKED.is_set() else None
    if region is not None:
        _once_each(region, job, [], threads)
