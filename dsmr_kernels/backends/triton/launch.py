"""From tensors to launches, for all kernels: devices, strides, compiled code. Nothing here waits for the device."""

import contextlib
import functools
import math
import os
from typing import Any

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> str:
    """The name under which `configs` knows a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_NOWHERE = contextlib.nullcontext()


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return _NOWHERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


# What `launch_kernel` was asked for -> the kernel that Triton compiled for it, and its constants in their order.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


@functools.cache
def _specialised(kernel: Any, tensors: int) -> tuple[list[int], list[int]]:
    """Which of a kernel's tensors have it compiled anew if they are not aligned, and which of its numbers behind them
    if they are 1 or a multiple of 16."""
    watched = [i for i, p in enumerate(kernel.params) if not (p.is_constexpr or p.do_not_specialize)]
    return [i for i in watched if i < tensors], [i - tensors for i in watched if i >= tensors]


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    device: torch.device,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """Launch a kernel, whose arguments are tensors, then numbers, then constants.

    At every launch Triton works out from the arguments which compiled kernel they ask for, and that takes several times
    as long as to launch it. Here arguments that can only ask for what was compiled before find it in a dictionary. What
    Triton's own knobs (debugging, instrumentation, hooks) have changed since then goes unseen.
    """
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, **constants, **options)
        return
    key: tuple[Any, ...] | None = None
    aligned, special = _specialised(kernel, len(tensors))
    addresses = 0
    for i in aligned:
        addresses |= tensors[i].data_ptr()
    # Rare, and left to Triton: a tensor that is not aligned, a number of more than 32 bits, on AMD's parts 2 GiB.
    large = torch.version.hip is not None and any(x.untyped_storage().nbytes() >> 31 for x in tensors)
    if not (addresses & 15 or large) and max(numbers) < 1 << 31 and min(numbers) >= -1 << 31:
        values = [(numbers[i] == 1, numbers[i] % 16 == 0) for i in special]
        key = (id(kernel), device, *[x.dtype for x in tensors], *constants.values(), *options.values(), *values)
    with _on(device):
        if key is not None and (found := _compiled.get(key)):
            found[0][grid](*tensors, *numbers, *found[1])
            return
        compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    if key is not None and compiled is not None:
        compiled = compiled.result() if hasattr(compiled, "result") else compiled  # it may compile in the background
        _compiled[key] = compiled, [constants[p.name] for p in kernel.params if p.is_constexpr]


def as_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension: itself, if it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(*tensors: Tensor, axes: int = 3) -> list[int]:
    """Of the first `axes` dimensions of all tensors: batch, head and token."""
    return [stride for x in tensors for stride in x.stride()[:axes]]


def common_strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """The same in units of as many elements, up to 16, as divide them all."""
    found = strides(*tensors)
    unit = math.gcd(16, *found)
    if unit < 16:  # what a dimension of size 1 has for a stride is of no account
        sizes = [size for x in tensors for size in x.shape[:3]]
        found = [stride if size > 1 else 0 for size, stride in zip(sizes, found, strict=True)]
        unit = math.gcd(16, *found)
    return unit, [stride // unit for stride in found]
