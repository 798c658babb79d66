"""From tensors to kernel launches: strides, grids, configurations. Nothing here waits for the device.

Sizes, strides, horizons and offsets reach the kernels as run-time numbers; what compiles a kernel anew is the dtype,
the head dimension, the alignment of the strides, and which of memory, pieces and ALiBi there are.
"""

import contextlib
import functools
import math
import os
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.backends.triton.backward import dkv_kernel, dq_kernel
from dsmr_kernels.backends.triton.configs import choose, padded
from dsmr_kernels.backends.triton.forward import forward_kernel

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


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension: itself, if it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Batch, head and token strides of all tensors in units of as many elements, up to 16, as divide them all."""
    strides = [stride for x in tensors for stride in x.stride()[:3]]
    unit = math.gcd(16, *strides)
    if unit < 16:  # what a dimension of size 1 has for a stride is of no account
        sizes = [size for x in tensors for size in x.shape[:3]]
        strides = [stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]
        unit = math.gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


def bounded(spec: AttentionSpec, tokens: int, capacity: int) -> tuple[int, int, int]:
    """Horizon, segment length (0 = one segment) and offset as the kernels count them, in 32 bits.

    None of them is larger than the tokens of call and memory together: beyond that they make no difference.
    """
    most = tokens + capacity
    horizon, length, offset = min(spec.horizon, most), spec.segment_length, spec.segment_offset
    if length is None or length - offset >= tokens:
        return horizon, 0, min(offset, capacity)
    if length > most:
        length, offset = most, offset - (length - most)
    return horizon, length, offset


class Call:
    """What the launches of one call share."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, v, memory, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec
        self.q, self.k, self.v = _rows(q), _rows(k), _rows(v)
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.tokens = k.shape[1], k.shape[2]
        self.capacity = memory.capacity if memory is not None else 0
        # A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read.
        has_memory = memory is not None and memory.k.numel() > 0
        if memory is not None and has_memory:
            self.memory = (_rows(memory.k), _rows(memory.v))
            state = (memory.length.contiguous(), memory.position.contiguous())
        else:
            self.memory, state = (self.k, self.v), (q, q)
        piece_start, alibi = inputs.piece_start, inputs.alibi
        self.pieces = q if piece_start is None else _rows(piece_start)
        self.piece_stride = 0 if piece_start is None else self.pieces.stride(0)
        self.slopes = q if alibi is None else alibi.contiguous()
        self.state = (*state, self.pieces, self.slopes)
        self.group = self.heads // self.kv_heads
        self.scale, self.detach = spec.scale, spec.detach_segments
        self.limits = bounded(spec, self.tokens, self.capacity)
        self.architecture = architecture(q.device)
        self.constants = {
            "SLIDING": spec.visibility == "sliding",
            "HAS_MEMORY": has_memory,
            "HAS_PIECES": piece_start is not None,
            "HAS_ALIBI": alibi is not None,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "HEAD_DIM": self.head_dim,
            "BD": padded(self.head_dim),
        }

    def _start(
        self,
        kernel: Any,
        name: str,
        heads: int,
        unit: int,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
    ) -> None:
        """Launch a program for every tile of `heads` heads: of queries, or for "dkv" of keys."""
        config = choose(name, self.architecture, self.head_dim, self.q.dtype)
        tokens, tile = (self.tokens, config.bn) if name == "dkv" else (self.queries, config.bm)
        launch_kernel(
            kernel,
            (-(-tokens // tile) * self.batch * heads, 1, 1),
            self.q.device,
            tensors,
            numbers,
            {**constants, "UNIT": unit, "BM": config.bm, "BN": config.bn},
            config.launch_options(self.architecture),
        )

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, Hq, T, D) and lse (B, Hq, T)."""
        q, k, v = self.q, self.k, self.v
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if q.numel() == 0:
            return out, lse
        unit, strides = _strides(q, k, v, *self.memory)
        numbers = (
            *strides, self.piece_stride, self.heads, self.group, self.scale * LOG2E,
            self.queries, self.tokens, self.capacity, *self.limits,
        )  # fmt: skip
        tensors = (q, k, v, *self.memory, *self.state, out, lse)
        self._start(forward_kernel, "forward", self.heads, unit, tensors, numbers, self.constants)
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        q, k, v, out, lse, grad = self.q, self.k, self.v, out.contiguous(), lse.contiguous(), _rows(grad)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if q.numel() == 0:
            return dq, dk.zero_(), dv.zero_()
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        scales = (self.scale * LOG2E, self.scale)
        unit, strides = _strides(q, k, v, *self.memory, grad)
        numbers = (
            *strides, self.piece_stride, self.heads, self.group, *scales,
            self.queries, self.tokens, self.capacity, *self.limits,
        )  # fmt: skip
        tensors = (q, k, v, *self.memory, *self.state, grad, out, lse, delta, dq)
        self._start(dq_kernel, "dq", self.heads, unit, tensors, numbers, self.constants)
        # Nothing is computed for memory.
        numbers = (
            *strides[:9], *strides[15:], self.piece_stride, self.kv_heads, self.group, *scales,
            self.queries, self.tokens, *self.limits,
        )  # fmt: skip
        constants = {name: value for name, value in self.constants.items() if name != "HAS_MEMORY"}
        own = (q, k, v, self.pieces, self.slopes, grad, lse, delta, dk, dv)
        self._start(dkv_kernel, "dkv", self.kv_heads, unit, own, numbers, {**constants, "DETACH": self.detach})
        return dq, dk, dv
