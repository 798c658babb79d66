"""Processes as torchrun would start them, without it; and ranks that are threads, for what needs no processes."""

import copy
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from warm_start import Forked, WarmStart

from dsmr.console.ranks import Ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(warm_start: WarmStart, arguments: Sequence[str], ranks: int = 2, code: str = "") -> list[Forked]:
    """`dsmr ARGUMENTS`, or `python -c CODE ARGUMENTS`, once for each rank, all on this machine."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [
        warm_start.start(arguments, code=code, environment={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]


def ends(processes: Sequence[Forked]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    ended = [process.wait() for process in processes]
    return [(process.returncode, process.stderr) for process in ended]


class Thread(Ranks):
    """A rank that is a thread of this process: it meets the others at a barrier."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, told: list[Any]) -> None:
        super().__init__(rank, world, "cpu")
        self.barrier, self.told = barrier, told

    def everybody(self, value: Any) -> list[Any]:
        self.told[self.rank] = value
        self.barrier.wait()
        found = copy.deepcopy(self.told)  # as what comes from another process
        self.barrier.wait()
        return found

    def meet(self, share: float = 0.0) -> float:
        return sum(self.everybody(share))


def in_threads(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` gives in each of `world` ranks."""
    barrier, told, found = threading.Barrier(world, timeout=60), [None] * world, [None] * world

    def one(rank: int) -> None:
        found[rank] = work(Thread(rank, world, barrier, told))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
