"""What Transformers calls in every layer, and the mask that it prepares for all of them.

One mask serves all layers, whose horizons differ, so it says nothing of horizons: only at which of the call's tokens
each row's text begins. The rest is `dsmr_kernels.visibility`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from dsmr.integrations.huggingface.cache import claim, piece_starts, visibility
from dsmr.integrations.huggingface.planning import ATTENTION, plan_of
from dsmr_kernels import memory_attention

NAME = f'attn_implementation="{ATTENTION}"'


def row_starts(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Which of the keys each row's text begins with, where rows are padded on the left.

    Args:
        q_length, kv_length: of the queries and keys of the call.
        q_offset, kv_offset: tokens before the first of them.
        attention_mask: (batch, at least kv_offset + kv_length), False where a row is padded.

    Returns:
        (batch,) int64: the index of a key, kv_length = later, negative = before the first of them. None where all texts
        began before the first key, or with it in all rows.

    Raises:
        ValueError: for what a memory cannot see: padding elsewhere, packed sequences, a model's own masks, static
            caches.
    """
    if use_vmap or not allow_is_causal_skip:
        raise ValueError(
            f"{NAME} takes no packed sequences (position_ids that begin again in a row) and no mask beside "
            "causality and padding on the left"
        )
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise ValueError(f"{NAME} needs keys that end with the newest token: no static cache, no prefix")
    return None if attention_mask is None else text_starts(attention_mask, kv_offset, kv_length, NAME)


def text_starts(attention_mask: Tensor, past: int, tokens: int, who: str) -> Tensor | None:
    """At which of a call's `tokens` each row's text begins, with `past` tokens before the call; see `row_starts`.

    Args:
        attention_mask: (batch, at least past + tokens), 0 where a row is padded.
        who: takes it, for what is refused.

    Raises:
        ValueError: if the mask has another shape, or padding that is not on the left.
    """
    end = past + tokens
    if attention_mask.dim() != 2 or attention_mask.shape[1] < end:
        raise ValueError(
            f"attention_mask must have shape (batch, tokens seen) = ({attention_mask.shape[0]}, {end}), got "
            f"{tuple(attention_mask.shape)}"
        )
    before = min(past, 1)  # a token before the call tells whether a text had begun
    texts = attention_mask[:, past - before : end].bool()
    if bool(texts.all()):
        return None
    if bool((texts[:, :-1] & ~texts[:, 1:]).any()):
        raise ValueError(f"{who} takes padding on the left only, but attention_mask has it behind a text")
    return tokens - texts[:, before:].sum(1) - (texts[:, 0] & before).long()


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention with the horizon of the module's layer: over the memory of a `DSMRCache`, or without one over the keys
    of the call, which are then all that there are (training on whole rows).

    Args:
        module: the layer's attention, a module that knows its `config` and `layer_idx`.
        query: (batch, Hq, T, head_dim).
        key, value: (batch, Hkv, S, head_dim), S >= T, ending with the queries' tokens.
        attention_mask: what `row_starts` gave.
        s_aux: (Hq,) learned sinks.

    Returns:
        (batch, T, Hq, head_dim), and None for the weights, which are never there.

    Raises:
        ValueError: for what a memory cannot do: dropout, a capped score, a bias, masks from elsewhere.
    """
    layer = claim(key)
    if dropout:
        raise ValueError(f"{NAME} has no dropout on attention, got {dropout}: set attention_dropout (attn_pdrop) to 0")
    if softcap is not None or position_bias is not None or kwargs.get("cu_seq_lens_q") is not None:
        raise ValueError(f"{NAME} has no softcap, no position_bias and no packed sequences")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} is causal: neither cross-attention nor attention in both directions")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 1):
        raise ValueError(f"{NAME} takes no mask that was made elsewhere: give attention_mask as (batch, tokens)")
    query, key, value = _in_one_dtype(query, key, value)
    if layer is None:
        out = _whole_rows(module, query, key, value, attention_mask, scaling, s_aux)
    else:
        depth = module.config.num_hidden_layers
        if layer.depth != depth:
            raise ValueError(f"this cache was made for a model of {layer.depth} layers, but this one has {depth}")
        out = layer.attend(query, key, value, attention_mask, scale=scaling, sinks=s_aux)
    return out.transpose(1, 2), None


def _in_one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast rotary keys and queries come in float32, values do not: all in autocast's dtype."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    return tuple(x.to(tensors[2].dtype) for x in tensors)


def _whole_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    plan = plan_of(module.config)
    if plan.segment_length is not None and key.shape[2] > query.shape[2]:
        raise ValueError("a schedule with segments generates with a DSMRCache as past_key_values only")
    out = memory_attention(
        query,
        key,
        value,
        horizon=plan.horizons[module.layer_idx],
        **visibility(plan.segment_length, None, starts),
        piece_start=None if starts is None else piece_starts(starts, key.shape[2]),
        scale=scale,
        sinks=sinks,
    )
    assert isinstance(out, Tensor)
    return out
