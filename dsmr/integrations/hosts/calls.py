"""`RecurrentAttention` behind the calls of its hosts: what a block of theirs hands over, and what it wants back.

A host that has no memory prepares masks, positions and caches for its attention. The memory makes them needless, so all
that is done with them here is to see that they ask for nothing else: plain causal attention over the call's tokens.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr.model.hosts import HostAttention
from dsmr.model.recurrent import RecurrentAttention
from dsmr_kernels.holding import may_look

HIDDEN = -1e4  # what is added to a score to hide it is far below, and a bias far above
ONLY = "a layer with a memory is causal over all tokens of its call"


def check_mask(mask: Tensor | None, tokens: int, window: int | None, name: str, *, true_is_seen: bool) -> None:
    """`ValueError` unless a mask (..., tokens, tokens) is that of causal attention, within `window` if there is one.

    Args:
        mask: boolean, true where a key is seen or, for other hosts, where it is not; or floating, to be added.
    """
    if mask is None:
        return
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{name} cannot be looked at under torch.compile: give none, or is_causal=True where the host takes it "
            '(models of Transformers make none with attn_implementation="sdpa" where no row is padded)'
        )
    if mask.dim() < 2 or tuple(mask.shape[-2:]) != (tokens, tokens):
        raise ValueError(f"{name} must be causal over {tokens} tokens, got shape {tuple(mask.shape)}: {ONLY}")
    token = torch.arange(tokens, device=mask.device)
    back = token[:, None] - token
    wanted = (back >= 0) & (back < (window or tokens))
    if mask.dtype == torch.bool:
        plain = bool((mask == (wanted if true_is_seen else ~wanted)).all())
    else:
        plain = bool(torch.where(wanted, mask == 0, mask < HIDDEN).all())
    if not plain:
        raise ValueError(
            f"{name} is not a plain causal one: {ONLY}. Padding, biases and packed rows cannot be taken: give whole "
            "rows, and piece_start by MemoryState.pieces where pieces begin"
        )


def _masks_some(padding: Tensor) -> bool:
    """Whether a key_padding_mask of `nn.MultiheadAttention` hides a token; what cannot be looked at may."""
    return torch.compiler.is_compiling() or bool((padding if padding.dtype == torch.bool else padding != 0).any())


class _Guest(RecurrentAttention):
    """With what its host's call is held against."""

    window: int | None = None

    def remember(self, host: HostAttention, module: Any) -> None:
        """Keep what a call is held against, of the module that is replaced."""
        self.window = host.window


class TransformersAttention(_Guest):
    """In a block of Hugging Face Transformers."""

    def forward(self, hidden_states: Tensor, **named: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """(B, T, d_model) -> (B, T, d_model), and None for the weights, which are never there.

        Raises:
            ValueError: for a cache, cross-attention, positions with gaps, or a mask that is not causal.
        """
        if named.get("past_key_values") is not None:
            raise ValueError(
                "this model's attention was replaced and holds its own memory: call it with use_cache=False; to "
                "generate with a cache, leave the model as it is and use dsmr.integrations.huggingface"
            )
        if named.get("encoder_hidden_states") is not None:
            raise ValueError(f"encoder_hidden_states is cross-attention: {ONLY}")
        tokens, mask = hidden_states.shape[1], named.get("attention_mask")
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"attention_mask of type {type(mask).__name__} cannot be looked at: {ONLY}")
        check_mask(mask, tokens, self.window, "attention_mask", true_is_seen=True)
        positions = named.get("position_ids")
        if positions is not None and may_look(positions) and bool((positions.diff(dim=-1) != 1).any()):
            raise ValueError("position_ids must go up by one in every row: where pieces begin, use MemoryState.pieces")
        return super().forward(hidden_states), None


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` of a model whose attention was replaced: it hands over the whole text for every token, which a
    stream would take for more text.

    Raises:
        ValueError: inside a stream.
    """
    if any(module.in_stream for module in model.modules() if isinstance(module, RecurrentAttention)):
        raise ValueError(
            "generate hands over the whole text for every token, and a stream would take it for more text: generate "
            "outside of it, or leave the model as it is and use dsmr.integrations.huggingface"
        )
    return type(model).generate(model, *args, **kwargs)


class MultiheadAttention(_Guest):
    """In the place of an `nn.MultiheadAttention`."""

    in_proj_bias = None  # what nn.TransformerEncoderLayer asks before it would compute without calling its attention
    in_proj_weight = None
    _qkv_same_embed_dim = False
    batch_first = True

    def remember(self, host: HostAttention, module: Any) -> None:
        super().remember(host, module)
        self.batch_first = module.batch_first
        self.num_heads, self.embed_dim = module.num_heads, module.embed_dim

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As of `nn.MultiheadAttention`, with None for the weights, which are never there.

        Raises:
            ValueError: for cross-attention, padding, rows without a batch, or attention that is not causal.
        """
        if key is not query or value is not query:
            raise ValueError(f"query, key and value must be one tensor: {ONLY}, and of no other sequence")
        if query.dim() != 3:
            raise ValueError(f"query must have three dimensions, batch included, got {tuple(query.shape)}")
        if key_padding_mask is not None and _masks_some(key_padding_mask):
            raise ValueError(f"key_padding_mask masks tokens: {ONLY}, so give rows without padding")
        x = query if self.batch_first else query.transpose(0, 1)
        if attn_mask is None and not is_causal:
            raise ValueError(f"this call attends in both directions: {ONLY}; give is_causal=True or a causal attn_mask")
        if not (is_causal and torch.compiler.is_compiling()):
            check_mask(attn_mask, x.shape[1], None, "attn_mask", true_is_seen=False)
        y = super().forward(x)
        return (y if self.batch_first else y.transpose(0, 1)), None
