"""What the C library does with memory that the program has freed: keeps it for the next who asks, or gives it back.

Only glibc is asked; elsewhere nothing happens, and what was asked for is told to be not done.
"""

import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST_FROM_HEAP = 2**25  # bytes: the most that glibc lets a threshold be
_NEVER = -1


def _glibc(name: str) -> Any:
    """One of its functions; None where there is none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except OSError:
        return None


def keep_freed_memory() -> bool:
    """Have this process keep the memory that a step frees, for the next step, which asks for the same again.

    Else tensors of more than a few hundred kilobytes go back to the system, which hands out pages anew, zeroed, one
    fault each, in every step. The peak stays what it is. `MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_` in the
    environment do the same.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST_FROM_HEAP)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> bool:
    """Give what is free to the system now, so that the resident size is what is in use."""
    trim = _glibc("malloc_trim")
    return trim is not None and bool(trim(ctypes.c_size_t(0)))
