"""The two attention calls and the step before decoding: check the arguments at the border, hand them to a backend.

What follows from shapes, strides, dtypes and options alone is found out for the first of the calls that have these in
common (`dsmr_kernels.alike`), everything else for each.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsmr_kernels import alike, border, watch
from dsmr_kernels.dispatch import Choice, asked_for, choose
from dsmr_kernels.memory import KVMemory, MemorySnapshot, may_look
from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Alike, AttentionSpec, Inputs, has_tangent, layout, learning, with_sinks
from dsmr_kernels.visibility import VISIBILITIES


def _readable(memory: KVMemory | MemorySnapshot) -> Ring:
    """A ring whose parts are contiguous in their last dimension: itself, or a copy of what is not; a set is a ring that
    is read from its mark backwards."""
    k, v = border.rows(memory.k), border.rows(memory.v)
    if k is memory.k and v is memory.v and memory.mark is None:
        return memory
    view = memory.held()
    view.k, view.v = k, v
    view.position = memory.position if memory.mark is None else memory.mark
    return view


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: KVMemory | MemorySnapshot | None = None,
    *,
    horizon: int,
    segment_length: int | None = None,
    segment_offset: int | Tensor = 0,
    visibility: str = "segment",
    piece_start: Tensor | None = None,
    detach_segments: bool = True,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    distance_bias: Tensor | None = None,
    distance_buckets: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the current tokens over themselves, causally, and over the memory of the tokens before them.

    One softmax covers both. Who sees whom is defined in `dsmr_kernels.visibility`. n segments in one call give the
    outputs and gradients of n calls with the memory appended to in between.

    Args:
        q: (batch, Hq, T, head_dim); the queries are the last T of the S tokens. Any strides, as of k, v and memory;
            where the last dimension is not contiguous, a copy is made.
        k: (batch, Hkv, S, head_dim), S >= T, Hq a multiple of Hkv.
        v: (batch, Hkv, S, v_head_dim); v_head_dim may be another than head_dim.
        memory: the tokens before the call, in q's dtype or int8, or a snapshot of them; read, never changed; the caller
            appends afterwards. None = none. Of one that keeps others than the newest tokens every query sees all, so
            that the call must lie in one segment, `horizon` reach as far as the memory, and nothing ask for distances.
        horizon: how many tokens before the segment (before the query, if sliding) a query sees, >= 0.
        segment_length: tokens of a segment; None = the whole call lies in one segment.
        segment_offset: how many tokens before the call its first segment began, >= 0 and < `segment_length`; or
            (batch,) int64, for each row its own.
        visibility: "segment" or "sliding".
        piece_start: (batch, S) int32, for each token the index in this call of its piece's first token; negative =
            the piece began before the call. It must not decrease along a row.
        detach_segments: keys and values take gradients from queries of their own segment only, as the sequential
            recurrence does it. Memory never takes a gradient.
        scale: of the scores; default head_dim ** -0.5.
        alibi_slopes: (Hq,); the scores of a key d tokens back are lowered by slope * d (Press et al., 2022).
        sinks: (Hq,) learned logits, with a gradient: each takes part in its head's softmax and has no value, a place
            for weight to go where nothing suits (Xiao et al., 2024; Miller, 2023).
        distance_bias: (Hq, n) learned, with a gradient: bias[h, distance_buckets[d]] is added to the score of a key d
            tokens back (Raffel et al., 2020; Huang et al., 2019). On a CPU it costs about as much as ALiBi; its
            gradient another pass over the scores.
        distance_buckets: (D,) int64, for each distance its column of `distance_bias`; distances from D on belong to the
            last one's.
        return_lse: also return the natural log of the sum of exponentials of the scores, with a gradient: what merging
            several attentions needs.
        backend: see `available_backends`; the environment variable DSMR_BACKEND sets the default.

    Returns:
        out (batch, Hq, T, v_head_dim) in q's dtype, or (out, lse), lse (batch, Hq, T) float32.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: in a recomputation (activation checkpointing), if the memory has moved on since; if q, k, v, the
            bias, the slopes or, in a backward, a gradient has a tangent (forward-mode differentiation), which the
            reference alone carries on.

    Examples:
        Sinks and a bias by distance, both learned; the buckets widen with distance::

            sinks = torch.nn.Parameter(torch.zeros(heads))
            bias = torch.nn.Parameter(torch.zeros(heads, 32))
            buckets = (4 * torch.arange(1, horizon).log2()).long().clamp(max=31)
            out = memory_attention(
                q, k, v, memory, horizon=horizon, sinks=sinks, distance_bias=bias, distance_buckets=buckets
            )

        Two attentions of the same queries, over different keys, merged into one softmax::

            a, lse_a = memory_attention(q, k, v, memory, horizon=horizon, return_lse=True)
            out = torch.lerp(a, b, torch.sigmoid(lse_b - lse_a).unsqueeze(-1))

        Rows that are at places of their own in their segments, of which the first takes 3 tokens and the second 5::

            out = memory_attention(q, k, v, memory, horizon=horizon, segment_length=64, segment_offset=memory.seen % 64)
            memory.append(k, v, counts=torch.tensor([3, 5]))
    """
    asked, compiling, biased = asked_for(backend), torch.compiler.is_compiling(), distance_bias is not None
    by_row, with_lse = isinstance(segment_offset, Tensor), return_lse or sinks is not None
    key = kind = None
    if not compiling:
        options = (
            horizon, segment_length, by_row, None if by_row else segment_offset, visibility, detach_segments, scale,
            with_lse, asked, biased,
        )  # fmt: skip
        plain = not (by_row or with_lse or biased or watch.every or forward_ad._current_level >= 0)
        plain = plain and piece_start is None and alibi_slopes is None and distance_buckets is None
        types = type(horizon), type(segment_length), type(segment_offset), type(scale)
        kind = alike.recall(q, k, v, memory, options, types) if plain else None
        swift = None if kind is None else kind.swift
        if kind is None:
            key = alike.attention_key(q, k, v, memory, *options)
            kind = alike.found(key)
            if plain and kind is not None and kind.swift and kind.swift.suits(q, k, v):
                swift = kind.swift
                alike.learn_again(kind, q, k, v, memory, options, types)
        if swift and kind is not None and kind.choice.stands():
            if isinstance(memory, KVMemory):
                memory.check_read()
            swiftly: Tensor | None = swift(q, k, v, memory)
            if swiftly is not None:
                return swiftly
    if kind is None:
        border.check_query(q)
        border.check_keys(q, k, v)
        border.check_integer("horizon", horizon, 0)
    if kind is None or by_row:
        border.check_segments(segment_length, segment_offset, q)
    if kind is None:
        if visibility not in VISIBILITIES:
            raise ValueError(f"visibility must be one of {', '.join(VISIBILITIES)}, got {visibility!r}")
        if memory is not None:
            border.check_memory(memory, q, k.shape[1], v.shape[3])
    if piece_start is not None:
        border.check_piece_start(piece_start, k)
    if alibi_slopes is not None:
        border.check_alibi(alibi_slopes, q)
    if sinks is not None:
        border.check_sinks(sinks, q)
    if biased or distance_buckets is not None:
        border.check_bias(distance_bias, distance_buckets, q)
    if memory is not None and memory.mark is not None:
        by_age = visibility != "segment" or alibi_slopes is not None or biased
        border.check_set(memory, horizon, by_age)
        border.check_one_segment(memory, k, segment_length, segment_offset)
        border.check_place(memory, horizon, segment_offset)
    live = isinstance(memory, KVMemory) and memory.capacity > 0
    if live:
        assert isinstance(memory, KVMemory)
        memory.check_read()
        memory.settle()  # what the last append left: a segment that is over
        live = memory.moved
        learns = compiling and any(x is not None and x.requires_grad for x in (q, k, v, distance_bias, sinks))
        if learns and torch.is_grad_enabled():
            memory.note_graph_read()

    ring: Ring | None
    if kind is not None and kind.spec is not None:
        q, ring, spec = -q if kind.negated else q, memory, kind.spec
        chosen = kind.choice.module
        if not kind.choice.stands():
            chosen = choose(q, asked, v_head_dim=v.shape[3], biased=biased)
    else:
        turned, scale = border.scaled(q, scale)
        rows = border.rows(turned), border.rows(k), border.rows(v)
        ring = None if memory is None else _readable(memory)
        own = 0 if isinstance(segment_offset, Tensor) else segment_offset
        spec = AttentionSpec(horizon, segment_length, own, visibility, detach_segments, scale, with_lse)
        chosen = choose(q, asked, v_head_dim=v.shape[3], biased=biased)
        if key is not None and rows[0] is turned and rows[1] is k and rows[2] is v and ring is memory:
            choice = Choice.of(chosen, q, asked, v.shape[3], biased)
            kind = alike.keep(key, Alike(choice, spec, layout(*rows), turned is not q))
        q, k, v = rows
    inputs = Inputs(
        q,
        k,
        v,
        ring,
        piece_start,
        alibi_slopes,
        segment_offset if isinstance(segment_offset, Tensor) else None,
        None if distance_bias is None else distance_bias.to(torch.promote_types(q.dtype, torch.float32)),
        distance_buckets,
        spec,
        learning(q, k, v, distance_bias),
        live,
        kind,
    )
    out, lse = chosen.memory_attention(inputs)
    if watch.every:
        watch.attention(chosen, inputs, out, lse)
    if sinks is not None:
        out, lse = with_sinks(out, lse, sinks)
    return (out, lse.to(torch.float32)) if return_lse else out


def decode_attention(
    q: Tensor,
    memory: KVMemory | MemorySnapshot,
    *,
    visible: Tensor | None = None,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    distance_bias: Tensor | None = None,
    distance_buckets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of 1 to 16 new tokens, already appended to the memory, over the memory; causal among themselves.

    Args:
        q: (batch, Hq, n, head_dim), the n newest tokens.
        memory: holds these tokens and the ones before, in q's dtype or int8.
        visible: (batch,) int32, how many of the newest slots the last query of each row sees, itself included; query i
            of n sees n - 1 - i fewer, from the same oldest one. Default: `memory.length`.
        scale, alibi_slopes, sinks, distance_bias, distance_buckets, backend: as in `memory_attention`.

    Returns:
        (batch, Hq, n, v_head_dim) in q's dtype. Gradients are not defined for it: the memory is detached.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a gradient is asked for.
    """
    asked, biased = asked_for(backend), distance_bias is not None
    key = kind = None
    if not torch.compiler.is_compiling():
        key = alike.decoding_key(q, memory, scale, asked, biased)
        kind = alike.found(key)
    if kind is None:
        border.check_query(q)
    if torch.is_grad_enabled() and q.requires_grad:
        raise RuntimeError("decode_attention gives no gradient, but q requires one: call it under torch.no_grad()")
    if has_tangent(q, alibi_slopes, sinks, distance_bias):
        raise RuntimeError("decode_attention cannot be differentiated forwards (jvp); memory_attention can")
    if kind is None:
        if not isinstance(memory, (KVMemory, MemorySnapshot)):
            raise TypeError(f"memory must be a KVMemory that holds the new tokens, got {type(memory).__name__}")
        border.check_heads(q, memory.kv_heads)
        border.check_memory(memory, q, memory.kv_heads, None)
        if not 1 <= q.shape[2] <= min(16, memory.capacity):
            raise ValueError(
                f"q must hold 1 to 16 new tokens, no more than the memory's capacity of {memory.capacity}, "
                f"got {q.shape[2]}"
            )
    if visible is not None:
        expected = (q.shape[0],)
        border.check_table("visible", visible, q, torch.int32, expected, f"int32 of shape {expected}")
    if alibi_slopes is not None:
        border.check_alibi(alibi_slopes, q)
    if sinks is not None:
        border.check_sinks(sinks, q)
    if biased or distance_buckets is not None:
        border.check_bias(distance_bias, distance_buckets, q)
    if memory.mark is not None:
        border.check_room(memory)
        border.check_set(memory, None, visible is not None or alibi_slopes is not None or biased)
    if may_look(q):
        sees = memory.length if visible is None else torch.minimum(visible, memory.length)
        if (few := sees < q.shape[2]).any():
            row = int(few.nonzero()[0])  # its first query would see nothing, not even itself
            raise ValueError(
                f"each of the {q.shape[2]} new tokens must see itself, but row {row} sees {int(sees[row])}"
            )
    given, scale = border.scaled(q, scale)
    learned = (None if x is None else x.detach() for x in (sinks, distance_bias))
    rest = (visible, alibi_slopes, *learned, distance_buckets, scale)
    out: Tensor
    ring: Ring
    if kind is not None and kind.choice.stands():
        chosen, q, ring = kind.choice.module, given, memory
        out = chosen.decode_attention(q, ring, *rest, kind)
    else:
        chosen = choose(q, asked, v_head_dim=memory.v_head_dim, biased=biased)
        q, ring = border.rows(given), _readable(memory)
        if kind is None and key is not None and q is given and ring is memory:
            alike.keep(key, Alike(Choice.of(chosen, q, asked, memory.v_head_dim, biased)))
        out = chosen.decode_attention(q, ring, *rest)
    if watch.every:
        watch.decoding(chosen, q, ring, *rest, out=out)
    return out


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
        k: (batch, Hkv, n, head_dim), in q's dtype; stored in the memory's.
        v: (batch, Hkv, n, v_head_dim), likewise.
        memory: written in place.
        cos, sin: (batch, 1, n, head_dim // 2) float32, of the tokens' rotary angles; None = no rotation.
        backend: as in `memory_attention`.

    Returns:
        q, turned, as `decode_attention` wants it: in the memory's dtype, or its own if that is int8.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        RuntimeError: if a gradient is asked for.
    """
    asked = asked_for(backend)
    key = kind = None
    if not torch.compiler.is_compiling():
        key = alike.attention_key(q, k, v, memory, "append", asked)
        kind = alike.found(key)
    if kind is None:
        _check_step(q, k, v, memory)
    if cos is not None or sin is not None:
        border.check_angles(cos, sin, q)
    if memory.mark is not None:
        border.check_room(memory, q.shape[2])
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError("append_rotated is for inference: call it under torch.no_grad()")
    if has_tangent(q, k, v, cos, sin):
        raise RuntimeError("append_rotated is for inference: it cannot be differentiated forwards (jvp)")
    if kind is not None and kind.choice.stands():
        return kind.choice.module.append_rotated(q, k, v, memory, cos, sin, kind)
    chosen = choose(q, asked, v_head_dim=memory.v_head_dim)
    rows = border.rows(q), border.rows(k), border.rows(v)
    as_rows = rows[0] is q and rows[1] is k and rows[2] is v and all(border.rows(x) is x for x in memory.storage())
    if kind is None and key is not None and as_rows and memory.mark is None:
        alike.keep(key, Alike(Choice.of(chosen, q, asked, memory.v_head_dim, False)))
    return chosen.append_rotated(*rows, memory, cos, sin)


def _check_step(q: Tensor, k: Tensor, v: Tensor, memory: KVMemory) -> None:
    border.check_query(q)
    if not isinstance(memory, KVMemory):
        raise TypeError(f"memory must be a KVMemory, got {type(memory).__name__}")
    border.check_heads(q, memory.kv_heads)
    batch, _, new, dim = q.shape
    border.check_memory(memory, q, memory.kv_heads, None, any_dtype=True)
    for name, tensor, width in (("k", k, dim), ("v", v, memory.v_head_dim)):
        border.check_tensor(name, tensor, q)
        expected = (batch, memory.kv_heads, new, width)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name} must have shape (batch, kv_heads, n, head_dim) = {expected}, got {border.shape(tensor)}"
            )
    if not 1 <= new <= memory.capacity:
        raise ValueError(
            f"q must hold at least one new token, no more than the memory's capacity of {memory.capacity}, got {new}"
        )
