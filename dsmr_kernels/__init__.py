"""Attention over a recurrent memory and the current segment, with a memory horizon for every call.

`memory_attention` reads a `KVMemory` and the current tokens together, `decode_attention` is its form for the newest
tokens alone, and `append_rotated` stores these before. Importing this package needs neither a GPU nor a driver nor
Triton.
"""

from dsmr_kernels.api import append_rotated, decode_attention, memory_attention
from dsmr_kernels.backends import available_backends
from dsmr_kernels.memory import KVMemory

__all__ = ["KVMemory", "append_rotated", "available_backends", "decode_attention", "memory_attention"]
__version__ = "0.1.0"
