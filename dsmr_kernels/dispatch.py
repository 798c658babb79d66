"""Which backend serves a call, and why not another.

A backend is a module with `unsupported(q, v_head_dim)`, `memory_attention`, `decode_attention` and
`append_rotated`. The Triton backend is imported only where Triton and something to run it on exist, and serves a GPU
unasked once it has agreed with the oracle there (`dsmr_kernels.trial`). Its tile sizes are those of its table, unless
the environment variable DSMR_TUNED names a file of measured ones, which is read when the Triton backend is first
chosen. With DSMR_HOPPER=1 it also tries its forwards with tensor descriptors, which serve once they agree, too.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dsmr_kernels import trial
from dsmr_kernels.backends import reference, sdpa

_Function = TypeVar("_Function", bound=Callable[..., Any])

_ALWAYS: dict[str, ModuleType] = {"sdpa": sdpa, "reference": reference}
NAMES = ("triton", *_ALWAYS)
GPU = "cuda"  # what PyTorch calls AMD's, too
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Device, class of head_dim, dtype and whether there is a bias -> what the trial of the Triton kernels there ended with.
_disagreements: dict[tuple[str, int, str, bool], str | None] = {}
# Device, head_dim and dtype -> likewise, of the forwards with tensor descriptors, where DSMR_HOPPER asks for them.
_hopper_disagreements: dict[tuple[str, int, str], str | None] = {}
_tiles_settled = False  # whether the Triton backend has been told which tile sizes to use


def _constant(function: _Function) -> _Function:
    """What `choose` finds out is a constant of a graph: found out while Dynamo traces, and guarded by nothing.

    This is `torch.compiler.assume_constant_result`, which would import Dynamo for it: as long again as PyTorch takes.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _why_no_triton() -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs it on CPU tensors, slowly)"
    return None


def _module(name: str) -> ModuleType:
    if name == "triton":
        from dsmr_kernels.backends import triton  # not above: importing it fails where Triton is missing

        return triton
    return _ALWAYS[name]


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the fastest first."""
    return tuple(name for name in NAMES if name in _ALWAYS or _why_no_triton() is None)


def use_tuned(
    path: str | os.PathLike[str] | None,
    *,
    architecture: str | None = None,
    fallback: bool = False,
    machine: dict[str, str] | None = None,
) -> None:
    """Use the configurations that `python -m dsmr_kernels.tools.tune` wrote to `path`; None: the table again, whatever
    the environment says.

    Args:
        path: the file.
        architecture: of the GPU that will run, as the table names it; default: whatever the file says.
        fallback: warn and use the table where the file cannot be used, rather than raise.
        machine: what the file must agree with, for tests; default: this machine.

    Raises:
        ValueError: in one sentence, if the file is missing, damaged or was made for something else.
    """
    global _tiles_settled
    from dsmr_kernels.backends.triton import configs, tuned  # not above: importing them fails where Triton is missing

    entries: dict[tuple[str, int, str], configs.Config] = {}
    if path is not None:
        try:
            entries = tuned.read(path, machine, architecture).entries
        except ValueError as error:
            if not fallback:
                raise
            warnings.warn(f"{error}; the fixed table is used", stacklevel=2)
    configs.use(entries)
    _tiles_settled = True


@_constant
def _settle_tiles(device: str) -> None:
    """Before the Triton kernels first run, read the file that DSMR_TUNED names, if it names one."""
    global _tiles_settled
    if _tiles_settled:
        return
    from dsmr_kernels.backends.triton.launch import architecture  # not above: it fails where Triton is missing

    path, part = os.environ.get("DSMR_TUNED"), architecture(torch.device(device))
    if path and part != "interpreter":  # which has no tiles to measure
        use_tuned(path, architecture=part, fallback=os.environ.get("DSMR_TUNED_FALLBACK") == "1")
    _tiles_settled = True


@_constant
def _tried_out(device: str, head_dim: int, dtype: str, biased: bool) -> bool:
    """Whether the Triton kernels agree with the oracle on a GPU, for a class of head_dim and a dtype, without a learned
    bias or with one: tried out once a process."""
    key = (device, head_dim, dtype, biased)
    if key not in _disagreements:
        if torch.cuda.is_current_stream_capturing():
            return True  # nothing can be tried out here, and what is recorded stays
        reason = trial.disagreement(torch.device(device), head_dim, getattr(torch, dtype), biased)
        _disagreements[key] = reason
        if reason is not None:
            warnings.warn(
                f"the Triton kernels fail on {device} at a head_dim of {head_dim} in {dtype}"
                f"{' with a bias by distance' if biased else ''} and backend 'sdpa' serves in their place "
                f"({reason}); DSMR_BACKEND=sdpa chooses it without this trial",
                stacklevel=2,
            )
    return _disagreements[key] is None


def _asks_for_hopper() -> bool:
    return os.environ.get("DSMR_HOPPER") == "1"


@_constant
def _settle_hopper(device: str, head_dim: int, v_head_dim: int, dtype: str) -> None:
    """With DSMR_HOPPER=1, have the forwards with tensor descriptors serve a head_dim and dtype on a Hopper GPU if they
    agree with the oracle there: tried out once a process. Where they do not, a warning says why, and nothing changes.
    """
    key = (device, head_dim, dtype)
    if key in _hopper_disagreements:
        return
    from dsmr_kernels.backends.triton import bulk  # not above: importing it fails where Triton is missing

    kind = getattr(torch, dtype)
    if head_dim not in bulk.HEAD_DIMS or v_head_dim != head_dim or kind not in bulk.DTYPES:
        return
    if (reason := bulk.available(torch.device(device))) is None:
        if torch.cuda.is_current_stream_capturing():
            return  # nothing can be tried out here
        with bulk.trying():
            reason = trial.disagreement(torch.device(device), head_dim, kind)
    _hopper_disagreements[key] = reason
    if reason is None:
        bulk.serving.add((device, head_dim, kind))
    else:
        warnings.warn(
            f"DSMR_HOPPER=1 asks for the forwards with tensor descriptors, which fail on {device} at a head_dim of "
            f"{head_dim} in {dtype}, and the other Triton kernels serve in their place ({reason})",
            stacklevel=2,
        )


def _unasked(q: Tensor, v_head_dim: int, biased: bool) -> str:
    # In float32 the Triton kernels compute without matrix units, and a subclass of tensors may have no address.
    suits = q.device.type == GPU and q.dtype.itemsize == 2 and type(q) in (Tensor, torch.nn.Parameter)
    if suits and _why_no_triton() is None and _module("triton").unsupported(q, v_head_dim) is None:
        device = str(q.device)
        _settle_tiles(device)  # before the trial: a file that cannot be used is no fault of the kernels
        if _tried_out(device, trial.class_of(_widest(q, v_head_dim)), str(q.dtype).removeprefix("torch."), biased):
            return "triton"
    return "sdpa" if sdpa.unsupported(q, v_head_dim) is None else "reference"  # the definition serves everything


def _widest(q: Tensor, v_head_dim: int) -> int:
    return v_head_dim if v_head_dim > q.shape[3] else q.shape[3]


def asked_for(backend: str | None) -> str | None:
    """The backend that is asked for by argument or environment."""
    return backend or os.environ.get("DSMR_BACKEND") or None


def choose(q: Tensor, backend: str | None, *, v_head_dim: int | None = None, biased: bool = False) -> ModuleType:
    """The backend asked for by argument or by the environment variable `DSMR_BACKEND`, or else the fastest that serves.

    `v_head_dim` is that of the values, if not q's; `biased`, whether a learned bias by distance takes part. On a GPU,
    the first call of a dtype and class of head_dim that asks for none has the Triton kernels compile and compute a
    small example first, and the first one with a bias another, except in the capture of a CUDA graph.

    Raises:
        ValueError: if the one asked for does not exist or cannot serve inputs like `q`, or if DSMR_TUNED names a file
            that cannot be used; the message says why.
    """
    asked = asked_for(backend)
    v_head_dim = q.shape[3] if v_head_dim is None else v_head_dim
    if asked is None:
        name = _unasked(q, v_head_dim, biased)
        if name == "triton" and _asks_for_hopper():
            _settle_hopper(str(q.device), q.shape[3], v_head_dim, str(q.dtype).removeprefix("torch."))
        return _module(name)
    if asked not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {asked!r}")
    if asked == "triton" and (reason := _why_no_triton()):
        raise ValueError(f"backend {asked!r} cannot serve: {reason}")
    module = _module(asked)
    if reason := module.unsupported(q, v_head_dim):
        raise ValueError(f"backend {asked!r} cannot serve these inputs: {reason}")
    if asked == "triton":
        _settle_tiles(str(q.device))
        if _asks_for_hopper():
            _settle_hopper(str(q.device), q.shape[3], v_head_dim, str(q.dtype).removeprefix("torch."))
    return module


class Choice(NamedTuple):
    """A backend that `choose` has chosen, for calls alike, and what that rests on besides what they have in common.

    Attributes:
        module: the backend.
        keeps: whether it is worth remembering: others than the Triton backend are found as quickly as this is checked.
        on_gpu: of a tensor; that it lies there shows that there is a GPU.
        trial: under which the trial that let the kernels serve unasked is found; None if they were asked for.
    """

    module: ModuleType
    keeps: bool
    on_gpu: bool
    trial: tuple[str, int, str, bool] | None

    @classmethod
    def of(cls, module: ModuleType, q: Tensor, asked: str | None, v_head_dim: int, biased: bool) -> "Choice":
        """What `choose` gave for q, where `asked` is `asked_for(...)`."""
        keeps = module is sys.modules.get("dsmr_kernels.backends.triton")
        tried = None
        if asked is None:
            dtype = str(q.dtype).removeprefix("torch.")
            tried = str(q.device), trial.class_of(_widest(q, v_head_dim)), dtype, biased
        if keeps and _asks_for_hopper() and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            keeps = False  # they have not been tried out yet, perhaps
        return cls(module, keeps, q.device.type == "cuda", tried)

    def stands(self) -> bool:
        """Whether `choose` would choose it again; False if that is to be asked."""
        if not (self.keeps and _tiles_settled):
            return False
        if self.trial is not None and _disagreements.get(self.trial, "none yet") is not None:
            return False
        return self.on_gpu or _why_no_triton() is None
