"""Attention over a recurrent memory and the current segment, with a memory horizon for every call.

`memory_attention` reads a `KVMemory` and the current tokens together, `decode_attention` is its form for the newest
tokens alone, and `append_rotated` stores these before. Importing this package needs neither a GPU nor a driver nor
Triton.
"""

import sys

from dsmr_kernels.api import append_rotated, decode_attention, memory_attention
from dsmr_kernels.dispatch import available_backends
from dsmr_kernels.memory import KVMemory, MemorySnapshot

__all__ = [
    "KVMemory",
    "MemorySnapshot",
    "append_rotated",
    "available_backends",
    "decode_attention",
    "memory_attention",
]
__version__ = "0.1.0"

_MOVED = dict.fromkeys(("aot", "targets", "tune"), "tools")
_MOVED |= dict.fromkeys(("cost", "ceilings", "predict", "prediction_check", "timing"), "costing")


class _Moved:
    """Asked by Python when nothing else has found a module: says where those went that have moved to a room."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == f"{__name__}.backends.spec":
            raise ModuleNotFoundError(f"{name} is now {__name__}.spec", name=name)
        package, _, module = name.rpartition(".")
        if package == __name__ and module in _MOVED:
            raise ModuleNotFoundError(f"{name} is now {package}.{_MOVED[module]}.{module}", name=name)


sys.meta_path.append(_Moved)
