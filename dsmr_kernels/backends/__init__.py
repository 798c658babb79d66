"""The backends, in order of preference, and the choice between them.

A backend is a module with `unsupported(q)`, `memory_attention` and `decode_attention`. Backends know the contract, not
each other.
"""

import os
from types import ModuleType

from torch import Tensor

from dsmr_kernels.backends import reference, sdpa

BACKENDS: dict[str, ModuleType] = {"sdpa": sdpa, "reference": reference}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation can run, the fastest first."""
    return tuple(BACKENDS)


def choose(q: Tensor, backend: str | None) -> ModuleType:
    """The backend asked for by argument or by the environment variable `DSMR_BACKEND`, or else the fastest that serves.

    Raises:
        ValueError: if the one asked for does not exist or cannot serve inputs like `q`; the message says why.
    """
    asked = backend or os.environ.get("DSMR_BACKEND") or None
    if asked is None:
        return next(module for module in BACKENDS.values() if module.unsupported(q) is None)
    if asked not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {asked!r}")
    if reason := BACKENDS[asked].unsupported(q):
        raise ValueError(f"backend {asked!r} cannot serve these inputs: {reason}")
    return BACKENDS[asked]
