"""The way to the forwards whose loads are tensor descriptors: which calls they serve, their tiles, and their launch.

They serve a call only while `serving` says so, which nothing does unasked: see `dsmr_kernels.dispatch` and DSMR_HOPPER.
Nothing here imports Gluon, which not every Triton has, before a kernel is launched.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.triton.launch import INTERPRETED, LOG2E, architecture, in_units, on, processors
from dsmr_kernels.spec import Inputs

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """A launch of a forward with descriptors.

    `consumers` of 64 queries each, and one producer, in Gluon; 0 is Triton's own language, whose tile has 128 queries
    and eight warps, the loop over the memory `specialised` by the compiler or not. `bn` keys a block, `stages` of them.
    """

    consumers: int
    bn: int
    stages: int
    overlap: bool = False
    pingpong: bool = False
    specialised: bool = False
    head_dims: tuple[int, ...] = HEAD_DIMS

    @property
    def bm(self) -> int:
        return 64 * self.consumers or (16 if INTERPRETED else 128)


# Measured on an H100 (benchmarks/results/hopper-forward.md): the fastest at 64, and at 128 beside the overlapped one.
TABLE = dict.fromkeys(HEAD_DIMS, Tile(2, 128, 2, pingpong=True))
CANDIDATES = {
    "2 consumers": Tile(2, 128, 2),
    "2 consumers, in turns": Tile(2, 128, 2, pingpong=True),
    "2 consumers, in turns, 3 stages": Tile(2, 128, 3, pingpong=True),
    "2 consumers, overlapped": Tile(2, 128, 2, overlap=True),
    "2 consumers, overlapped, in turns": Tile(2, 128, 2, overlap=True, pingpong=True),
    "2 consumers, overlapped, in turns, 3 stages": Tile(2, 128, 3, overlap=True, pingpong=True),
    "2 consumers, overlapped, 3 stages": Tile(2, 128, 3, overlap=True),
    "2 consumers, overlapped, 64 keys, 4 stages": Tile(2, 64, 4, overlap=True),
    "3 consumers": Tile(3, 128, 2, head_dims=(64,)),
    "3 consumers, overlapped, 64 keys, 4 stages": Tile(3, 64, 4, overlap=True),
    "descriptors": Tile(0, 64, 3),
    "descriptors, 128 keys": Tile(0, 128, 2),
    "descriptors, specialised": Tile(0, 128, 2, specialised=True),
}

# (device, head_dim, dtype) that the dispatcher has let them serve.
serving: set[tuple[str, int, torch.dtype]] = set()
_trying: list[Tile | None] = []  # inside `trying`: the tile, None for the table's


@contextlib.contextmanager
def trying(tile: Tile | None = None) -> Iterator[None]:
    """Inside the block serve every call that can be served, of however small a grid: for the trial and benchmarks."""
    _trying.append(tile)
    try:
        yield
    finally:
        _trying.pop()


def _strides_fit(x: Tensor) -> bool:
    """Whether a descriptor may point at a tensor: 16 bytes' alignment of its start and of every row."""
    rows = all(
        stride > 0 and stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1
    )
    return rows and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def unsupported(inputs: Inputs) -> str | None:
    """Why these kernels leave a call to the others; None if they can compute it."""
    q, k, v, memory, spec = inputs.q, inputs.k, inputs.v, inputs.memory, inputs.spec
    if q.dtype not in DTYPES:
        return f"they compute in float16 and bfloat16, not in {q.dtype}"
    if q.shape[3] not in HEAD_DIMS or v.shape[3] != q.shape[3]:
        return f"they serve a head_dim of 64 or 128, of values as of keys, not {q.shape[3]} and {v.shape[3]}"
    if spec.visibility != "segment":
        return f"they serve visibility by segment, not {spec.visibility!r}"
    others = (inputs.piece_start, inputs.alibi, inputs.offsets, inputs.bias)
    if any(x is not None for x in others):
        return "they know no pieces, ALiBi, bias or offsets of rows"
    tensors = [k, v]
    if memory is not None and memory.k.numel() > 0:
        if memory.k_scale is not None or memory.k.dtype != q.dtype or memory.v.dtype != q.dtype:
            return "they read a memory in the dtype of the call alone"
        tensors += [memory.k, memory.v]
    if not all(_strides_fit(x) for x in tensors):
        return "keys and values must begin, and each row of them, at multiples of 16 bytes"
    return None


def asked_for() -> bool:
    """Whether these kernels may be to serve any call."""
    return bool(serving or _trying)


def tile_for(inputs: Inputs) -> Tile | None:
    """The tile with which these kernels compute a call that they are to serve; None leaves it to the others."""
    if not asked_for():
        return None
    q = inputs.q
    if _trying:
        return (_trying[-1] or TABLE[q.shape[3]]) if unsupported(inputs) is None else None
    if (str(q.device), q.shape[3], q.dtype) not in serving or unsupported(inputs) is not None:
        return None
    tile = TABLE[q.shape[3]]
    programs = q.shape[0] * q.shape[1] * -(-q.shape[2] // tile.bm)
    return tile if programs >= processors(q.device) else None  # smaller grids share tiles (`splits`), these do not


@functools.cache
def available(device: torch.device) -> str | None:
    """Why a device or this Triton cannot run these kernels at all; None if they can."""
    part = architecture(device)
    if not part.startswith("sm_9"):
        return f"they are for compute capability 9.x, this is {part}"
    try:
        import triton.experimental.gluon.language.nvidia.hopper  # noqa: F401
    except ImportError as error:
        return f"this Triton lacks what they are written in ({error})"
    return None


def _descriptor(x: Tensor, tile: Tile) -> Any:
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    shape, block = list(x.shape), [1, 1, tile.bn, x.shape[3]]
    if not tile.consumers:
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(x, shape, [*strides, 1], block)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)  # a size of elements is what counts
    return hopper.TensorDescriptor(x, shape, [*strides, 1], block, layout)


def forward(inputs: Inputs, tile: Tile, limits: tuple[int, int, int], out: Tensor, lse: Tensor) -> None:
    """Write out (B, Hq, T, head_dim) and lse (B, Hq, T), contiguous, of a call that is not `unsupported`; `limits` are
    horizon, segment length and offset as of `training.bounded`."""
    q, k, memory = inputs.q, inputs.k, inputs.memory
    ring = (k, inputs.v, q, q) if memory is None or memory.k.numel() == 0 else (
        memory.k, memory.v, memory.length.contiguous(), memory.position.contiguous())  # fmt: skip
    has_memory = ring[2] is not q
    unit, strides = in_units([q.shape], [q.stride()])
    numbers = (
        *strides, q.shape[1], q.shape[1] // k.shape[1], inputs.spec.scale * LOG2E, q.shape[2], k.shape[2],
        ring[0].shape[2] if has_memory else 0, *limits,
    )  # fmt: skip
    grid = (q.shape[0] * q.shape[1] * -(-q.shape[2] // tile.bm), 1, 1)
    described = [_descriptor(x, tile) for x in (k, inputs.v, ring[0], ring[1])]
    constants: dict[str, Any] = {"UNIT": unit, "HAS_MEMORY": has_memory, "BN": tile.bn}
    kernel: Any
    if tile.consumers:
        from dsmr_kernels.backends.triton.hopper import hopper_kernel as kernel

        constants |= {"D": q.shape[3], "STAGES": tile.stages, "CONSUMERS": tile.consumers}
        constants |= {"OVERLAP": tile.overlap, "PINGPONG": tile.pingpong, "num_warps": 4}
    else:
        from dsmr_kernels.backends.triton.descriptors import descriptor_kernel as kernel

        constants |= {"HEAD_DIM": q.shape[3], "BM": tile.bm, "SPECIALISED": tile.specialised}
        constants |= {"num_warps": 8, "num_stages": tile.stages}
    with on(q.device):
        kernel[grid](q, *described, *ring[2:], out, lse, *numbers, **constants)
