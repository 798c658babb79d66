"""The backends, in order of preference, and the choice between them.

A backend is a module with `unsupported(q)`, `memory_attention` and, where it has one, `decode_attention`. Backends know
the contract, not each other. The Triton backend is imported only where Triton and something to run it on exist, and
serves a GPU unasked once it has agreed with the oracle there.
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
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # here, since Dynamo refuses to trace a search


_loaded: dict[str, ModuleType | str] = {}  # no functools.cache: Dynamo warns of it and looks through it


def _triton() -> ModuleType | str:
    """The Triton backend, or why there is none."""
    if "triton" not in _loaded:
        _loaded["triton"] = _load_triton()
    return _loaded["triton"]


def _load_triton() -> ModuleType | str:
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs it on CPU tensors, slowly)"
    from dsmr_kernels.backends import triton

    return triton


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the fastest first."""
    return tuple(name for name in NAMES if name in _ALWAYS or not isinstance(_triton(), str))


_disagreements: dict[torch.device, str | None] = {}


def _trusted(q: Tensor) -> bool:
    """Whether the Triton kernels serve `q` unasked. What they can do is tried out on each GPU, once a process.

    In float32 they compute exactly, without matrix units, and the library's products are faster.
    """
    module = _triton()
    if q.dtype.itemsize != 2 or isinstance(module, str) or module.unsupported(q) is not None:
        return False
    if q.device not in _disagreements:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return True  # nothing can be tried out here, and what is recorded stays
        from dsmr_kernels.backends.triton.check import disagreement

        _disagreements[q.device] = reason = disagreement(q.device)
        if reason is not None:
            warnings.warn(
                f"the Triton kernels fail on {q.device} and backend 'sdpa' serves in their place ({reason}); "
                "DSMR_BACKEND=sdpa chooses it without this check",
                stacklevel=2,
            )
    return _disagreements[q.device] is None


def choose(q: Tensor, backend: str | None) -> ModuleType:
    """The backend asked for by argument or by the environment variable `DSMR_BACKEND`, or else the fastest that serves.

    On a GPU, the first call that asks for none has the Triton kernels compile and compute a small example first.

    Raises:
        ValueError: if the one asked for does not exist or cannot serve inputs like `q`; the message says why.
    """
    asked = backend or os.environ.get("DSMR_BACKEND") or None
    if asked is None:
        if q.device.type == GPU and _trusted(q):
            return _triton()  # type: ignore[return-value]
        return sdpa if sdpa.unsupported(q) is None else reference  # the definition serves everything
    if asked not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {asked!r}")
    module = _ALWAYS[asked] if asked in _ALWAYS else _triton()
    if isinstance(module, str):
        raise ValueError(f"backend {asked!r} cannot serve: {module}")
    if reason := module.unsupported(q):
        raise ValueError(f"backend {asked!r} cannot serve these inputs: {reason}")
    return module
