"""The processes of one training: each reads its own rows of every batch, with memories of its own (`torchrun`).

What decides is the same in all of them, so that none waits for another that went elsewhere: the weights, how far every
row is, the clock (the first rank's) and the signals that came. Rank r of N reads rows r*B/N to (r+1)*B/N of the B rows
that one process would read, in the same order. A process alone is a world of one, and communicates nothing.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsmr.console.errors import UserError
from dsmr.console.stopping import WISHES, Stop, StoppedError
from dsmr.corpus.store import Corpus
from dsmr.corpus.streams import Batch
from dsmr.evaluation.losses import evaluate, piece_losses
from dsmr.evaluation.report import EvaluationReport, report_losses
from dsmr.model.attention import ROW
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel, DSMROutput
from dsmr.runs.checkpoint import one_line, restore_rng, rng_state

if TYPE_CHECKING:
    from rich.console import Console

WAYS = ("ddp", "fsdp")
PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others, which may be writing a checkpoint, before it gives them up."""
START = "torchrun --nproc-per-node N -m dsmr train ... --parallel ddp"
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

    def rows(self, batch: int) -> range:
        """The rows of a batch of `batch` rows that this rank reads."""
        each = batch // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def meet(self, share: float = 0.0) -> float:
        """Wait for all ranks, and agree on the time and on signals; return the sum of the `share` of each."""
        if self.alone:
            return share
        told = torch.zeros(2 + len(WISHES), dtype=torch.float64)
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

    # The model and its state --------------------------------------------------------------------------------------

    def over(self, model: DSMRModel) -> Callable[..., DSMROutput]:
        """What a training step calls: the model, whose backward gives every rank the mean of all ranks' gradients."""
        if self.alone:
            return model
        on_gpu = [torch.device(self.device)] if self.device != "cpu" else None
        return DistributedDataParallel(model, device_ids=on_gpu, gradient_as_bucket_view=True)

    def loss(self, output: DSMROutput, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's share of the mean over all rows' targets, and what to go back from: the ranks' mean of it is the
        gradient of the whole. `output.loss` is the mean where there is one rank, else each token's ("none")."""
        assert output.loss is not None
        if self.alone:
            return output.loss, output.loss
        share = output.loss.sum() / max(batch.predicted, 1)
        return share.detach(), share * self.world

    @property
    def reduction(self) -> str:
        """The `reduction` that `loss` wants of the model."""
        return "mean" if self.alone else "none"

    def new_state(self, model: DSMRModel, batch: int, **options: Any) -> DSMRState:
        """The state of this rank's rows; random samples are those that the rows have in one process."""
        rows = self.rows(batch)
        state = model.new_state(len(rows), **options)
        for memory in state.memories:
            if memory.seeds is not None and rows[0]:
                memory.seeds += rows[0] * ROW
        return state

    def gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The `DSMRState.state_dict` of all rows, on the first rank; the other ranks get their own back."""
        return dict(state) if self.alone else _each_tensor(state, self._gather)

    def own(self, state: Mapping[str, Any], batch: int) -> dict[str, Any]:
        """This rank's rows of a `DSMRState.state_dict` of all of the `batch` rows."""
        if self.alone:
            return dict(state)
        rows = self.rows(batch)

        def part(tensor: Tensor) -> Tensor:
            if tensor.shape[0] != batch:
                raise ValueError(f"the saved state has {tensor.shape[0]} rows, but the batch has {batch}")
            return tensor[rows.start : rows.stop]

        return _each_tensor(state, part)

    def _gather(self, tensor: Tensor) -> Tensor:
        own = tensor.detach().to("cpu").contiguous()
        if not own.numel():
            return own.new_empty((self.world * own.shape[0], *own.shape[1:]))
        flat = own.flatten().view(torch.uint8)
        if not self.first:
            dist.gather(flat)
            return own
        whole = torch.empty(self.world * flat.numel(), dtype=torch.uint8)
        dist.gather(flat, list(whole.split(flat.numel())))
        return whole.view(own.dtype).view(-1, *own.shape[1:])

    def check_weights(self, model: nn.Module) -> None:
        """`UserError` if a rank holds other weights than the first: a device that reckons wrong, or a fault of ours."""
        if self.alone:
            return
        sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in model.parameters()]
        found = self._everybody(torch.stack(sums).sum().item())
        if others := [rank for rank, value in enumerate(found) if value != found[0]]:
            raise UserError(f"rank {others[0]} holds other weights than rank 0: nothing is saved of this step")

    # Random generators ----------------------------------------------------------------------------------------------

    def seed(self, seed: int, step: int = 0) -> None:
        """Let the ranks but the first draw numbers of their own, such as dropout's."""
        if not self.first:
            torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0] >> 1))

    def rng_states(self) -> dict[str, Any]:
        """What a checkpoint keeps of all ranks' random generators: "rng" of the first, "rngs" of all."""
        if self.alone:
            return {"rng": rng_state()}
        states = self._everybody(rng_state())
        return {"rng": states[0], "rngs": states}

    def restore_rng(self, checkpoint: Mapping[str, Any], seed: int, step: int) -> None:
        """Go on with the saved random numbers where as many ranks saved them; else the first one does."""
        states = checkpoint.get("rngs", [checkpoint["rng"]])
        same = len(states) == self.world
        restore_rng(states[self.rank] if same else checkpoint["rng"])
        if not same:
            self.seed(seed, step)

    # What is said and measured --------------------------------------------------------------------------------------

    def where(self, device: torch.device) -> str:
        """What computes, in words: "cpu", "4 ranks, each on cuda"."""
        return str(device) if self.alone else f"{self.world} ranks, each on {device.type}"

    def console(self, given: "Console | None") -> "Console | None":
        """Where this rank says how far it is: nowhere, unless it is the first."""
        from rich.console import Console

        return given if self.first else Console(quiet=True, force_terminal=False)

    def _everybody(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """`UserError` if a rank was given, or found, something else than the first; agrees on the clock."""
        if self.alone:
            return
        for rank, found in enumerate(everybody := self._everybody(dict(facts))):
            for name, value in found.items():
                if value != everybody[0][name]:
                    raise UserError(
                        f"the ranks do not train the same: {name} is {everybody[0][name]} in rank 0, but {value} in "
                        f"rank {rank}"
                    )
        self.meet()

    def evaluate(
        self,
        model: DSMRModel,
        corpus: Corpus,
        split: str,
        pieces: np.ndarray,
        *,
        batch_size: int,
        name: str,
        **options: Any,
    ) -> EvaluationReport:
        """As `dsmr.evaluation.losses.evaluate`, with `batch_size` rows over all ranks: the pieces are dealt to them by
        length, and all get the report.

        Raises `StoppedError` in every rank if `progress` raises it in one.
        """
        if self.alone:
            return evaluate(model, corpus, split, pieces=pieces, batch_size=batch_size, name=name, **options)
        lengths = np.diff(np.asarray(corpus.offsets))[pieces]
        dealt = np.argsort(-lengths, kind="stable")
        mine = dealt[self.rank :: self.world]
        with contextlib.suppress(StoppedError):
            losses = piece_losses(model, corpus, pieces[mine], batch_size=len(self.rows(batch_size)), **options)
        self.meet()
        if self.signal is not None:
            raise StoppedError
        of_all: list[Any] = [None] * len(pieces)
        for rank, found in enumerate(self._everybody(losses)):
            for place, loss in zip(dealt[rank :: self.world], found, strict=True):
                of_all[place] = loss
        return report_losses(corpus, split, pieces, of_all, name=name)


def _each_tensor(value: Any, how: Callable[[Tensor], Tensor]) -> Any:
    """The same lists and dictionaries with `how` of each tensor."""
    if isinstance(value, Tensor):
        return how(value)
    if isinstance(value, Mapping):
        return {name: _each_tensor(item, how) for name, item in value.items()}
    return [_each_tensor(item, how) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def joined(parallel: str | None, batch: int, device: str) -> Iterator[Ranks]:
    """This process's ranks: those that torchrun started where `parallel` is "ddp", else a world of one.

    Raises `UserError` for what cannot be: no torchrun, a batch that the ranks cannot share evenly, a backend or GPU
    that is missing; what goes wrong inside is said with the rank, and so is that another one was lost.
    """
    world = int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in GIVEN) else 0
    if parallel is None:
        if world > 1:
            raise UserError(f"torchrun started {world} processes: say how they train together, with --parallel ddp")
        yield Ranks(device=device)
        return
    _check(parallel, world, batch)
    ranks = Ranks(int(os.environ["RANK"]), world, _device(device))
    try:
        backend = "gloo" if ranks.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=PATIENCE)
        ranks.meet()
        yield ranks
    except UserError as error:
        raise UserError(f"rank {ranks.rank} of {world}: {error}") from error
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(f"rank {ranks.rank} of {world} ends because another one did: {one_line(error)}") from error
    dist.destroy_process_group()  # not after an error: it might wait for those that are gone


def _check(parallel: str, world: int, batch: int) -> None:
    if parallel not in WAYS:
        raise UserError(f"unknown way to train together '{parallel}': use --parallel ddp")
    if parallel == "fsdp":
        raise UserError(
            "--parallel fsdp is not there yet: use --parallel ddp, which holds the whole model on every device"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise UserError("--parallel needs PyTorch's gloo backend, which this PyTorch was built without")
    if not world:
        raise UserError(f"--parallel needs processes that torchrun started: {START}")
    if batch % world:
        raise UserError(f"a batch of {batch} rows cannot be dealt evenly to {world} ranks: choose another --batch-size")


def _device(asked: str) -> str:
    """The device of this rank, and that it is there."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if asked not in ("auto", "cuda"):
        raise UserError(f"with --parallel each rank takes a GPU of its own: use --device cuda or cpu, not {asked}")
    place, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= found:
        raise UserError(f"torchrun started rank {place} on this machine, but PyTorch finds {found} GPUs here")
    if not dist.is_nccl_available():
        raise UserError("--parallel on GPUs needs PyTorch's nccl backend, which this PyTorch was built without")
    torch.cuda.set_device(place)
    return f"cuda:{place}"


def _lost(error: RuntimeError) -> bool:
    """Whether `error` is that of a rank whose peer is gone, or does not answer."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        words in said for words in ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    )
