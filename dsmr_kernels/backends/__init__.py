"""The backends, in order of preference, and the choice between them.

A backend is a module with `unsupported(q)`, `memory_attention` and, where it has one, `decode_attention`. Backends know
the contract, not each other. The Triton backend is imported only where Triton and something to run it on exist, and
serves a GPU unasked once it has agreed with the oracle there (`dsmr_kernels.trial`).
"""

import importlib.util
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from dsmr_kernels.backends import reference, sdpa

_ALWAYS: dict[str, ModuleType] = {"sdpa": sdpa, "reference": reference}
NAMES = ("triton", *_ALWAYS)
GPU = "cuda"  # what PyTorch calls AMD's, too
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# A graph takes what `choose` finds out for a constant: it is found out while Dynamo traces, and guarded by nothing.
_constant = torch.compiler.assume_constant_result
_disagreements: dict[str, str | None] = {}  # device -> what the trial of the Triton kernels there ended with


@_constant
def _why_no_triton() -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs it on CPU tensors, slowly)"
    return None


def _module(name: str) -> ModuleType:
    if name == "triton":
        from dsmr_kernels.backends import triton

        return triton
    return _ALWAYS[name]


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the fastest first."""
    return tuple(name for name in NAMES if name in _ALWAYS or _why_no_triton() is None)


@_constant
def _tried_out(device: str) -> bool:
    """Whether the Triton kernels agree with the oracle on a GPU: tried out once a process."""
    if device not in _disagreements:
        if torch.cuda.is_current_stream_capturing():
            return True  # nothing can be tried out here, and what is recorded stays
        from dsmr_kernels.trial import disagreement

        _disagreements[device] = reason = disagreement(torch.device(device))
        if reason is not None:
            warnings.warn(
                f"the Triton kernels fail on {device} and backend 'sdpa' serves in their place ({reason}); "
                "DSMR_BACKEND=sdpa chooses it without this trial",
                stacklevel=2,
            )
    return _disagreements[device] is None


def _unasked(q: Tensor) -> str:
    # In float32 the Triton kernels compute without matrix units, and a subclass of tensors may have no address.
    if q.device.type == GPU and q.dtype.itemsize == 2 and type(q) in (Tensor, torch.nn.Parameter):
        able = _why_no_triton() is None and _module("triton").unsupported(q) is None
        if able and _tried_out(str(q.device)):
            return "triton"
    return "sdpa" if sdpa.unsupported(q) is None else "reference"  # the definition serves everything


def choose(q: Tensor, backend: str | None) -> ModuleType:
    """The backend asked for by argument or by the environment variable `DSMR_BACKEND`, or else the fastest that serves.

    On a GPU, the first call that asks for none has the Triton kernels compile and compute a small example first, except
    in the capture of a CUDA graph.

    Raises:
        ValueError: if the one asked for does not exist or cannot serve inputs like `q`; the message says why.
    """
    asked = backend or os.environ.get("DSMR_BACKEND") or None
    if asked is None:
        return _module(_unasked(q))
    if asked not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {asked!r}")
    if asked == "triton" and (reason := _why_no_triton()):
        raise ValueError(f"backend {asked!r} cannot serve: {reason}")
    module = _module(asked)
    if reason := module.unsupported(q):
        raise ValueError(f"backend {asked!r} cannot serve these inputs: {reason}")
    return module
