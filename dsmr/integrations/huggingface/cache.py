"""A cache of Transformers that holds each layer's memory in a ring as long as its horizon.

Transformers hands a layer's new keys to its cache first and what comes back to the attention function, which wants the
memory as it was before them. So `update` gives the new keys and values back as they are and only remembers whose they
are; the attention function claims the layer by them (`claim`), and the layer attends and appends.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from dsmr.integrations.huggingface.planning import ATTENTION, plan_of
from dsmr_kernels import KVMemory, decode_attention, memory_attention

TAKEN_BACK = 64  # tokens of a draft that may be taken back, unless the cache was made for more


class DSMRLayer(CacheLayerMixin):
    """A layer's memory. Capacity: the horizon, a segment in progress if there are segments, and `slack` tokens."""

    is_sliding = False  # for the choice among masks: all layers get the same one, where each row's text begins
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(
        self, horizon: int, segment_length: int | None, slack: int, dtype: torch.dtype | None, *, depth: int
    ) -> None:
        super().__init__()
        self.depth = depth  # layers of the model that this is one of
        self.horizon, self.segment_length, self.slack, self.dtype = horizon, segment_length, slack, dtype
        self.memory: KVMemory | None = None
        self.offered: Tensor | None = None  # keys that wait for their attention

    @property
    def capacity(self) -> int:
        return self.horizon + (self.segment_length or 1) - 1 + self.slack

    @property
    def batch_size(self) -> int:
        if self.memory is None:
            raise AttributeError("a memory that holds nothing yet has no batch size")
        return self.memory.batch

    # --- what attention asks for --------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """An empty memory for keys and values (batch, kv_heads, any, head_dim) such as these."""
        batch, heads, _, head_dim = key_states.shape
        dtype, device = self.dtype or key_states.dtype, key_states.device
        width = value_states.shape[3]
        self.memory = KVMemory.empty(
            batch, heads, self.capacity, head_dim, v_head_dim=width, dtype=dtype, device=device
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they came, the keys known as this layer's."""
        self.offered = key_states.view_as(key_states)  # an object of its own, also where layers share a tensor
        _offers[id(self.offered)] = self
        return self.offered, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, *, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of new tokens over the memory and themselves; the memory then holds them.

        Args:
            q: (batch, Hq, T, head_dim), all of one dtype.
            k, v: (batch, Hkv, T, head_dim), of the same tokens.
            starts: (batch,) int64, the token of the call that each row's text begins with, T = later; negative = it
                began before. None = it began before, or with the first token, in all rows.
            sinks: (Hq,), as in `memory_attention`.

        Returns:
            (batch, Hq, T, head_dim).
        """
        if self.memory is None:
            self.lazy_initialization(k, v)
        memory = self.memory
        assert memory is not None
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if q.shape[2] == 1 and starts is None and self.slack and not learning:
            memory.append(k, v)
            return decode_attention(q, memory, visible=self._visible(memory), scale=scale, sinks=sinks)
        pieces = None if starts is None else piece_starts(starts, k.shape[2])
        out = memory_attention(
            q,
            memory.as_stored(k),
            memory.as_stored(v),
            memory,
            horizon=self.horizon,
            **visibility(self.segment_length, memory.position, starts),
            piece_start=pieces,
            scale=scale,
            sinks=sinks,
        )
        assert isinstance(out, Tensor)
        memory.append(k, v, pieces)
        return out

    def _visible(self, memory: KVMemory) -> Tensor | None:
        """How many of the newest slots the newest token sees, itself included; None = all that are held."""
        if self.segment_length is not None:
            return ((memory.position - 1) % self.segment_length + 1 + self.horizon).to(torch.int32)
        return None if self.slack == 1 else memory.length.clamp(max=self.horizon + 1)

    # --- what generation asks for -------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens held: positions are counted from it."""
        if self.memory is None:
            return 0
        assert isinstance(self.memory.seen, int)
        return self.memory.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the keys that `update` gives back, which are the new ones alone: how many, and how many came before."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        return -1  # plays on forever

    def activate_past_recording(self) -> None:
        """Drafts will be taken back: room for them, if nothing is held yet."""
        if self.memory is None:
            self.slack = max(self.slack, TAKEN_BACK)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest `-tokens_to_remove` tokens.

        Raises:
            ValueError: if tokens within the horizon gave way to them already.
        """
        count = -tokens_to_remove
        if count < 0:
            raise ValueError(f"crop takes how many tokens to remove, as a negative number, got {tokens_to_remove}")
        if count == 0 or self.memory is None:
            return
        if count > self.slack and self.get_seq_length() > self.capacity:
            raise ValueError(
                f"{count} tokens cannot be taken back, since what they pushed out of the memory is gone: with "
                f"DSMRCache(config, slack={count}) they could (slack={self.slack})"
            )
        self.memory.crop(count)

    def reset(self) -> None:
        self.memory, self.offered, self.is_initialized = None, None, False

    def offload(self) -> None:
        """Refused: the memory stays where the model is, since every step reads all of it."""
        raise ValueError("a DSMRCache is not moved off its device: what it takes there, its schedule decides")

    def _rearrange(self, how: Callable[[KVMemory], KVMemory]) -> None:
        if self.memory is not None:
            self.memory = how(self.memory)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rearrange(lambda memory: memory.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rearrange(lambda memory: memory.repeat(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        chosen = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")
        rows = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
        self._rearrange(lambda memory: memory.select(rows))


class DSMRCache(Cache):
    """A memory for every layer of a model, as its schedule says: what `generate` takes as `past_key_values`.

    Args:
        config: of the model, after `set_schedule`.
        slack: tokens that a layer has room for beyond its horizon, so that as many can be taken back (`crop`). The
            default, 1, is the newest token itself, which is then appended before it attends; with 0, `nbytes` is the
            schedule's budget to the byte, and a token takes longer. Assisted decoding sets aside 64.
        dtype: of the keys and values: the model's, or torch.int8 for about half the bytes of bfloat16.

    Raises:
        ValueError: if the model has no schedule, or one that does not fit.
    """

    def __init__(self, config: PreTrainedConfig, *, slack: int = 1, dtype: torch.dtype | None = None) -> None:
        if isinstance(slack, bool) or not isinstance(slack, int) or slack < 0:
            raise ValueError(f"slack must be an integer >= 0, got {slack!r}")
        if dtype not in (None, torch.int8):
            raise ValueError(f"dtype must be None, for the model's own, or torch.int8, got {dtype}")
        plan = plan_of(config)
        self.config = config.get_text_config(decoder=True)
        self._last: DSMRLayer | None = None  # that was handed keys
        self._memories = [
            DSMRLayer(horizon, plan.segment_length, slack, dtype, depth=len(plan.horizons)) for horizon in plan.horizons
        ]
        super().__init__(layers=[*self._memories])

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, and their scales, in all layers; 0 before the first token."""
        return sum(layer.memory.nbytes for layer in self._memories if layer.memory is not None)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values of a layer, to be attended to by the attention implementation "dsmr".

        Raises:
            RuntimeError: if the model attends with another implementation.
        """
        if self.config._attn_implementation != ATTENTION:
            raise RuntimeError(
                f'a DSMRCache needs model.set_attn_implementation("{ATTENTION}"), but the model that it was made for '
                f'attends with "{self.config._attn_implementation}"'
            )
        if self._last is not None and self._last.offered is not None:
            raise RuntimeError(
                f'this model does not hand the keys of a DSMRCache to the attention implementation "{ATTENTION}" as '
                "they are, or was interrupted while it did: it cannot have memory horizons, or needs cache.reset()"
            )
        self._last = self._memories[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


_offers: WeakValueDictionary[int, DSMRLayer] = WeakValueDictionary()


def claim(key: Tensor) -> DSMRLayer | None:
    """The layer whose cache gave out these keys, once; None = they come from elsewhere."""
    layer = _offers.pop(id(key), None)
    if layer is None or layer.offered is not key:
        return None
    layer.offered = None
    return layer


def piece_starts(starts: Tensor, tokens: int) -> Tensor:
    """(batch, tokens) int32 as `piece_start` of `memory_attention`, of rows whose texts begin at `starts` (batch,);
    what lies before a text is a piece of its own, which nobody reads."""
    token = torch.arange(tokens, device=starts.device)
    begun = (token >= starts[:, None]) & (starts[:, None] >= 0)
    return torch.where(begun, starts[:, None], -1).to(torch.int32)


def visibility(segment_length: int | None, position: Tensor | None, starts: Tensor | None) -> dict[str, Any]:
    """The arguments of `memory_attention` that say who sees whom, for rows with `position` (batch,) tokens of their
    texts behind them, None = none, or which begin in this call, at `starts` (batch,)."""
    if segment_length is None:
        return {"visibility": "sliding"}
    offset: int | Tensor = 0
    if position is not None:
        offset = position if starts is None else torch.where(starts >= 0, -starts, position)
    elif starts is not None:
        offset = -starts
    return {"segment_length": segment_length, "segment_offset": offset % segment_length}
