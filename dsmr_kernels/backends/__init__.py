"""The backends, in order of preference, and the choice between them.

A backend is a module with `unsupported(q)`, `memory_attention` and, where it has one, `decode_attention`. Backends know
the contract, not each other. The Triton backend is imported only where Triton and something to run it on exist.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from dsmr_kernels.backends import reference, sdpa

_ALWAYS: dict[str, ModuleType] = {"sdpa": sdpa, "reference": reference}
NAMES = ("triton", *_ALWAYS)
# What is chosen unasked. The Triton kernels are tested on CPU only, through Triton's interpreter: until their tests
# have passed on a GPU they serve those who ask for them.
UNASKED = ("sdpa",)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # here, since Dynamo refuses to trace a search


@functools.cache
def _triton() -> ModuleType | str:
    """The Triton backend, or why there is none."""
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (TRITON_INTERPRET=1, set before Python starts, runs it on CPU tensors, slowly)"
    from dsmr_kernels.backends import triton

    return triton


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the fastest first."""
    return tuple(name for name in NAMES if name in _ALWAYS or not isinstance(_triton(), str))


def choose(q: Tensor, backend: str | None) -> ModuleType:
    """The backend asked for by argument or by the environment variable `DSMR_BACKEND`, or else the fastest that serves.

    Raises:
        ValueError: if the one asked for does not exist or cannot serve inputs like `q`; the message says why.
    """
    asked = backend or os.environ.get("DSMR_BACKEND") or None
    if asked is None:
        for name in UNASKED:
            if _ALWAYS[name].unsupported(q) is None:
                return _ALWAYS[name]
        return reference  # the definition serves everything
    if asked not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {asked!r}")
    module = _ALWAYS[asked] if asked in _ALWAYS else _triton()
    if isinstance(module, str):
        raise ValueError(f"backend {asked!r} cannot serve: {module}")
    if reason := module.unsupported(q):
        raise ValueError(f"backend {asked!r} cannot serve these inputs: {reason}")
    return module
