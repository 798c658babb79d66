"""Where a program computes and in which precision: turns "auto" into what this machine does fast."""

import contextlib
import os

import torch

from dsmr.console.errors import UserError
from dsmr.console.rounding import RoundedProducts
from dsmr_kernels.backends.sdpa.processor import instruction_set, multiplies_bfloat16

DEVICES = ("auto", "cpu", "cuda", "cuda:N")
DTYPES = ("auto", "float32", "bfloat16")
FAST = ("AMX", "AVX-512 BF16")  # instruction sets with which a step in bfloat16 was seen to be faster than in float32


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU if there is one. `UserError` for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}': use one of {', '.join(DEVICES)}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device '{name}': use one of {', '.join(DEVICES)}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' was asked for, but PyTorch finds no GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}' was asked for, but the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return device


def gpu_names() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them, to be given to processes that it starts."""
    found = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(found)))
    return [name.strip() for name in named.split(",")][:found]


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware, rather than by converting them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and instruction_set() in FAST


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute (and remember) in: "auto" is bfloat16 where the hardware has it, else float32."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def resolve_memory_dtype(name: str, computing: torch.dtype) -> torch.dtype:
    """The dtype to remember in: "auto" is the one that is computed in, int8 halves the bytes of bfloat16."""
    named = {"auto": computing, "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if name not in named:
        raise UserError(f"unknown memory dtype '{name}': use one of {', '.join(named)}")
    return named[name]


def autocast(
    device: torch.device, dtype: torch.dtype, *, cached: bool = True
) -> contextlib.AbstractContextManager[object]:
    """A context in which matrix products run in `dtype`; nothing changes for float32. With `cached` it holds each
    weight in `dtype` until it ends, in case that it is used again. A processor without such products computes those of
    linear layers in float32, and rounds."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    narrow = torch.autocast(device.type, dtype=dtype, cache_enabled=cached)
    return narrow if device.type != "cpu" or multiplies_bfloat16() else RoundedProducts(narrow)
