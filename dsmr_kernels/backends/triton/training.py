"""The training call: forward and backward of one `memory_attention`, as launches of their kernels, each followed by one
that puts shares together where the grid is small (`splits`).

Sizes, strides, horizons and offsets reach the kernels as run-time numbers; what compiles a kernel anew is the dtype,
the head dimensions, the alignment of the strides, whether tiles are shared, and which of memory, pieces, ALiBi, bias
and row offsets there are. What follows from shapes, strides and options alone is worked out once and kept (`_forward`,
`_dq`, `_dkv`, `_dbias`): a step of training asks for the same again and again, and working it out takes longer than
launching.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsmr_kernels.backends.triton import bulk, configs
from dsmr_kernels.backends.triton import launch as launching
from dsmr_kernels.backends.triton.backward import dkv_kernel, dq_kernel
from dsmr_kernels.backends.triton.bias import bucketed, dbias_kernel, table_of
from dsmr_kernels.backends.triton.configs import choose, named, padded, unrolled
from dsmr_kernels.backends.triton.forward import forward_kernel
from dsmr_kernels.backends.triton.launch import LOG2E, Launch, architecture, as_rows, in_units, processors
from dsmr_kernels.backends.triton.limits import bounded as bounded  # where the kernels' comments look for it
from dsmr_kernels.backends.triton.limits import bounded_rows, distances_seen, limits_of
from dsmr_kernels.backends.triton.primitives import MARGIN
from dsmr_kernels.backends.triton.splits import LEAST_KEYS, LEAST_QUERIES, merge_kernel, shares_of, sum_kernel
from dsmr_kernels.spec import AttentionSpec, Gradients, Inputs, Needs

_KEPT = 1024  # launches of each kernel
_TABLES = 16  # of them, in which calls differ that are alike


class _Signature(NamedTuple):
    """What the launches of a call depend on: everything but where its tensors lie."""

    spec: AttentionSpec
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[tuple[int, ...], ...]  # of q, k, v and the memory's k and v
    strides: tuple[tuple[int, ...], ...]
    scale_strides: tuple[int, ...]  # of batch and head
    piece_stride: int
    has_memory: bool
    quantised: bool
    has_pieces: bool
    has_alibi: bool
    width: int  # of the bias's table; 0 = no bias
    has_offsets: bool
    processors: int
    generation: int


def _tensors(inputs: Inputs) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The tensors that the kernels over queries begin with, and what the signatures of calls alike may differ in.

    A kernel takes a pointer for every tensor: where there is none, any will do, and it is never read. The table of a
    bias holds ALiBi's slopes, too, and takes their place.
    """
    q, k, v, memory, piece_start, alibi, offsets, bias, buckets = inputs[:9]
    ring: tuple[Tensor, ...] = (k, v, q, q, q, q)
    if memory is not None and memory.k.numel():
        k_scale, v_scale = q, q
        if memory.k_scale is not None and memory.v_scale is not None:
            k_scale, v_scale = as_rows(memory.k_scale), as_rows(memory.v_scale)
        ring = (memory.k, memory.v, k_scale, v_scale, memory.length.contiguous(), memory.position.contiguous())
    many = processors(q.device)
    if piece_start is None and alibi is None and offsets is None and bias is None:
        return (q, k, v, *ring, q, q, q), (configs.generation, many, 0, False, False, 0, False, None)
    pieces = q if piece_start is None else as_rows(piece_start)
    slopes = q if alibi is None else alibi.contiguous()
    width = 0
    if bias is not None and buckets is not None:
        slopes, alibi = table_of(bias, buckets, alibi, _distances(inputs)), None
        width = slopes.shape[1]
    if offsets is not None:
        capacity = memory.capacity if memory is not None else 0
        offsets = bounded_rows(offsets, inputs.spec.segment_length, k.shape[2], capacity)
    piece_stride = 0 if piece_start is None else pieces.stride(0)
    tables = (piece_stride, piece_start is not None, alibi is not None, width, offsets is not None, slopes.dtype)
    return (q, k, v, *ring, pieces, slopes, q if offsets is None else offsets), (configs.generation, many, *tables)


def read(inputs: Inputs) -> tuple[tuple[Tensor, ...], "Plans"]:
    """The tensors that the kernels over queries begin with, and the launches of the call."""
    tensors, tables = _tensors(inputs)
    kept = None if inputs.alike is None else inputs.alike.plans
    if kept is not None and (found := kept.get(tables)) is not None:
        return tensors, found
    generation, many, piece_stride, has_pieces, has_alibi, width, has_offsets, _ = tables
    memory, five, scale_strides = inputs.memory, tensors[:5], (0, 0, 0, 0)
    has_memory = memory is not None and memory.k.numel() > 0
    quantised = memory is not None and has_memory and memory.k_scale is not None and memory.v_scale is not None
    if quantised:
        scale_strides = (*tensors[5].stride()[:2], *tensors[6].stride()[:2])  # type: ignore[assignment]
    signature = _Signature(
        inputs.spec,
        inputs.q.device,
        tuple([x.dtype for x in tensors]),
        tuple([x.shape for x in five]),
        tuple([x.stride() for x in five]),
        scale_strides,
        piece_stride,
        has_memory,
        quantised,
        has_pieces,
        has_alibi,
        width,
        has_offsets,
        many,
        generation,
    )
    plans = _plans(signature)
    if kept is not None:
        if len(kept) >= _TABLES:
            kept.clear()
        kept[tables] = plans
    return tensors, plans


class _Plan(NamedTuple):
    """A kernel's launch, the shares of a tile, and what puts them together where there are several."""

    launch: Launch
    splits: int
    together: Launch | None

    def parts(self, *shape: int, like: Tensor) -> Tensor:
        """Room for every share's partial result."""
        return torch.empty((self.splits, *shape), dtype=torch.float32, device=like.device)


def _distances(inputs: Inputs) -> int:
    """How many distances are seen in a call."""
    tokens, capacity = inputs.k.shape[2], 0 if inputs.memory is None else inputs.memory.capacity
    limits = limits_of(inputs.spec, inputs.offsets is not None, tokens, capacity)
    return distances_seen(limits, inputs.spec.visibility == "sliding", tokens, capacity)


class _Sizes:
    """What the launches of a signature have in common."""

    def __init__(self, of: _Signature) -> None:
        (self.batch, self.heads, self.queries, self.head_dim), (_, self.kv_heads, self.tokens, _), v, ring, _ = (
            of.shapes
        )
        self.v_head_dim = v[3]
        self.widest = max(self.head_dim, self.v_head_dim)
        self.capacity = ring[2] if of.has_memory else 0
        self.group, self.scale = self.heads // self.kv_heads, of.spec.scale
        self.limits = limits_of(of.spec, of.has_offsets, self.tokens, self.capacity)
        self.constants = {
            "SLIDING": of.spec.visibility == "sliding",
            "HAS_MEMORY": of.has_memory,
            "QUANTISED": of.quantised,
            "HAS_PIECES": of.has_pieces,
            "HAS_ALIBI": of.has_alibi,
            "HAS_BIAS": of.width > 0,
            "HAS_OFFSETS": of.has_offsets,
            "PRECISION": "ieee" if of.dtypes[0] == torch.float32 else "tf32",
            "HEAD_DIM": self.head_dim,
            "V_DIM": self.v_head_dim,
            "BD": padded(self.head_dim),
            "BV": padded(self.v_head_dim),
        }

    def _walk(self, of: _Signature, tile: int) -> tuple[int, int]:
        """How many keys a tile of so many queries sees at most, and how many queries of a group a tile of keys."""
        horizon, length, _ = self.limits
        own = tile if of.spec.visibility == "sliding" else tile + (length or self.tokens)
        keys = min(horizon + own, self.tokens + self.capacity)
        until = length + tile if length and of.spec.detach_segments else horizon + own
        return keys, self.group * min(until, self.queries)

    def _grid(self, of: _Signature, config: configs.Config, keys: bool, divisible: bool) -> tuple[int, int]:
        """Tiles of a call, of its keys or of its queries, and the shares of one."""
        count, tile, heads = (self.tokens, config.bn, self.kv_heads) if keys else (self.queries, config.bm, self.heads)
        programs = -(-count // tile) * self.batch * heads
        walk, least = self._walk(of, tile)[keys], LEAST_QUERIES if keys else LEAST_KEYS
        return programs, shares_of(programs, of.processors, walk, least) if divisible else 1

    def plan(
        self, kernel: Any, name: str, of: _Signature, unit: int, more_dtypes: tuple[torch.dtype, ...],
        outputs: int, numbers: tuple[float, ...], without: tuple[str, ...] = (), **constants: Any,
    ) -> _Plan:  # fmt: skip
        """A program for every tile of a head, of queries, or for "dkv" of keys, or for every share of one. The last
        `outputs` tensors are what is put together; 0: nothing that may be split."""
        part = architecture(of.device)
        keys = name == "dkv"
        entry = named(name, of.quantised and not keys, of.width > 0)
        config = choose(entry, part, self.widest, of.dtypes[0])
        programs, splits = self._grid(of, config, keys, outputs > 0)
        if splits > 1:
            config = choose(f"{entry}_split", part, self.widest, of.dtypes[0])
            programs, splits = self._grid(of, config, keys, outputs > 0)
        grid = (programs, splits, 1)
        constants = {key: value for key, value in self.constants.items() if key not in without} | constants
        constants |= {"UNIT": unit, "BM": config.bm, "BN": config.bn, "SPLIT": splits > 1}
        options = config.launch_options(part)
        if not keys:
            constants["UNROLLED"] = unrolled(part)
        if splits == 1:
            return _Plan(Launch(kernel, grid, of.device, more_dtypes, numbers, constants, options), 1, None)
        more_dtypes = (*more_dtypes[:-outputs], *(torch.float32,) * outputs)
        launch = Launch(kernel, grid, of.device, more_dtypes, numbers, constants, options)
        if "forward" in name:
            return _Plan(launch, splits, self._merge(of, splits))
        rows = self.batch * (self.kv_heads * self.tokens if keys else self.heads * self.queries)
        counts = (rows * self.head_dim, 0)
        if keys:
            counts = rows * self.head_dim * constants["NEEDS_K"], rows * self.v_head_dim * constants["NEEDS_V"]
        return _Plan(launch, splits, self._sum(of, splits, counts))

    def _merge(self, of: _Signature, splits: int) -> Launch:
        config = choose("merge", architecture(of.device), self.v_head_dim, of.dtypes[0])
        rows = self.batch * self.heads * self.queries
        dtypes = (torch.float32, torch.float32, of.dtypes[0], torch.float32)
        constants = {"V_DIM": self.v_head_dim, "BR": config.bm, "BV": padded(self.v_head_dim)}
        options = config.launch_options(architecture(of.device))
        return Launch(
            merge_kernel, (-(-rows // config.bm), 1, 1), of.device, dtypes, (rows, splits), constants, options
        )

    def _sum(self, of: _Signature, splits: int, counts: tuple[int, int]) -> Launch:
        config = choose("sum", architecture(of.device), self.head_dim, of.dtypes[0])
        dtypes = (torch.float32, of.dtypes[0]) * 2
        grid = (-(-max(counts) // config.bm), 2 if counts[1] else 1, 1)
        options = config.launch_options(architecture(of.device))
        return Launch(sum_kernel, grid, of.device, dtypes, (*counts, splits), {"BLOCK": config.bm}, options)


@functools.lru_cache(_KEPT)
def _forward(of: _Signature) -> _Plan:
    sizes = _Sizes(of)
    unit, strides = in_units(list(of.shapes), list(of.strides))
    numbers = (
        *strides, *of.scale_strides, of.piece_stride, sizes.heads, sizes.group, sizes.scale * LOG2E,
        sizes.queries, sizes.tokens, sizes.capacity, *sizes.limits, of.width,
    )  # fmt: skip
    dtypes = (*of.dtypes, of.dtypes[0], torch.float32)
    return sizes.plan(forward_kernel, "forward", of, unit, dtypes, 2, numbers)


@functools.lru_cache(_KEPT)
def _dq(of: _Signature, grad: tuple[tuple[int, ...], tuple[int, ...]], lse_grad: bool, needed: bool) -> _Plan:
    """`grad`: shape and strides of the gradient of out."""
    sizes = _Sizes(of)
    unit, strides = in_units([*of.shapes, grad[0]], [*of.strides, grad[1]])
    numbers = (
        *strides[:15], *of.scale_strides, *strides[15:], of.piece_stride, sizes.heads, sizes.group,
        sizes.scale * LOG2E, sizes.scale, sizes.queries, sizes.tokens, sizes.capacity, *sizes.limits, of.width,
    )  # fmt: skip
    low = of.dtypes[0]
    dtypes = (*of.dtypes, low, torch.float32 if lse_grad else low, low, torch.float32, torch.float32, low)
    return sizes.plan(
        dq_kernel, "dq", of, unit, dtypes, int(needed), numbers,
        HAS_LSE_GRAD=lse_grad, NEEDS_Q=needed,
    )  # fmt: skip


@functools.lru_cache(_KEPT)
def _dkv(of: _Signature, grad: tuple[tuple[int, ...], tuple[int, ...]], needs_k: bool, needs_v: bool) -> _Plan:
    sizes = _Sizes(of)
    unit, strides = in_units([*of.shapes[:3], grad[0]], [*of.strides[:3], grad[1]])
    numbers = (
        *strides, of.piece_stride, sizes.kv_heads, sizes.group, sizes.scale * LOG2E, sizes.scale,
        sizes.queries, sizes.tokens, *sizes.limits, of.width,
    )  # fmt: skip
    low = of.dtypes[0]
    dtypes = (low, low, low, *of.dtypes[-3:], low, torch.float32, torch.float32, low, low)
    return sizes.plan(
        dkv_kernel, "dkv", of, unit, dtypes, 2, numbers, ("HAS_MEMORY", "QUANTISED"),
        DETACH=of.spec.detach_segments, NEEDS_K=needs_k, NEEDS_V=needs_v,
    )  # fmt: skip


@functools.lru_cache(_KEPT)
def _dbias(of: _Signature, grad: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Launch, int, int]:
    """Also the blocks of distances, and the distances of a block."""
    sizes = _Sizes(of)
    part = architecture(of.device)
    config = choose("dbias", part, sizes.widest, of.dtypes[0])
    assert config.bm <= config.bn
    blocks = -(-(of.width - 2 * MARGIN.value - 1) // config.bn) + 1
    unit, strides = in_units([*of.shapes, grad[0]], [*of.strides, grad[1]])
    numbers = (
        *strides[:15], *of.scale_strides, *strides[15:], of.piece_stride, sizes.heads, sizes.group,
        sizes.scale * LOG2E, sizes.queries, sizes.tokens, sizes.capacity, *sizes.limits, of.width, blocks,
    )  # fmt: skip
    dtypes = (*of.dtypes, of.dtypes[0], torch.float32, torch.float32, torch.float32)
    constants = {key: x for key, x in sizes.constants.items() if key not in ("HAS_ALIBI", "HAS_BIAS")}
    constants |= {"UNIT": unit, "BM": config.bm, "BN": config.bn}
    grid = (sizes.batch * sizes.heads * blocks, 1, 1)
    launch = Launch(dbias_kernel, grid, of.device, dtypes, numbers, constants, config.launch_options(part))
    return launch, blocks, config.bn


class Plans:
    """The launches of the calls of a signature."""

    def __init__(self, of: _Signature) -> None:
        self.of, self.forward = of, _forward(of)
        self.out_shape = (*of.shapes[0][:3], of.shapes[2][3])
        _, heads, queries, _ = self.out_shape
        self.lse = self.out_shape[:3], (heads * queries, queries, 1)  # shape and strides
        self._backward: dict[Any, tuple[_Plan | None, _Plan | None]] = {}

    def backward(self, grad: Tensor, lse_grad: bool, needs: Needs) -> tuple[_Plan | None, _Plan | None]:
        """Of dQ, or what comes before dK and dV, and of dK and dV; None where a call has no use for it."""
        strides = grad.stride()
        key = (strides, lse_grad, needs)
        found = self._backward.get(key)
        if found is None:
            laid_out, dq, dkv = (grad.shape, strides), None, None
            if needs.q or needs.k or needs.bias:
                dq = _dq(self.of, laid_out, lse_grad, needs.q)
            if needs.k or needs.v:
                dkv = _dkv(self.of, laid_out, needs.k, needs.v)
            if len(self._backward) >= _KEPT:
                self._backward.clear()
            found = self._backward[key] = dq, dkv
        return found


_plans = functools.lru_cache(_KEPT)(Plans)


def room(x: Tensor) -> Tensor:
    """An empty contiguous tensor of the shape of `x`; `torch.empty` takes three times as long to be told that shape,
    and to be told a memory format takes time, too."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, v_head_dim) and lse (B, Hq, T)."""
    q = inputs.q
    device = q.device
    if not q.numel():
        rows = q.shape[:3]
        return q.new_empty((*rows, inputs.v.shape[3])), q.new_empty(rows, dtype=torch.float32)
    if (tile := bulk.tile_for(inputs)) is not None:
        out = room(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
        capacity = 0 if inputs.memory is None else inputs.memory.capacity
        bulk.forward(inputs, tile, bounded(inputs.spec, inputs.k.shape[2], capacity), out, lse)
        return out, lse
    tensors, plans = read(inputs)
    shape = plans.out_shape
    out = room(q) if shape[3] == q.shape[3] else torch.empty(shape, dtype=q.dtype, device=device)
    lse = torch.empty_strided(*plans.lse, dtype=torch.float32, device=device)  # quicker than `torch.empty`
    with launching.on(device):
        start_forward(launching.stream_of(device), plans, tensors, out, lse)
    return out, lse


def start_forward(stream: int, plans: Plans, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> None:
    """Launch the forward of `tensors`, as `read` gives them."""
    plan, shape = plans.forward, plans.out_shape
    if plan.together is None:
        plan.launch.start(stream, *tensors, out, lse)
    else:
        parts = plan.parts(*shape, like=out), plan.parts(*shape[:3], like=out)
        plan.launch.start(stream, *tensors, *parts)
        plan.together.start(stream, *parts, out, lse)


def backward(
    inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None, needs: Needs
) -> Gradients:
    """The gradients that are needed."""
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = room(q) if needs.q else None, room(k) if needs.k else None, room(v) if needs.v else None
    if q.numel() == 0:
        dbias = torch.zeros_like(inputs.bias) if inputs.bias is not None and needs.bias else None
        return Gradients(dq, None if dk is None else dk.zero_(), None if dv is None else dv.zero_(), dbias)
    out, lse, grad = out.contiguous(), lse.contiguous(), as_rows(grad)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tensors, plans = read(inputs)
    dq_plan, dkv_plan = plans.backward(grad, grad_lse is not None, needs)
    delta, dbias, device = lse, None, q.device  # for the gradient of v alone nothing else is needed
    if dq_plan is not None:
        delta = room(lse)
    with launching.on(device):
        stream = launching.stream_of(device)
        start_backward(stream, (dq_plan, dkv_plan), tensors, (grad, grad_lse, out, lse, delta), (dq, dk, dv))
        if inputs.bias is not None and inputs.buckets is not None and needs.bias:
            launch, blocks, keys = _dbias(plans.of, (grad.shape, grad.stride()))
            parts = torch.empty((*q.shape[:2], 2, blocks * keys), dtype=torch.float32, device=device)
            launch.start(stream, *tensors, grad, lse, delta, parts)
            dbias = bucketed(parts, inputs.bias, inputs.buckets, _distances(inputs), keys)
    return Gradients(dq, dk, dv, dbias)


def start_backward(
    stream: int,
    plans: tuple[_Plan | None, _Plan | None],
    tensors: tuple[Tensor, ...],
    given: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Launch `Plans.backward` of `tensors`, as `read` gives them, of the gradients of out and lse, of out, lse and what
    is written between, for the gradients of q, k and v that are needed."""
    (dq_plan, dkv_plan), (grad, grad_lse, out, lse, delta), (dq, dk, dv) = plans, given, results
    q, k, v = tensors[:3]
    if dq_plan is not None:
        of_queries = (*tensors, grad, q if grad_lse is None else grad_lse, out, lse, delta)
        if dq_plan.together is None:
            dq_plan.launch.start(stream, *of_queries, q if dq is None else dq)
        else:
            _in_shares(stream, dq_plan, of_queries, (dq,), q)
    if dkv_plan is not None:
        of_keys = (q, k, v, *tensors[-3:], grad, lse, delta)
        if dkv_plan.together is None:
            dkv_plan.launch.start(stream, *of_keys, k if dk is None else dk, k if dv is None else dv)
        else:
            _in_shares(stream, dkv_plan, of_keys, (dk, dv), k)


def _in_shares(
    stream: int, plan: _Plan, tensors: tuple[Tensor, ...], results: tuple[Tensor | None, ...], unread: Tensor
) -> None:
    """Launch a kernel of the backward in shares, which write those results that are needed; `unread` stands for the
    others."""
    assert plan.together is not None
    made = [None if x is None else plan.parts(*x.shape, like=x) for x in results]
    spare = next(x for x in made if x is not None)
    parts = [spare if x is None else x for x in made]
    plan.launch.start(stream, *tensors, *parts)
    pairs = [(part, unread if x is None else x) for part, x in zip(parts, results, strict=True)]
    plan.together.start(stream, *pairs[0], *pairs[-1])
