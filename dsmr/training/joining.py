"""How the processes that torchrun started come to train together, and what of it cannot be."""

import contextlib
from collections.abc import Iterator

from dsmr.console.errors import UserError
from dsmr.console.ranks import PATIENCE, started, together
from dsmr.training.ranks import TrainingRanks

WAYS = ("ddp", "fsdp")
START = "torchrun --nproc-per-node N -m dsmr train ... --parallel ddp"


@contextlib.contextmanager
def joined(parallel: str | None, batch: int, device: str) -> Iterator[TrainingRanks]:
    """This process's ranks: those that torchrun started where `parallel` is one of `WAYS`, else a world of one.

    Raises `UserError` for what cannot be: no torchrun, a batch that the ranks cannot share evenly, a backend or GPU
    that is missing; what goes wrong inside is said with the rank, and so is that another one was lost.
    """
    world = started()
    if parallel is None and world > 1:
        raise UserError(f"torchrun started {world} processes: say how they train together, with --parallel ddp or fsdp")
    if parallel is not None:
        _check(parallel, world, batch)
    kind = TrainingRanks
    if parallel == "fsdp" and world > 1:
        from dsmr.training.sharding import ShardedRanks as kind  # PyTorch takes a second to import what it needs

    with together(kind, device, nccl=True, patience=PATIENCE) as ranks:
        yield ranks


def _check(parallel: str, world: int, batch: int) -> None:
    if parallel not in WAYS:
        raise UserError(f"unknown way to train together '{parallel}': use --parallel ddp or fsdp")
    if not world:
        raise UserError(f"--parallel needs processes that torchrun started: {START}")
    if batch % world:
        raise UserError(f"a batch of {batch} rows cannot be dealt evenly to {world} ranks: choose another --batch-size")
