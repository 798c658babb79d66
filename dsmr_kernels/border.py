"""What the public calls refuse, and the sentence that says so: the argument, what was expected, what came.

Values of tensors are looked at on a CPU only, since looking makes a GPU wait; `DSMR_CHECK=1` in the environment has
them looked at everywhere.
"""

import math

import torch
from torch import Tensor

from dsmr_kernels.holding import INFERENCE, may_look
from dsmr_kernels.memory import KVMemory, MemorySnapshot
from dsmr_kernels.ring import Ring


def shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension: itself if it has one. Kernels, PyTorch's private ones too, count on it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def check_tensor(name: str, tensor: Tensor, q: Tensor) -> None:
    """The rules for keys and values: dtype and device of q."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    check_device(name, tensor, q)


def check_table(
    name: str, x: object, q: Tensor, dtype: torch.dtype | None, expected: tuple[int, ...], said: str
) -> None:
    """The rules for a tensor beside these: what was `said` of it; any floating dtype, if `dtype` is None."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be {said}, got {x!r}")
    if tuple(x.shape) != expected or (x.dtype != dtype if dtype else not x.dtype.is_floating_point):
        raise ValueError(f"{name} must be {said}, got {x.dtype} of shape {shape(x)}")
    check_device(name, x, q)


def check_query(q: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape (batch, heads, tokens, head_dim), got {shape(q)}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q must be of a floating dtype, got {q.dtype}")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q must have at least one head and a head_dim of at least 1, got shape {shape(q)}")


def check_heads(q: Tensor, kv_heads: int) -> None:
    if kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the KV heads, got {kv_heads} KV heads")


def check_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Keys and values of a call that has queries q."""
    check_tensor("k", k, q)
    check_tensor("v", v, q)
    batch, _, queries, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(f"k must have shape (batch, kv_heads, S, head_dim) = ({batch}, Hkv, S, {dim}), got {shape(k)}")
    if v.dim() != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] < 1:
        raise ValueError(
            f"v must have the shape of k, {shape(k)}, save for a head_dim of its own of at least 1, got {shape(v)}"
        )
    check_heads(q, k.shape[1])
    if k.shape[2] < queries:
        raise ValueError(f"k must hold at least the {queries} tokens of q, got {k.shape[2]}")


def check_memory(memory: Ring, q: Tensor, kv_heads: int, v_head_dim: int | None, any_dtype: bool = False) -> None:
    """That a memory, which anyone may put together, fits q, KV heads and values, and its parts one another."""
    if not isinstance(memory, (KVMemory, MemorySnapshot)):
        raise TypeError(f"memory must be a KVMemory or a snapshot of one, got {type(memory).__name__}")
    for name, tensor in (("memory.k", memory.k), ("memory.v", memory.v)):
        if any_dtype or memory.dtype == torch.int8:
            check_device(name, tensor, q)
        else:
            check_tensor(name, tensor, q)
    found = (memory.batch, memory.kv_heads, memory.head_dim)
    expected = (q.shape[0], kv_heads, q.shape[3])
    if found != expected:
        raise ValueError(f"memory must have (batch, kv_heads, head_dim) = {expected} to fit q and k, got {found}")
    values = (*memory.k.shape[:3], memory.v_head_dim if v_head_dim is None else v_head_dim)
    if tuple(memory.v.shape) != values:
        raise ValueError(f"memory.v must have shape {values} to fit memory.k and v, got {shape(memory.v)}")
    for name, tensor, dtype in (("length", memory.length, torch.int32), ("position", memory.position, torch.int64)):
        if tensor.dtype != dtype or tensor.shape != q.shape[:1] or tensor.device != q.device:
            raise ValueError(
                f"memory.{name} must be {dtype} of shape ({q.shape[0]},) on {q.device}, "
                f"got {tensor.dtype} of shape {shape(tensor)} on {tensor.device}"
            )
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and memory.k.is_inference():
        raise ValueError(f"memory {INFERENCE}")
    if (memory.dtype == torch.int8) != (memory.k_scale is not None and memory.v_scale is not None):
        raise ValueError("memory must have k_scale and v_scale exactly where it is int8")


def check_set(memory: Ring, horizon: int | None, by_age: bool) -> None:
    """What a memory that keeps others than the newest tokens cannot serve: it does not know how old a slot is."""
    if by_age:
        raise ValueError(
            f"a memory with retention {memory.retention!r} does not know how old its slots are: it serves no sliding "
            "visibility, no ALiBi, no bias by distance and no limit on what is visible"
        )
    if horizon is not None and horizon < memory.kept:
        raise ValueError(
            f"horizon must be at least the {memory.kept} tokens that a memory with retention {memory.retention!r} "
            f"keeps, all of which are seen, got {horizon}"
        )


def check_one_segment(memory: Ring, k: Tensor, segment_length: int | None, segment_offset: int | Tensor) -> None:
    """That a call behind a set lies in one segment: what the next one sees is only known when the first is over."""
    if segment_length is None or (isinstance(segment_offset, Tensor) and not may_look(segment_offset)):
        return
    if isinstance(segment_offset, Tensor):
        segment_offset = int(segment_offset.max()) if segment_offset.numel() else 0
    if segment_offset + k.shape[2] > segment_length:
        raise ValueError(
            f"a call behind a memory with retention {memory.retention!r} must lie in one segment, but {k.shape[2]} "
            f"tokens from token {segment_offset} of a segment of {segment_length} on do not: call it segment by segment"
        )


def check_place(memory: Ring, horizon: int, segment_offset: int | Tensor) -> None:
    """That a call sees all of a set and the tokens of the segment in progress, which stand beside it."""
    if not memory.room or isinstance(memory.seen, Tensor) or isinstance(segment_offset, Tensor):
        return
    begun = memory.seen % memory.room
    if horizon + segment_offset < memory.kept + begun:
        raise ValueError(
            f"a memory with retention {memory.retention!r} keeps {memory.kept} tokens and holds {begun} of the segment "
            f"in progress, not all of which a horizon of {horizon} sees from token {segment_offset} of a segment: give "
            f"segment_offset={begun}"
        )


def check_room(memory: Ring, new: int = 0) -> None:
    """That a set can take `new` tokens that see one another before any of them has to give way."""
    left = memory.room
    if new and left and isinstance(memory.seen, int):
        left -= memory.seen % memory.room
    if left < max(new, 1):
        raise ValueError(
            f"a memory with retention {memory.retention!r} has room for {left} more tokens of the segment in progress, "
            f"but {max(new, 1)} are to be seen: make it with room=..., and step within a segment"
        )


def check_alibi(slopes: Tensor, q: Tensor) -> None:
    said = f"a floating tensor of shape ({q.shape[1]},), one a query head"
    check_table("alibi_slopes", slopes, q, None, (q.shape[1],), said)
    if slopes.requires_grad:
        raise ValueError("alibi_slopes are constants: they must not require a gradient")


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    said = f"a floating tensor of shape ({q.shape[1]},), one logit a query head"
    check_table("sinks", sinks, q, None, (q.shape[1],), said)


def check_bias(bias: Tensor | None, buckets: Tensor | None, q: Tensor) -> None:
    """`distance_bias` and `distance_buckets`."""
    if bias is None:
        if buckets is not None:
            raise ValueError("distance_buckets say nothing without distance_bias")
        return
    if buckets is None:
        raise ValueError("distance_bias needs distance_buckets, which say to which of its columns a distance belongs")
    if not isinstance(buckets, Tensor) or buckets.dim() != 1 or buckets.shape[0] < 1 or buckets.dtype != torch.int64:
        found = f"{buckets.dtype} of shape {shape(buckets)}" if isinstance(buckets, Tensor) else repr(buckets)
        raise ValueError(f"distance_buckets must be int64 of shape (distances,), at least one, got {found}")
    check_device("distance_buckets", buckets, q)
    columns = bias.shape[1] if isinstance(bias, Tensor) and bias.dim() == 2 else 1
    said = f"a floating tensor of shape (query heads, buckets) = ({q.shape[1]}, n)"
    check_table("distance_bias", bias, q, None, (q.shape[1], columns), said)
    if may_look(buckets) and not bool(((buckets >= 0) & (buckets < columns)).all()):
        raise ValueError(
            f"distance_buckets must lie between 0 and {columns - 1}, the last column of distance_bias, got "
            f"{int(buckets.min())} to {int(buckets.max())}"
        )


def check_segments(segment_length: int | None, segment_offset: int | Tensor, q: Tensor) -> None:
    if segment_length is not None:
        check_integer("segment_length", segment_length, 1)
    if not isinstance(segment_offset, Tensor):
        check_integer("segment_offset", segment_offset, 0)
        if segment_length is not None and segment_offset >= segment_length:
            raise ValueError(f"segment_offset must be < segment_length = {segment_length}, got {segment_offset}")
        return
    said = f"an integer or an int64 tensor of shape (batch,) = ({q.shape[0]},)"
    check_table("segment_offset", segment_offset, q, torch.int64, (q.shape[0],), said)
    if may_look(segment_offset):
        most = math.inf if segment_length is None else segment_length
        if not bool(((segment_offset >= 0) & (segment_offset < most)).all()):
            raise ValueError(
                f"segment_offset must be >= 0 and < segment_length = {segment_length}, got {segment_offset.tolist()}"
            )


def check_piece_start(piece_start: Tensor, k: Tensor) -> None:
    if not isinstance(piece_start, Tensor) or piece_start.dtype != torch.int32:
        found = str(piece_start.dtype) if isinstance(piece_start, Tensor) else type(piece_start).__name__
        raise TypeError(f"piece_start must be an int32 tensor, got {found}")
    expected = (k.shape[0], k.shape[2])
    if tuple(piece_start.shape) != expected:
        raise ValueError(
            f"piece_start must have shape (batch, S) = {expected}, one entry a key, got {shape(piece_start)}"
        )
    check_device("piece_start", piece_start, k)
    if piece_start.numel() == 0 or not may_look(piece_start):
        return
    tokens = torch.arange(k.shape[2], dtype=torch.int32, device=piece_start.device)
    late = piece_start > tokens
    if late.any():
        row, token = (int(i) for i in late.nonzero()[0])
        raise ValueError(
            "piece_start must not lie after its token, "
            f"but in row {row} token {token} has piece_start {int(piece_start[row, token])}"
        )
    if (piece_start[:, 1:].clamp(min=-1) < piece_start[:, :-1].clamp(min=-1)).any():
        raise ValueError("piece_start must not decrease along a row: a piece cannot go on after the next one has begun")


def check_angles(cos: Tensor | None, sin: Tensor | None, q: Tensor) -> None:
    if cos is None and sin is None:
        return
    expected = (q.shape[0], 1, q.shape[2], q.shape[3] // 2)
    said = f"float32 of shape (batch, 1, n, head_dim // 2) = {expected}"
    for name, table in (("cos", cos), ("sin", sin)):
        check_table(name, table, q, torch.float32, expected, said)
    if q.shape[3] % 2:
        raise ValueError(f"q must have an even head_dim to be turned, got {q.shape[3]}")


def scaled(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a scale > 0, with which the largest score stays the largest: backends count on it."""
    if scale is None:
        return q, q.shape[3] ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    if scale < 0:
        q, scale = -q, -scale
    return q, max(float(scale), 1e-30)  # as good as 0, but a mask's infinities times it stay infinities
