"""What a decode step does to a new token before it attends, in one launch: turn q and k, write k and v into the ring.

The programs of a row of the batch share its heads. The last of them to be done, when all have read the row's length and
write position, advances both: the position never leaves the device.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmr_kernels import rotary
from dsmr_kernels.backends.triton import configs
from dsmr_kernels.backends.triton.arrivals import MOST_COUNTERS, arrives_last, launch_counting
from dsmr_kernels.backends.triton.configs import choose, padded
from dsmr_kernels.backends.triton.launch import Launch, architecture, as_rows
from dsmr_kernels.memory import KVMemory
from dsmr_kernels.spec import Alike


@triton.jit
def _halves(X, Cos, Sin, x_head, x_token, c_token, h, i, d, valid, half, head_dim, ROTATE: tl.constexpr):
    """The two halves of rows (h, i) of X, turned: [BR, BH] float32 each, rounded as X's dtype rounds them."""
    base = X + h.to(tl.int64)[:, None] * x_head + i.to(tl.int64)[:, None] * x_token
    low = valid[:, None] & (d < half)[None, :]
    high = valid[:, None] & (half + d < head_dim)[None, :]
    first = tl.load(base + d[None, :], mask=low, other=0.0).to(tl.float32)
    second = tl.load(base + half + d[None, :], mask=high, other=0.0).to(tl.float32)
    if ROTATE:
        at = i.to(tl.int64)[:, None] * c_token + d[None, :]
        cos, sin = tl.load(Cos + at, mask=low, other=0.0), tl.load(Sin + at, mask=low, other=0.0)
        first, second = first * cos - second * sin, first * sin + second * cos
        first, second = first.to(X.dtype.element_ty).to(tl.float32), second.to(X.dtype.element_ty).to(tl.float32)
    return first, second, low, high


@triton.jit
def _write(
    Ring, Scale, head, token, scale_head, first, second, h, at, d, valid, low, high, half, QUANTISED: tl.constexpr
):
    """Both halves of rows (h, at) of a ring; in int8 as `dsmr_kernels.quantise` has it."""
    if QUANTISED:
        scale = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1)) * (1.0 / 127)  # [BR]
        scale = tl.where(scale >= 1.1754943508222875e-38, scale, 0.0)
        scale += tl.sum(first * 0.0 + second * 0.0, 1)  # NaN where one of them is no finite number
        inverse = (1.0 / tl.where(scale > 0, scale, 1.0))[:, None]
        # Adding and taking away 1.5 * 2 ** 23 rounds to the nearest integer, ties to even.
        first = first * inverse + 12582912.0 - 12582912.0
        second = second * inverse + 12582912.0 - 12582912.0
        first = tl.minimum(tl.maximum(first, -127.0), 127.0)
        second = tl.minimum(tl.maximum(second, -127.0), 127.0)
        tl.store(Scale + h.to(tl.int64) * scale_head + at, scale, mask=valid)
    out = Ring + h.to(tl.int64)[:, None] * head + at[:, None] * token + d[None, :]
    tl.store(out, first.to(Ring.dtype.element_ty), mask=low)
    tl.store(out + half, second.to(Ring.dtype.element_ty), mask=high)


@triton.jit(do_not_specialize=["new", "capacity"])
def step_kernel(
    Q, K, V, Cos, Sin, MemoryK, MemoryV, KScale, VScale, Length, Position, Out, Counters,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    c_batch, c_token,
    mk_batch, mk_head, mk_token, mv_batch, mv_head, mv_token, ks_batch, ks_head, vs_batch, vs_head,
    heads, kv_heads, head_dim, half, v_dim, v_half, new, capacity,
    ROTATE: tl.constexpr, QUANTISED: tl.constexpr, ALONE: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
    BHV: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)`: Out (B, Hq, n, head_dim) = Q turned; K turned and V into their slots; counters advance.

    ALONE: one program takes all heads of a row. Else a program takes every so many blocks of BR of the (head, token)
    pairs, the first program those of q from the first on, and the last one those of k and v.
    """
    b = tl.program_id(0)
    b64 = b.to(tl.int64)
    position = tl.load(Position + b)
    length = tl.load(Length + b)
    slot = (position % capacity).to(tl.int32)
    d, e = tl.arange(0, BH), tl.arange(0, BHV)
    cos, sin = Cos + b64 * c_batch, Sin + b64 * c_batch
    programs = tl.num_programs(1)
    step, from_first = programs * BR, tl.program_id(1) * BR
    from_last = (programs - 1) * BR - from_first
    for start in tl.range(from_first, heads * new, step):
        row = start + tl.arange(0, BR)
        first, second, low, high = _halves(
            Q + b64 * q_batch, cos, sin, q_head, q_token, c_token, row // new, row % new, d, row < heads * new, half,
            head_dim, ROTATE,
        )  # fmt: skip
        out = Out + (b64 * heads * new + row)[:, None] * head_dim + d[None, :]
        tl.store(out, first.to(Out.dtype.element_ty), mask=low)
        tl.store(out + half, second.to(Out.dtype.element_ty), mask=high)
    for start in tl.range(from_last, kv_heads * new, step):
        row = start + tl.arange(0, BR)
        h, i, valid = row // new, row % new, row < kv_heads * new
        at = slot + i
        at = tl.where(at >= capacity, at - capacity, at).to(tl.int64)
        first, second, low, high = _halves(
            K + b64 * k_batch, cos, sin, k_head, k_token, c_token, h, i, d, valid, half, head_dim, ROTATE
        )
        _write(
            MemoryK + b64 * mk_batch, KScale + b64 * ks_batch, mk_head, mk_token, ks_head, first, second, h, at, d,
            valid, low, high, half, QUANTISED,
        )  # fmt: skip
        first, second, low, high = _halves(
            V + b64 * v_batch, cos, sin, v_head, v_token, c_token, h, i, e, valid, v_half, v_dim, False
        )
        _write(
            MemoryV + b64 * mv_batch, VScale + b64 * vs_batch, mv_head, mv_token, vs_head, first, second, h, at, e,
            valid, low, high, v_half, QUANTISED,
        )  # fmt: skip
    if ALONE:
        tl.debug_barrier()  # every warp has read the counters before one of them writes
        tl.store(Position + b, position + new)
        tl.store(Length + b, tl.minimum(length + new, capacity))
    else:
        if arrives_last(Counters + b, programs):
            tl.store(Position + b, position + new)
            tl.store(Length + b, tl.minimum(length + new, capacity))


# A block takes about as long as a program's arrival, a way to memory and back: fewer of them are not worth sharing out.
_LEAST_SHARED = 4


def programs_of(batch: int, blocks: int) -> int:
    """Programs that share the blocks of a row's heads: one each, or one for all."""
    return blocks if blocks >= _LEAST_SHARED and batch <= MOST_COUNTERS else 1


def _turned_dtype(q: Tensor, memory_k: Tensor) -> torch.dtype:
    return q.dtype if memory_k.dtype == torch.int8 else memory_k.dtype


_TABLES = 16  # launches of calls that are alike but for their rotary angles


class _Call(NamedTuple):
    """What a launch depends on: everything but where its tensors lie."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]  # of q, k and v
    strides: tuple[tuple[int, ...], ...]  # and of the memory's k and v
    turn_strides: tuple[int, ...]  # of batch and token
    scale_strides: tuple[int, ...]  # of batch and head
    capacity: int
    rotated: bool
    quantised: bool
    generation: int


@functools.lru_cache(1024)
def _plan(of: _Call) -> tuple[Launch, int]:
    """The launch, and how many programs share a row."""
    (batch, heads, new, dim), (_, kv_heads, _, _), (*_, v_dim) = of.shapes
    part = architecture(of.device)
    config = choose("step", part, max(dim, v_dim), of.dtypes[0])
    rows = min(triton.next_power_of_2(heads * new), config.bm)
    programs = programs_of(batch, triton.cdiv(heads * new, rows) + triton.cdiv(kv_heads * new, rows))
    numbers = (
        *(stride for strides in of.strides[:3] for stride in strides[:3]), *of.turn_strides,
        *(stride for strides in of.strides[3:] for stride in strides[:3]), *of.scale_strides,
        heads, kv_heads, dim, (dim + 1) // 2, v_dim, (v_dim + 1) // 2, new, of.capacity,
    )  # fmt: skip
    constants = {"ROTATE": of.rotated, "QUANTISED": of.quantised, "ALONE": programs == 1, "BR": rows}
    constants |= {"BH": padded(dim) // 2, "BHV": padded(v_dim) // 2}
    # Products and sums are rounded apart, as PyTorch rounds them.
    options = config.launch_options(part) | {"enable_fp_fusion": False}
    dtypes = (*of.dtypes, of.dtypes[0] if programs == 1 else torch.int32)
    return Launch(step_kernel, (batch, programs, 1), of.device, dtypes, numbers, constants, options), programs


def _launch(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, memory_k: Tensor, memory_v: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, position: Tensor, keep: bool = True,
    kind: Alike | None = None,
) -> Tensor:  # fmt: skip
    if kind is None:
        q, k, v = as_rows(q), as_rows(k), as_rows(v)
    dtype = _turned_dtype(q, memory_k)
    if dtype == q.dtype:  # `torch.empty` takes longer
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out
    turn, turn_strides = (q, q), (0, 0)
    if cos is not None and sin is not None:
        cos, sin = as_rows(cos), as_rows(sin)
        turn = (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())
        turn_strides = (turn[0].stride(0), turn[0].stride(2))
    scales, scale_strides = (out, out), (0, 0, 0, 0)
    if k_scale is not None and v_scale is not None:
        scales, scale_strides = (k_scale, v_scale), (*k_scale.stride()[:2], *v_scale.stride()[:2])  # type: ignore[assignment]
    counters = (length.contiguous(), position.contiguous())
    tensors = (q, k, v, *turn, memory_k, memory_v, *scales, *counters, out)
    tables = configs.generation, turn_strides, cos is not None  # what calls alike may differ in
    found = None if kind is None else kind.plans.get(tables)
    if found is None:
        found = _plan(
            _Call(
                q.device,
                tuple([x.dtype for x in tensors]),
                (q.shape, k.shape, v.shape),
                tuple([x.stride() for x in (q, k, v, memory_k, memory_v)]),
                turn_strides,
                scale_strides,
                memory_k.shape[2],
                cos is not None,
                k_scale is not None,
                configs.generation,
            )
        )
        if kind is not None:
            if len(kind.plans) >= _TABLES:
                kind.plans.clear()
            kind.plans[tables] = found
    launch, programs = found
    if programs == 1:
        launch(*tensors, q)
    else:
        launch_counting(launch, q.shape[0], keep, *tensors)
    for counter, advanced in zip((length, position), counters, strict=True):
        if advanced is not counter:
            counter.copy_(advanced)
    return out


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, memory_k: Tensor, memory_v: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, length: Tensor, position: Tensor,
) -> Tensor:  # fmt: skip
    return _launch(q, k, v, cos, sin, memory_k, memory_v, k_scale, v_scale, length, position, keep=False)


_operator = torch.library.custom_op(
    "dsmr_kernels::triton_step",
    _compiled,
    mutates_args=("memory_k", "memory_v", "k_scale", "v_scale", "length", "position"),
)


@_operator.register_fake
def _(*arguments: Tensor) -> Tensor:
    q, memory_k = arguments[0], arguments[5]
    return q.new_empty(q.shape, dtype=_turned_dtype(q, memory_k))


def append_rotated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory,
    cos: Tensor | None,
    sin: Tensor | None,
    kind: Alike | None = None,
) -> Tensor:
    """See `dsmr_kernels.append_rotated`; arguments are taken as checked."""
    if kind is None:
        storage = memory.storage()
        if memory.mark is not None or any(x.stride(-1) != 1 and x.shape[-1] != 1 for x in storage):
            return rotary.append_rotated(q, k, v, memory, cos, sin)
    before = memory.k
    memory.unshare()
    if memory.k is not before:  # a copy may lie in other strides than those that `kind` speaks of
        kind = None
    arguments = (memory.k, memory.v, memory.k_scale, memory.v_scale, memory.length, memory.position)
    if torch.compiler.is_compiling():
        turned = _operator(q, k, v, cos, sin, *arguments)
    else:
        turned = _launch(q, k, v, cos, sin, *arguments, kind=kind)
        torch.autograd.graph.increment_version([x for x in arguments if x is not None])  # written past PyTorch's eyes
    memory.seen = memory.seen + q.shape[2]
    return turned
