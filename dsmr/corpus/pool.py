"""Many independent tasks over all cores, with progress, and with a task that kills its process found and named."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Task = TypeVar("Task")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    jobs: int,
    advance: Callable[[], None],
    crashed: Callable[[Task], None],
) -> None:
    """Call `work` on every task; results are what `work` leaves behind (files).

    `advance` is called after each task, `crashed` with a task whose process died (a reader in native code that met a
    file it cannot stand). An exception of `work` ends everything and is raised here.
    """
    if jobs <= 1:
        for task in tasks:
            work(task)
            advance()
        return
    try:
        suspects = _run_pool(work, tasks, jobs, advance)
    except _NoWorkersError:  # say, in a script without `if __name__ == "__main__"`: then here, one after another
        run_all(work, tasks, 1, advance, crashed)
        return
    while suspects:
        # One of the tasks in flight killed its process: each of them gets a process of its own.
        for task in suspects[:jobs]:
            if _run_pool(work, [task], 1, advance):
                crashed(task)
                advance()
        suspects = _run_pool(work, suspects[jobs:], jobs, advance)


class _NoWorkersError(Exception):
    """Not even an idle process can be started."""


def _run_pool(
    work: Callable[[Task], None], tasks: Sequence[Task], jobs: int, advance: Callable[[], None]
) -> list[Task]:
    """Run tasks until done or until a process dies; returns what is left, the tasks that were in flight first."""
    if not tasks:
        return []
    waiting = list(reversed(tasks))
    running: dict[Future[None], Task] = {}
    # Not forked: the caller may hold threads and locks (torch, a progress bar) that a fork would copy half-way.
    context = multiprocessing.get_context("spawn")
    try:
        executor = ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_settle_in)
    except OSError:  # no semaphores: a container without /dev/shm, say
        raise _NoWorkersError from None
    finished = False
    try:
        executor.submit(os.getpid).result()
    except BrokenProcessPool:
        executor.shutdown(wait=False, cancel_futures=True)
        raise _NoWorkersError from None
    try:
        while waiting or running:
            # No more than one task to a process: after a crash exactly the tasks in flight are suspects.
            while waiting and len(running) < jobs:
                running[executor.submit(work, waiting[-1])] = waiting[-1]
                waiting.pop()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                del running[future]
                advance()
        finished = True
    except BrokenProcessPool:
        return [*running.values(), *reversed(waiting)]
    finally:
        executor.shutdown(wait=finished, cancel_futures=True)
    return []


def _settle_in() -> None:
    """In a new worker: leave Ctrl-C to the parent, and do not outlive it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def progress_bar(title: str, total: int, done: int = 0, show: bool = True) -> Iterator[Callable[[], None]]:
    """A bar on stderr with the time to finish; yields the function to call after each step."""
    if not show:
        yield lambda: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dsmr.console.screen import Screen, described

    columns = (
        described(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Screen(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done)
        yield lambda: bar.advance(task)
