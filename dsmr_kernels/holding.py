"""Who still needs a memory's contents, and what may be looked at: what a value that is written in place rests on."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

MOVED = (
    "a KVMemory is used inside a backward pass, as activation checkpointing does to compute again, but it may have "
    "moved on since: give the checkpointed call memory.snapshot(), taken outside of it, or let "
    "DSMRModel(..., checkpoint_layers=True) do the checkpointing"
)

INFERENCE = (
    "holds tensors that were made under torch.inference_mode and must stay in it: use KVMemory.empty, whose tensors "
    "may go everywhere, or memory.clone()"
)


def may_look(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: elsewhere than on a CPU that makes the device wait, which
    `DSMR_CHECK=1` in the environment allows."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or os.environ.get("DSMR_CHECK") == "1")


def this_backward() -> int:
    """The number of the backward pass that runs in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread: what is computed now is computed again."""
    return this_backward() != -1


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """Tensors made inside are ordinary ones, that may be written to anywhere, whatever the mode outside."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Holders:
    """How many need a memory's present contents."""

    def __init__(self) -> None:
        self.count = 0


class Lease:
    """Held by whoever needs a memory's present contents: while it lives, the memory copies before it writes."""

    def __init__(self, holders: Holders) -> None:
        self.holders = holders
        holders.count += 1

    def __del__(self) -> None:
        self.holders.count -= 1
