"""From tensors to kernel launches: strides, grids, configurations. Nothing here waits for the device.

Sizes, strides, horizons and offsets reach the kernels as run-time numbers; what compiles a kernel anew is the dtype,
the head dimension, the alignment of the strides, and which of memory, pieces and ALiBi there are.
"""

import contextlib
import functools
import math
import os

import torch
import triton
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


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return contextlib.nullcontext() if INTERPRETED else torch.cuda.device(device)


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension: itself, if it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """Batch, head and token strides of all tensors in units of as many elements, up to 16, as divide them all."""
    strides = [
        stride if size > 1 else 0 for x in tensors for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
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

    def _options(self, kernel: str, unit: int) -> tuple[dict[str, int | str], int, int]:
        config = choose(kernel, self.architecture, self.head_dim, self.q.dtype)
        options = {**self.constants, "UNIT": unit, "BM": config.bm, "BN": config.bn}
        options |= config.launch_options(self.architecture)
        return options, config.bm, config.bn

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, Hq, T, D) and lse (B, Hq, T)."""
        q, k, v = self.q, self.k, self.v
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if q.numel() == 0:
            return out, lse
        unit, strides = _strides(q, k, v, *self.memory)
        options, bm, _ = self._options("forward", unit)
        with _on(q.device):
            forward_kernel[(triton.cdiv(self.queries, bm) * self.batch * self.heads,)](
                q, k, v, *self.memory, *self.state, out, lse, *strides,
                self.piece_stride, self.heads, self.heads // self.kv_heads, self.scale * LOG2E,
                self.queries, self.tokens, self.capacity, *self.limits, **options,
            )  # fmt: skip
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        q, k, v, out, grad = self.q, self.k, self.v, out.contiguous(), _rows(grad)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if q.numel() == 0:
            return dq, dk.zero_(), dv.zero_()
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        group, scales = self.heads // self.kv_heads, (self.scale * LOG2E, self.scale)
        unit, strides = _strides(q, k, v, *self.memory, grad)
        options, bm, _ = self._options("dq", unit)
        with _on(q.device):
            dq_kernel[(triton.cdiv(self.queries, bm) * self.batch * self.heads,)](
                q, k, v, *self.memory, *self.state, grad, out, lse.contiguous(), delta, dq, *strides,
                self.piece_stride, self.heads, group, *scales,
                self.queries, self.tokens, self.capacity, *self.limits, **options,
            )  # fmt: skip
            options, _, bn = self._options("dkv", unit)
            del options["HAS_MEMORY"]  # nothing is computed for memory
            dkv_kernel[(triton.cdiv(self.tokens, bn) * self.batch * self.kv_heads,)](
                q, k, v, self.pieces, self.slopes, grad, lse.contiguous(), delta, dk, dv, *strides[:9], *strides[15:],
                self.piece_stride, self.kv_heads, group, *scales,
                self.queries, self.tokens, *self.limits, DETACH=self.detach, **options,
            )  # fmt: skip
        return dq, dk, dv
