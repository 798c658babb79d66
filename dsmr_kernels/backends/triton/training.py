"""The training call: forward and backward of one `memory_attention`, as launches of their three kernels.

Sizes, strides, horizons and offsets reach the kernels as run-time numbers; what compiles a kernel anew is the dtype,
the head dimension, the alignment of the strides, and which of memory, pieces and ALiBi there are.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.triton.backward import dkv_kernel, dq_kernel
from dsmr_kernels.backends.triton.configs import choose, padded
from dsmr_kernels.backends.triton.forward import forward_kernel
from dsmr_kernels.backends.triton.launch import LOG2E, architecture, as_rows, common_strides, launch_kernel
from dsmr_kernels.spec import AttentionSpec, Gradients, Inputs, Needs


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
        self.q, self.k, self.v = as_rows(q), as_rows(k), as_rows(v)
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.tokens = k.shape[1], k.shape[2]
        self.capacity = memory.capacity if memory is not None else 0
        # A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read.
        has_memory = memory is not None and memory.k.numel() > 0
        if memory is not None and has_memory:
            k_side, v_side = memory.values(q.dtype)
            self.memory = (as_rows(k_side), as_rows(v_side))
            state = (memory.length.contiguous(), memory.position.contiguous())
        else:
            self.memory, state = (self.k, self.v), (q, q)
        piece_start, alibi = inputs.piece_start, inputs.alibi
        self.pieces = q if piece_start is None else as_rows(piece_start)
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
        self, kernel: Any, name: str, heads: int, unit: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...],
        constants: dict[str, Any],
    ) -> None:  # fmt: skip
        """Launch a program for every tile of `heads` heads: of queries, or for "dkv" of keys."""
        config = choose(name, self.architecture, self.head_dim, self.q.dtype)
        tokens, tile = (self.tokens, config.bn) if name == "dkv" else (self.queries, config.bm)
        grid, options = (-(-tokens // tile) * self.batch * heads, 1, 1), config.launch_options(self.architecture)
        constants = {**constants, "UNIT": unit, "BM": config.bm, "BN": config.bn}
        launch_kernel(kernel, grid, self.q.device, tensors, numbers, constants, options)

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, Hq, T, D) and lse (B, Hq, T)."""
        q, k, v = self.q, self.k, self.v
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if q.numel() == 0:
            return out, lse
        unit, strides = common_strides(q, k, v, *self.memory)
        numbers = (
            *strides, self.piece_stride, self.heads, self.group, self.scale * LOG2E,
            self.queries, self.tokens, self.capacity, *self.limits,
        )  # fmt: skip
        tensors = (q, k, v, *self.memory, *self.state, out, lse)
        self._start(forward_kernel, "forward", self.heads, unit, tensors, numbers, self.constants)
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, needs: Needs) -> Gradients:
        """The gradients of the call."""
        q, k, v, out, lse, grad = self.q, self.k, self.v, out.contiguous(), lse.contiguous(), as_rows(grad)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if q.numel() == 0:
            return Gradients(dq, dk.zero_(), dv.zero_())
        delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
        scales = (self.scale * LOG2E, self.scale)
        unit, strides = common_strides(q, k, v, *self.memory, grad)
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
        return Gradients(dq, dk, dv)
