"""The two attention calls: check the arguments at the border, then hand them to a backend."""

import math

import torch
from torch import Tensor

from dsmr_kernels.dispatch import choose
from dsmr_kernels.memory import KVMemory
from dsmr_kernels.spec import AttentionSpec
from dsmr_kernels.visibility import VISIBILITIES


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")


def _check_tensor(name: str, tensor: Tensor, q: Tensor) -> None:
    """The rules for keys and values: dtype and device of q."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
    _check_device(name, tensor, q)


def _check_table(name: str, x: object, q: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...], said: str) -> None:
    """The rules for a tensor beside these: what was `said` of it; any floating dtype, if `dtype` is None."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be {said}, got {x!r}")
    if tuple(x.shape) != shape or (x.dtype != dtype if dtype else not x.dtype.is_floating_point):
        raise ValueError(f"{name} must be {said}, got {x.dtype} of shape {_shape(x)}")
    _check_device(name, x, q)


def _check_query(q: Tensor) -> None:
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a tensor, got {type(q).__name__}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape (batch, heads, tokens, head_dim), got {_shape(q)}")
    if not q.dtype.is_floating_point:
        raise TypeError(f"q must be of a floating dtype, got {q.dtype}")
    if q.shape[1] < 1 or q.shape[3] < 1:
        raise ValueError(f"q must have at least one head and a head_dim of at least 1, got shape {_shape(q)}")


def _check_memory(memory: KVMemory, q: Tensor, kv_heads: int, any_dtype: bool = False) -> None:
    """That a memory, which anyone may put together, fits q and the KV heads, and its parts one another."""
    for name, tensor in (("memory.k", memory.k), ("memory.v", memory.v)):
        if any_dtype or memory.dtype == torch.int8:
            _check_device(name, tensor, q)
        else:
            _check_tensor(name, tensor, q)
    found = (memory.batch, memory.kv_heads, memory.head_dim)
    expected = (q.shape[0], kv_heads, q.shape[3])
    if found != expected:
        raise ValueError(f"memory must have (batch, kv_heads, head_dim) = {expected} to fit q and k, got {found}")
    if memory.v.shape != memory.k.shape:
        raise ValueError(f"memory.v must have the shape of memory.k, {_shape(memory.k)}, got {_shape(memory.v)}")
    for name, tensor, dtype in (("length", memory.length, torch.int32), ("position", memory.position, torch.int64)):
        if tensor.dtype != dtype or tensor.shape != q.shape[:1] or tensor.device != q.device:
            raise ValueError(
                f"memory.{name} must be {dtype} of shape ({q.shape[0]},) on {q.device}, "
                f"got {tensor.dtype} of shape {_shape(tensor)} on {tensor.device}"
            )


def _check_heads(q: Tensor, kv_heads: int) -> None:
    if kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"the {q.shape[1]} query heads must be a multiple of the KV heads, got {kv_heads} KV heads")


def _check_alibi(slopes: Tensor, q: Tensor) -> None:
    said = f"a floating tensor of shape ({q.shape[1]},), one a query head"
    _check_table("alibi_slopes", slopes, q, None, (q.shape[1],), said)
    if slopes.requires_grad:
        raise ValueError("alibi_slopes are constants: they must not require a gradient")


def _check_piece_start(piece_start: Tensor, k: Tensor) -> None:
    if not isinstance(piece_start, Tensor) or piece_start.dtype != torch.int32:
        found = str(piece_start.dtype) if isinstance(piece_start, Tensor) else type(piece_start).__name__
        raise TypeError(f"piece_start must be an int32 tensor, got {found}")
    expected = (k.shape[0], k.shape[2])
    if tuple(piece_start.shape) != expected:
        raise ValueError(
            f"piece_start must have shape (batch, S) = {expected}, one entry a key, got {_shape(piece_start)}"
        )
    _check_device("piece_start", piece_start, k)
    if torch.compiler.is_compiling() or piece_start.device.type != "cpu" or piece_start.numel() == 0:
        return  # looking at the values would make the device wait
    tokens = torch.arange(k.shape[2], dtype=torch.int32)
    late = piece_start > tokens
    if late.any():
        row, token = (int(i) for i in late.nonzero()[0])
        raise ValueError(
            "piece_start must not lie after its token, "
            f"but in row {row} token {token} has piece_start {int(piece_start[row, token])}"
        )
    if (piece_start[:, 1:].clamp(min=-1) < piece_start[:, :-1].clamp(min=-1)).any():
        raise ValueError("piece_start must not decrease along a row: a piece cannot go on after the next one has begun")


def _check_angles(cos: Tensor | None, sin: Tensor | None, q: Tensor) -> None:
    if cos is None and sin is None:
        return
    expected = (q.shape[0], 1, q.shape[2], q.shape[3] // 2)
    said = f"float32 of shape (batch, 1, n, head_dim // 2) = {expected}"
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, table, q, torch.float32, expected, said)
    if q.shape[3] % 2:
        raise ValueError(f"q must have an even head_dim to be turned, got {q.shape[3]}")


def _scaled(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
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


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | None = None,
    *,
    horizon: int,
    segment_length: int | None = None,
    segment_offset: int = 0,
    visibility: str = "segment",
    piece_start: Tensor | None = None,
    detach_segments: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the current tokens over themselves, causally, and over the memory of the tokens before them.

    One softmax covers both. Who sees whom is defined in `dsmr_kernels.visibility`. n segments in one call give the
    outputs and gradients of n calls with the memory appended to in between.

    Args:
        q: (batch, Hq, T, head_dim); the queries are the last T of the S tokens.
        k, v: (batch, Hkv, S, head_dim), S >= T, Hq a multiple of Hkv.
        memory: the tokens before the call, in q's dtype or int8; read, never changed; the caller appends afterwards.
            None = none.
        horizon: how many tokens before the segment (before the query, if sliding) a query sees, >= 0.
        segment_length: tokens of a segment; None = the whole call lies in one segment.
        segment_offset: how many tokens before the call its first segment began, >= 0 and < `segment_length`.
        visibility: "segment" or "sliding".
        piece_start: (batch, S) int32, for each token the index in this call of its piece's first token; negative =
            the piece began before the call. It must not decrease along a row.
        detach_segments: keys and values take gradients from queries of their own segment only, as the sequential
            recurrence does it. Memory never takes a gradient.
        scale: of the scores; default head_dim ** -0.5.
        alibi_slopes: (Hq,); the scores of a key d tokens back are lowered by slope * d (Press et al., 2022).
        return_lse: also return the natural log of the sum of exponentials of the scores, without a gradient.
        backend: see `available_backends`; the environment variable DSMR_BACKEND sets the default.

    Returns:
        out (batch, Hq, T, head_dim) in q's dtype, or (out, lse), lse (batch, Hq, T) float32.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    _check_query(q)
    _check_tensor("k", k, q)
    _check_tensor("v", v, q)
    batch, _, queries, dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != dim:
        raise ValueError(
            f"k must have shape (batch, kv_heads, S, head_dim) = ({batch}, Hkv, S, {dim}), got {_shape(k)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {_shape(k)}, got {_shape(v)}")
    _check_heads(q, k.shape[1])
    if k.shape[2] < queries:
        raise ValueError(f"k must hold at least the {queries} tokens of q, got {k.shape[2]}")
    _check_integer("horizon", horizon, 0)
    _check_integer("segment_offset", segment_offset, 0)
    if segment_length is not None:
        _check_integer("segment_length", segment_length, 1)
        if segment_offset >= segment_length:
            raise ValueError(f"segment_offset must be < segment_length = {segment_length}, got {segment_offset}")
    if visibility not in VISIBILITIES:
        raise ValueError(f"visibility must be one of {', '.join(VISIBILITIES)}, got {visibility!r}")
    if memory is not None:
        if not isinstance(memory, KVMemory):
            raise TypeError(f"memory must be a KVMemory or None, got {type(memory).__name__}")
        _check_memory(memory, q, k.shape[1])
    if piece_start is not None:
        _check_piece_start(piece_start, k)
    if alibi_slopes is not None:
        _check_alibi(alibi_slopes, q)

    q, scale = _scaled(q, scale)
    spec = AttentionSpec(
        horizon=horizon,
        segment_length=segment_length,
        segment_offset=segment_offset,
        visibility=visibility,
        detach_segments=detach_segments,
        scale=scale,
        return_lse=return_lse,
    )
    out, lse = choose(q, backend).memory_attention(q, k, v, memory, piece_start, alibi_slopes, spec)
    return (out, lse) if return_lse else out


def decode_attention(
    q: Tensor,
    memory: KVMemory,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of 1 to 16 new tokens, already appended to the memory, over the memory; causal among themselves.

    Args:
        q: (batch, Hq, n, head_dim), the n newest tokens.
        memory: holds these tokens and the ones before, in q's dtype or int8.
        visible: (batch,) int32, how many of the newest slots the last query of each row sees, itself included; query i
            of n sees n - 1 - i fewer, from the same oldest one. Default: `memory.length`.
        scale, alibi_slopes, backend: as in `memory_attention`.

    Returns:
        (batch, Hq, n, head_dim) in q's dtype. Gradients are not defined for it: the memory is detached.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a gradient is asked for.
    """
    _check_query(q)
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("decode_attention gives no gradient, but q requires one: call it under torch.no_grad()")
    if not isinstance(memory, KVMemory):
        raise TypeError(f"memory must be a KVMemory that holds the new tokens, got {type(memory).__name__}")
    _check_heads(q, memory.kv_heads)
    _check_memory(memory, q, memory.kv_heads)
    if not 1 <= q.shape[2] <= min(16, memory.capacity):
        raise ValueError(
            f"q must hold 1 to 16 new tokens, no more than the memory's capacity of {memory.capacity}, got {q.shape[2]}"
        )
    if visible is not None:
        shape = (q.shape[0],)
        _check_table("visible", visible, q, torch.int32, shape, f"int32 of shape {shape}")
    if alibi_slopes is not None:
        _check_alibi(alibi_slopes, q)
    if not torch.compiler.is_compiling() and q.device.type == "cpu":  # elsewhere, looking would make the device wait
        sees = memory.length if visible is None else torch.minimum(visible, memory.length)
        if (few := sees < q.shape[2]).any():
            row = int(few.nonzero()[0])  # its first query would see nothing, not even itself
            raise ValueError(
                f"each of the {q.shape[2]} new tokens must see itself, but row {row} sees {int(sees[row])}"
            )
    q, scale = _scaled(q, scale)
    return choose(q, backend).decode_attention(q, memory, visible, alibi_slopes, scale)


def append_rotated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a decode step does before it attends: turn q and k by their rotary angles, append k and v to the memory.

    For inference. `memory.length` and `memory.position` are advanced in place, and nothing waits for the device, so a
    captured graph may replay the call; with the triton backend it is one launch.

    Args:
        q: (batch, Hq, n, head_dim), the n newest tokens, no more than the memory's capacity; any strides.
        k, v: (batch, Hkv, n, head_dim), in q's dtype; stored in the memory's.
        memory: written in place.
        cos, sin: (batch, 1, n, head_dim // 2) float32, of the tokens' rotary angles; None = no rotation.
        backend: as in `memory_attention`.

    Returns:
        q, turned, as `decode_attention` wants it: in the memory's dtype, or its own if that is int8.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a gradient is asked for.
    """
    _check_query(q)
    if not isinstance(memory, KVMemory):
        raise TypeError(f"memory must be a KVMemory, got {type(memory).__name__}")
    _check_heads(q, memory.kv_heads)
    batch, _, new, dim = q.shape
    _check_memory(memory, q, memory.kv_heads, any_dtype=True)
    for name, tensor in (("k", k), ("v", v)):
        _check_tensor(name, tensor, q)
        expected = (batch, memory.kv_heads, new, dim)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have shape (batch, kv_heads, n, head_dim) = {expected}, got {_shape(tensor)}"
            )
    if not 1 <= new <= memory.capacity:
        raise ValueError(
            f"q must hold at least one new token, no more than the memory's capacity of {memory.capacity}, got {new}"
        )
    _check_angles(cos, sin, q)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("append_rotated is for inference: call it under torch.no_grad()")
    return choose(q, backend).append_rotated(q, k, v, memory, cos, sin)
