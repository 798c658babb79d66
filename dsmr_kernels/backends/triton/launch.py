"""From tensors to kernel launches: strides, grids, configurations."""

import functools
import math
import os

import torch
import triton
from torch import Tensor

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.triton.backward import delta_kernel, dkv_kernel, dq_kernel
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


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Call:
    """What the launches of one call share."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, v, memory, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec
        piece_start, alibi = inputs.piece_start, inputs.alibi
        self.q, self.k, self.v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
        self.has_memory = memory is not None and memory.capacity > 0 and memory.batch > 0
        # A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read.
        self.mk, self.mv = (memory.k, memory.v) if memory is not None and self.has_memory else (self.k, self.v)
        self.length = memory.length if memory is not None and self.has_memory else self.q
        self.position = memory.position if memory is not None and self.has_memory else self.q
        self.capacity = self.mk.shape[2] if self.has_memory else 1
        self.spec = spec
        self.batch, self.heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.tokens = k.shape[1], k.shape[2]
        self.architecture = architecture(q.device)
        bd = padded(self.head_dim)
        self.constants = {
            "SLIDING": spec.visibility == "sliding",
            "HAS_MEMORY": self.has_memory,
            "HAS_PIECES": piece_start is not None,
            "HAS_ALIBI": alibi is not None,
            "WHOLE_DIM": bd == self.head_dim,
            "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "BD": bd,
        }
        length = spec.segment_length or 0
        self.sizes = (self.queries, self.tokens, self.capacity, spec.horizon, length, spec.segment_offset)
        self.key_sizes = (self.queries, self.tokens, spec.horizon, length, spec.segment_offset)
        self.pieces = self.q if piece_start is None else piece_start
        self.piece_stride = 0 if piece_start is None else piece_start.stride(0)
        self.slopes = self.q if alibi is None else alibi

    def launch_options(self, kernel: str) -> tuple[dict[str, int | str], int, int]:
        config = choose(kernel, self.architecture, self.head_dim, self.q.dtype)
        options = {**self.constants, "BM": config.bm, "BN": config.bn}
        options |= {"num_warps": config.warps, "num_stages": config.stages}
        return options, config.bm, config.bn

    def forward(self) -> tuple[Tensor, Tensor]:
        """out (B, Hq, T, D) and lse (B, Hq, T)."""
        q, k, v = self.q, self.k, self.v
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        if q.numel() == 0:
            return out, lse
        options, bm, _ = self.launch_options("forward")
        forward_kernel[(triton.cdiv(self.queries, bm), self.batch * self.heads)](
            q, k, v, self.mk, self.mv, self.length, self.position, self.pieces, self.slopes, out, lse,
            *_strides(q), *_strides(k), *_strides(v), *_strides(self.mk), *_strides(self.mv), *_strides(out),
            self.piece_stride, self.heads, self.heads // self.kv_heads, self.head_dim, self.spec.scale * LOG2E,
            *self.sizes, **options,
        )  # fmt: skip
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv."""
        q, k, v, grad = self.q, self.k, self.v, _last_contiguous(grad)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        if k.numel() == 0:
            return dq, dk, dv
        if q.numel() == 0:
            return dq, dk.zero_(), dv.zero_()
        group, scale = self.heads // self.kv_heads, self.spec.scale
        delta = torch.empty_like(lse)
        delta_kernel[(triton.cdiv(self.queries, 32), self.batch * self.heads)](
            out, grad, delta, *_strides(out), *_strides(grad), self.heads, self.head_dim, self.queries,
            WHOLE_DIM=self.constants["WHOLE_DIM"], BM=32, BD=self.constants["BD"],
        )  # fmt: skip
        options, bm, _ = self.launch_options("dq")
        dq_kernel[(triton.cdiv(self.queries, bm), self.batch * self.heads)](
            q, k, v, self.mk, self.mv, self.length, self.position, self.pieces, self.slopes, grad, lse, delta, dq,
            *_strides(q), *_strides(k), *_strides(v), *_strides(self.mk), *_strides(self.mv), *_strides(grad),
            *_strides(dq), self.piece_stride, self.heads, group, self.head_dim, scale * LOG2E, scale,
            *self.sizes, **options,
        )  # fmt: skip
        options, _, bn = self.launch_options("dkv")
        del options["HAS_MEMORY"]  # nothing is computed for memory
        dkv_kernel[(triton.cdiv(self.tokens, bn), self.batch * self.kv_heads)](
            q, k, v, self.pieces, self.slopes, grad, lse, delta, dk, dv,
            *_strides(q), *_strides(k), *_strides(v), *_strides(grad), *_strides(dk),
            self.piece_stride, self.kv_heads, group, self.head_dim, scale * LOG2E, scale,
            *self.key_sizes, DETACH=self.spec.detach_segments, **options,
        )  # fmt: skip
        return dq, dk, dv
