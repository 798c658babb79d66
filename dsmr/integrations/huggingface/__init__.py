"""Hugging Face Transformers: an unchanged decoder generates with a memory horizon in every layer.

    model.set_attn_implementation("dsmr")
    set_schedule(model, "two_scale(layers=32, long=8192, short=512, n_long=4)")
    model.generate(ids, attention_mask=mask, past_key_values=DSMRCache(model.config))

Importing this registers the attention implementation "dsmr", with its masks, in transformers (docs/huggingface.md).
"""

try:
    from transformers.cache_utils import get_layer_types_and_kwargs as _  # the newest of what is used
except ImportError as error:
    raise ImportError(
        "dsmr.integrations.huggingface needs transformers 5.23 or newer: pip install 'dsmr[hf]'"
    ) from error

from transformers import AttentionInterface, AttentionMaskInterface

from dsmr.integrations.huggingface.attention import attention, row_starts
from dsmr.integrations.huggingface.cache import DSMRCache
from dsmr.integrations.huggingface.planning import ATTENTION, get_schedule, set_schedule

__all__ = ["DSMRCache", "get_schedule", "set_schedule"]

AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, row_starts)
