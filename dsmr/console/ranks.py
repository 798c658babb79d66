"""The processes that torchrun started for one job: which one this is, and what all of them know.

What decides is the same in all of them, so that none waits for another that went elsewhere: the clock (the first
rank's) and the signals that came. They speak host to host (gloo). A process alone is a world of one, and communicates
nothing.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from dsmr.console.errors import UserError
from dsmr.console.stopping import WISHES, Stop
from dsmr.console.words import one_line

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others, which may be writing a checkpoint, before it gives them up."""
LONG = timedelta(days=7)
"""The same where they only meet when one is done, which may be hours before another."""
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of each process."""


class Ranks:
    """This process's place among `world` processes; `device` is its own one's name.

    Everything here but the properties must be called by all ranks, in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: str = "auto") -> None:
        self.rank, self.world, self.device = rank, world, device
        self.stop = Stop()
        self._now, self._signal = time.monotonic(), 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    @property
    def signal(self) -> int | None:
        """The signal that all ranks know of since they last met."""
        return self.stop.signal if self.alone else self._signal or None

    def clock(self) -> float:
        """The first rank's seconds when the ranks last met."""
        return time.monotonic() if self.alone else self._now

    def meet(self, share: float = 0.0) -> float:
        """Wait for all ranks, and agree on the time and on signals; return the sum of the `share` of each."""
        if self.alone:
            return share
        told = torch.zeros(2 + len(WISHES), dtype=torch.float64, device="cpu")
        told[0], told[1] = share, time.monotonic() if self.first else 0.0
        for place, number in enumerate(WISHES, 2):
            told[place] = float(self.stop.signal == number)
        dist.all_reduce(told)
        self._now = told[1].item()
        if came := [number for place, number in enumerate(WISHES, 2) if told[place]]:
            self._signal = int(came[0])
            if self.stop.signal is None:
                self.stop.signal = self._signal
        return told[0].item()

    def everybody(self, value: Any) -> list[Any]:
        """The `value` of each rank, in their order."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """`UserError` if a rank was given, or found, something else than the first; agrees on the clock."""
        if self.alone:
            return
        for rank, found in enumerate(everybody := self.everybody(dict(facts))):
            for name, value in found.items():
                if value != everybody[0][name]:
                    raise UserError(
                        f"the ranks were not asked for the same: {name} is {everybody[0][name]} in rank 0, but {value} "
                        f"in rank {rank}"
                    )
        self.meet()

    def where(self, device: torch.device) -> str:
        """What computes, in words: "cpu", "4 ranks, each on cuda"."""
        return str(device) if self.alone else f"{self.world} ranks, each on {device.type}"

    def console(self, given: "Console | None") -> "Console | None":
        """Where this rank says how far it is: nowhere, unless it is the first."""
        from rich.console import Console

        return given if self.first else Console(quiet=True, force_terminal=False)


def sum_of_bits(tensors: Iterable[torch.Tensor]) -> int:
    """A number that all ranks agree on where they hold the same float32 `tensors`, bit for bit."""
    return int(torch.stack([held.detach().view(torch.int32).sum(dtype=torch.int64) for held in tensors]).sum())


R = TypeVar("R", bound=Ranks)


def started() -> int:
    """How many processes torchrun started for this job; 0 where this is none of them."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in GIVEN) else 0


@contextlib.contextmanager
def together(kind: Callable[[int, int, str], R], device: str, *, nccl: bool, patience: timedelta) -> Iterator[R]:
    """This process among those that torchrun started, each on a GPU of its own where `device` is not the CPU; a world
    of one where there are none. With `nccl` their GPUs speak too.

    Raises `UserError` for a backend or GPU that is missing. What goes wrong inside is said with the rank, and so is
    that another one was lost.
    """
    world = started()
    if world < 2:
        yield kind(0, 1, device)
        return
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("several ranks need PyTorch's gloo backend, which this PyTorch was built without")
    ranks = kind(int(os.environ["RANK"]), world, _device(device, nccl))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl and ranks.device != "cpu" else "gloo", timeout=patience)
        ranks.meet()
        yield ranks
    except UserError as error:
        raise UserError(f"rank {ranks.rank} of {world}: {error}") from error
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(f"rank {ranks.rank} of {world} ends because another one did: {one_line(error)}") from error
    dist.destroy_process_group()  # not after an error: it might wait for those that are gone


def _device(asked: str, nccl: bool) -> str:
    """The device of this rank, and that it is there."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if asked not in ("auto", "cuda"):
        raise UserError(f"under torchrun each rank takes a GPU of its own: use --device cuda or cpu, not {asked}")
    place, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= found:
        raise UserError(f"torchrun started rank {place} on this machine, but PyTorch finds {found} GPUs here")
    if nccl and not dist.is_nccl_available():
        raise UserError("several ranks on GPUs need PyTorch's nccl backend, which this PyTorch was built without")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def _lost(error: RuntimeError) -> bool:
    """Whether `error` is that of a rank whose peer is gone, or does not answer."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in said for words in ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    )
