"""`DSMRAttention`: multi-head attention with a memory of its own horizon, to be dropped into any Transformer.

The layer projects, places positions and calls `dsmr_kernels.memory_attention`; it contains no attention arithmetic.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.model.altered import as_made, weight_of
from dsmr.model.heads import Part, heads_of
from dsmr.model.hosts import HostAttention, read_attention
from dsmr.model.options import check_options
from dsmr.model.positions import POSITIONS, Rotary, alibi_slopes, sinusoids, token_positions
from dsmr_kernels import KVMemory, MemorySnapshot, memory_attention
from dsmr_kernels.costing.cost import memory_capacity
from dsmr_kernels.holding import may_look
from dsmr_kernels.retention import RETENTIONS
from dsmr_kernels.visibility import VISIBILITIES

ROW = 2**32
"""Between the samples of two rows that keep samples of their own: more than a model has layers."""


def check_retention(retention: str, horizon: int, visibility: str, position: str) -> None:
    """`ValueError` for what a memory that keeps others than the newest tokens cannot serve."""
    if retention not in RETENTIONS:
        raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}, got {retention!r}")
    if retention == "newest" or not horizon:
        return
    for name, value, refused in (("visibility", visibility, "sliding"), ("position", position, "alibi")):
        if value == refused:
            raise ValueError(
                f"retention {retention!r} does not go with {name} {value!r}: such a memory does not know how old its "
                "slots are"
            )


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype that projections come out in: that of autocast where it is on, else that of the weights."""
    device = parameter.device.type
    cast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else parameter.dtype


def side_by_side(heads: Tensor, out: nn.Module) -> Tensor:
    """(B, H, T, head_dim) -> (B, T, H * head_dim), in the dtype that the projection `out` takes."""
    return heads.transpose(1, 2).flatten(2).to(compute_dtype(weight_of(out)))


def _kept(projected: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype heads are written: the memory's at once, where that rounds no more often."""
    return dtype if projected.dtype == torch.float32 and dtype.is_floating_point else projected.dtype


class DSMRAttention(nn.Module):
    """Causal self-attention over the current tokens and the layer's own memory.

    Args:
        d_model: width of the input and output.
        n_heads: query heads; head_dim = d_model / n_heads.
        horizon: past tokens that the memory holds; 0 = none.
        n_kv_heads: KV heads (grouped-query attention); None = n_heads.
        position: "rope", "sinusoidal" (absolute position in the piece added to the input of the K and Q projections,
            not V: the paper's diagram), "alibi" or "none".
        segment_length: tokens of a segment; None = each call is one segment.
        visibility: "segment" or "sliding", see `dsmr_kernels.visibility`.
        detach_segments: as in `memory_attention`.
        rope_base: base of the rotary frequencies.
        backend: as in `memory_attention`.
        retention: which `horizon` past tokens the memory holds: the "newest", or "uniform" or "random" ones of the
            whole piece, see `dsmr_kernels.retention`. Of the latter a query sees all, and what its segment sees is
            settled when the segment begins: a call must then lie in one segment, visibility be "segment", and the
            position scheme not depend on distances between slots ("alibi").
        sample: what a random sample follows from; layers of one model have different ones.
        bias: of all projections; "qkv" = of those for Q, K and V only.
        head_dim: None = d_model / n_heads.
        qk_norm: RMS norms over head_dim of queries and of keys, before they are placed (as in Qwen3), with `norm_eps`.
        dropout: of the output. There is none of attention weights: `attention_dropout` is 0, or refused.
        rotary_dim: "rope" turns the first `rotary_dim` numbers of each head; None = head_dim.
        rope_frequencies: radians a token of each pair (rotary_dim / 2 numbers) in place of those of `rope_base`, for
            models whose rotary embedding is scaled.
        scale: of the scores; None = head_dim ** -0.5.

    Raises:
        ValueError: if the sizes do not divide or are negative, or `position` or `visibility` is unknown.
    """

    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        horizon: int,
        n_kv_heads: int | None = None,
        position: str = "rope",
        segment_length: int | None = None,
        visibility: str = "segment",
        detach_segments: bool = True,
        rope_base: float = 10000.0,
        backend: str | None = None,
        retention: str = "newest",
        sample: int = 0,
        bias: bool | str = False,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        rotary_dim: int | None = None,
        rope_frequencies: Sequence[float] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or (head_dim is None and d_model % n_heads):
            raise ValueError(f"d_model must be a multiple of n_heads, got d_model={d_model} and n_heads={n_heads}")
        if kv_heads < 1 or n_heads % kv_heads:
            raise ValueError(f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {kv_heads}")
        for name, value, least in (("horizon", horizon, 0), ("segment_length", segment_length, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if visibility not in VISIBILITIES:
            raise ValueError(f"visibility must be one of {', '.join(VISIBILITIES)}, got {visibility!r}")
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        check_retention(retention, horizon, visibility, position)
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        if position == "rope" and rotary_dim is None and self.head_dim % 2:
            named = "d_model / n_heads" if head_dim is None else "head_dim"
            raise ValueError(f"rope needs an even head_dim, got {named} = {self.head_dim}")
        check_options(
            position,
            self.head_dim,
            rope_base,
            bias,
            norm_eps,
            dropout,
            attention_dropout,
            rotary_dim,
            rope_frequencies,
            scale,
        )
        if position == "sinusoidal" and d_model % 2:
            raise ValueError(f"sinusoidal positions need an even d_model, got {d_model}")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, kv_heads
        self.horizon, self.segment_length, self.visibility = horizon, segment_length, visibility
        self.position, self.rope_base = position, rope_base
        self.detach_segments, self.backend = detach_segments, backend
        self.retention, self.sample = retention if horizon else "newest", sample
        self.rotary_dim, self.scale, self.dropout = rotary_dim or self.head_dim, scale, dropout
        self.rope_frequencies = None if rope_frequencies is None else tuple(map(float, rope_frequencies))
        self.qkv = nn.Linear(d_model, (n_heads + 2 * kv_heads) * self.head_dim, bias=bool(bias))
        self.out = nn.Linear(n_heads * self.head_dim, d_model, bias=bias is True)
        for name in ("q_norm", "k_norm"):
            setattr(self, name, nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None)
        self._slopes: Tensor | None = None  # made where and when they are needed, so that they are never stale

    @classmethod
    def from_attention(cls, module: nn.Module, *, horizon: int, **options: Any) -> Self:
        """This layer with the projections of another model's attention, copied: what `module` did, with a memory.

        Args:
            module: `nn.MultiheadAttention`, the attention of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 of Hugging Face
                Transformers, or a module with `c_attn`, `c_proj` and `n_head` as nanoGPT has. Query head h reads KV
                head h // (n_heads / n_kv_heads), in all of them and here.
            horizon: past tokens that the memory holds. Where the module has a sliding window, visibility must be
                "sliding" and the horizon less than the window, which counts the query itself.
            options: of `DSMRAttention`, beside those that the module fixes. `position` is the module's own: "rope" for
                a Llama, and "none" where the model adds positions before (or has none): name another if it has another.

        Raises:
            TypeError: if the projections of such a module cannot be read.
            ValueError: if it does what this layer cannot do; the sentence says what.
        """
        return cls.from_host(read_attention(module), horizon=horizon, **options).train(module.training)

    @classmethod
    def from_host(cls, host: HostAttention, *, horizon: int, **options: Any) -> Self:
        """`from_attention` of a module that was read already."""
        host.check_horizon(horizon, options.get("visibility", "segment"))
        layer = cls(**{**host.arguments(), "horizon": horizon, **host.fitting(options)})
        host.copy_into(layer)
        return layer

    @property
    def plain(self) -> bool:
        """Whether it is as a `DSMRModel` makes it, without the options that are there for other people's models."""
        own = (self.qkv.bias, self.q_norm, self.scale, self.rope_frequencies)
        whole = self.rotary_dim == self.head_dim and self.n_heads * self.head_dim == self.d_model
        return whole and all(option is None for option in own)

    @property
    def slopes(self) -> Tensor | None:
        """ALiBi slopes (Hq,) float32 on the layer's device, if that is its position scheme. No buffer: a layer built on
        the meta device would have nothing to fill one with."""
        if self.position != "alibi":
            return None
        device = weight_of(self.qkv).device
        if self._slopes is None or self._slopes.device != device:
            if torch.compiler.is_compiling():
                self._slopes = alibi_slopes(self.n_heads).to(device)
            else:
                with torch.inference_mode(False):
                    self._slopes = alibi_slopes(self.n_heads).to(device)
        return self._slopes

    def new_memory(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        aligned: bool = False,
        apart: bool = False,
    ) -> KVMemory:
        """An empty memory for `batch` streams, in the dtype that the projections come out in.

        Args:
            aligned: calls will always be whole segments, so the memory holds exactly `horizon` tokens; otherwise it
                also has room for the segment in progress and serves calls of any size.
            apart: each row keeps a random sample of its own; otherwise a row's does not depend on its place.
        """
        weight = weight_of(self.qkv)
        capacity = self.horizon if aligned else memory_capacity(self.horizon, self.segment_length, self.visibility)
        return KVMemory.empty(
            batch,
            self.n_kv_heads,
            capacity,
            self.head_dim,
            dtype=dtype or compute_dtype(weight),
            device=device or weight.device,
            retention=self.retention,
            room=0 if self.retention == "newest" else capacity - self.horizon,
            seed=self.sample + torch.arange(batch, device="cpu") * ROW if apart else self.sample,
        )

    @torch.no_grad()
    def match_equal_inputs(self) -> None:
        """Begin with equal projections for keys and for the first query head of each group."""
        q_size, kv_size = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        q = self.qkv.weight[:q_size].unflatten(0, (self.n_kv_heads, -1, self.head_dim))
        self.qkv.weight[q_size : q_size + kv_size] = q[:, 0].flatten(0, 1)

    def place(self, positions: Tensor) -> Rotary | Tensor | None:
        """What this layer's position scheme needs to know of the tokens at `positions` (B, T)."""
        if self.position == "rope":
            return Rotary.at(positions, self.rotary_dim, self.rope_base, self.rope_frequencies)
        return sinusoids(positions, self.d_model) if self.position == "sinusoidal" else None

    def attend(
        self,
        x: Tensor,
        memory: KVMemory | MemorySnapshot,
        place: Rotary | Tensor | None,
        *,
        labels: tuple[Tensor, Tensor] | None = None,
        piece_start: Tensor | None = None,
        segment_offset: int | Tensor = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer without the append: x (B, T, d_model) -> y (B, T, d_model) and the new k and v.

        `place` is what `self.place` gave for these tokens; a model computes it once for all its layers. `labels`,
        (B, T, d_model) each, are added to the inputs of the Q and of the K projection. Under activation checkpointing
        give it `memory.snapshot()`, and append k and v outside.
        """
        self._check_input(x)
        self.check_memory(memory, x.shape[0], segment_offset)
        q, k, v = self.project(x, place, labels, memory.dtype)
        out = self.look(q, k, v, memory, piece_start=piece_start, segment_offset=segment_offset)
        y = self.out(side_by_side(out, self.out))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y, k, v

    def project(
        self, x: Tensor, place: Rotary | Tensor | None, labels: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> q (B, Hq, T, head_dim), k and v (B, Hkv, T, head_dim), in the dtype of the memory, or as
        they come out of the projection if that is int8; arguments as of `attend`."""
        parts = ((self.n_heads, True), (self.n_kv_heads, True), (self.n_kv_heads, False))
        if isinstance(place, Tensor) or labels is not None:
            q_input = k_input = x + place.to(x.dtype) if isinstance(place, Tensor) else x
            if labels is not None:
                q_input, k_input = q_input + labels[0].to(x.dtype), k_input + labels[1].to(x.dtype)
            sizes = [count * self.head_dim for count, _ in parts]
            apart = zip(self._apart((q_input, k_input, x), sizes), parts, strict=True)
            projected: list[tuple[Tensor, tuple[Part, ...]]] = [(made, (part,)) for made, part in apart]
        else:
            projected = [(self.qkv(x), parts)]
        turned = place if isinstance(place, Rotary) else None
        if self.q_norm is None and (turned is None or self.rotary_dim == self.head_dim):
            found = [head for made, kinds in projected for head in heads_of(made, kinds, turned, _kept(made, dtype))]
        else:
            found = [head for made, kinds in projected for head in heads_of(made, kinds, None, made.dtype)]
            if self.q_norm is not None and self.k_norm is not None:
                found[:2] = self.q_norm(found[0]), self.k_norm(found[1])
            if turned is not None:
                found[:2] = turned(found[0]), turned(found[1])
        q, k, v = found if dtype == torch.int8 else (head.to(dtype) for head in found)
        return q, k, v

    def _apart(self, inputs: tuple[Tensor, Tensor, Tensor], sizes: list[int]) -> list[Tensor]:
        """The projections of q, k and v, `sizes` features each, of an input each."""
        if not as_made(self.qkv, nn.Linear):  # an adapter in its place knows no parts: each is cut out of a whole one
            q = self.qkv(inputs[0])
            k = q if inputs[1] is inputs[0] else self.qkv(inputs[1])
            return [whole.split(sizes, -1)[place] for place, whole in enumerate((q, k, self.qkv(inputs[2])))]
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.split(sizes)
        parts = zip(inputs, self.qkv.weight.split(sizes), biases, strict=True)
        return [F.linear(x, weight, bias) for x, weight, bias in parts]

    def look(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory: KVMemory | MemorySnapshot,
        *,
        piece_start: Tensor | None = None,
        segment_offset: int | Tensor = 0,
    ) -> Tensor:
        """What `project` gave, looked up in the segment and in a memory that `check_memory` has passed: (B, Hq, T,
        head_dim); arguments as of `attend`."""
        # A token attends to its segment's keys as they will be stored: else outputs depended on where calls begin.
        out = memory_attention(
            q,
            memory.as_stored(k),
            memory.as_stored(v),
            memory if memory.capacity else None,
            horizon=self.horizon,
            segment_length=self.segment_length,
            segment_offset=segment_offset,
            visibility=self.visibility,
            piece_start=piece_start,
            detach_segments=self.detach_segments,
            scale=self.scale,
            alibi_slopes=self.slopes,
            backend=self.backend,
        )
        assert isinstance(out, Tensor)
        return out

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x must have shape (batch, tokens, {self.d_model}), got {tuple(x.shape)}")

    def check_memory(self, memory: KVMemory | MemorySnapshot, batch: int, segment_offset: int | Tensor) -> None:
        """That a memory is of this layer and this batch: another would be taken, and attention be silently other."""
        if memory.batch != batch:
            raise ValueError(f"the memory holds {memory.batch} streams, but x has {batch} rows")
        found, expected = (memory.kv_heads, memory.head_dim), (self.n_kv_heads, self.head_dim)
        if found != expected:
            raise ValueError(f"the memory has (kv_heads, head_dim) = {found}, this layer {expected}")
        if memory.retention != self.retention or (memory.retention != "newest" and memory.kept != self.horizon):
            raise ValueError(
                f"the memory keeps {memory.kept} tokens by retention {memory.retention!r}, this layer {self.horizon} "
                f"by {self.retention!r}: make it with new_memory of this layer"
            )
        begun = 0 if self.visibility == "sliding" else self._farthest(segment_offset)
        if memory.capacity < self.horizon + begun:
            within = f", {begun} tokens into a segment," if begun else ""
            raise ValueError(
                f"the memory holds {memory.capacity} tokens, but with a horizon of {self.horizon} a query{within} sees "
                f"{self.horizon + begun} before its call: make it with new_memory of this layer"
                + (", which serves calls of any size unless aligned=True" if begun else "")
            )

    def _farthest(self, segment_offset: int | Tensor) -> int:
        """How far into its segment a row is at most."""
        if not isinstance(segment_offset, Tensor):
            return segment_offset
        if segment_offset.numel() and may_look(segment_offset):
            return int(segment_offset.max())
        return (self.segment_length or 1) - 1

    def _offset(self, memory: KVMemory | MemorySnapshot, given: int | None) -> int | Tensor:
        """How far into its segment a call begins, as the memory knows; what the caller says must agree."""
        if self.segment_length is None:
            return given or 0
        known = memory.seen % self.segment_length
        if given is None:
            agree = True
        elif isinstance(known, Tensor):
            agree = not may_look(known) or bool((known == given).all())
        else:
            agree = known == given
        if not agree:
            raise ValueError(
                f"segment_offset is {given}, but the memory has seen {memory.seen} tokens, which is {known} into a "
                f"segment of {self.segment_length}; leave it out, the memory knows"
            )
        return known

    def check_autocast(self, memory: KVMemory | MemorySnapshot) -> None:
        """`ValueError` if the memory is wider than what keys and values come out in under autocast."""
        weight = weight_of(self.qkv)
        dtype = compute_dtype(weight)
        if dtype != weight.dtype and memory.dtype.itemsize > dtype.itemsize:
            raise ValueError(
                f"the memory is in {memory.dtype}, but under this autocast keys and values come out in {dtype}: make "
                "it inside, or with new_memory(..., dtype=...)"
            )

    def forward(
        self,
        x: Tensor,
        memory: KVMemory | MemorySnapshot | None = None,
        *,
        piece_start: Tensor | None = None,
        segment_offset: int | None = None,
    ) -> tuple[Tensor, KVMemory]:
        """x (B, T, d_model) -> y (B, T, d_model) and the memory with the new tokens appended.

        Calls may be of any size, a token too: how far into its segment a stream is, the memory knows.

        Args:
            memory: from `new_memory` or the last call; None = an empty one. It is appended to in place; a call whose
                backward has not run yet keeps the old contents. Of a snapshot a new memory is made: that is what a
                checkpointed call must be given (`checkpoint(layer, x, memory.snapshot())`).
            piece_start: (B, T) int32 as in `memory_attention`.
            segment_offset: how many tokens before the call its first segment began; checked against what the memory
                has seen.

        Raises:
            ValueError: if the memory is not of this layer: another horizon, batch, dtype, or place in a segment.
            RuntimeError: in a recomputation (activation checkpointing) that was given a memory and not a snapshot.
        """
        self._check_input(x)
        if memory is None:
            memory = self.new_memory(x.shape[0])
        elif isinstance(memory, KVMemory):
            memory.check_read()  # before anything is computed
        self.check_autocast(memory)
        offset = self._offset(memory, segment_offset)
        place = self.place(token_positions(memory.position, x.shape[1], piece_start))
        y, k, v = self.attend(x, memory, place, piece_start=piece_start, segment_offset=offset)
        if isinstance(memory, MemorySnapshot):
            return y, memory.appended(k, v, piece_start)
        memory.append(k, v, piece_start)
        return y, memory
