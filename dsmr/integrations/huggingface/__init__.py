"""Hugging Face Transformers, both ways: their decoders with our memories, and our model among their models.

An unchanged decoder generates with a memory horizon in every layer:

    model.set_attn_implementation("dsmr")
    set_schedule(model, "two_scale(layers=32, long=8192, short=512, n_long=4)")
    model.generate(ids, attention_mask=mask, past_key_values=DSMRCache(model.config))

A `DSMRModel` is loaded by the Auto classes, generates and goes through pipelines as their models do:

    AutoModelForCausalLM.from_pretrained(folder).generate(ids)

Importing this registers the attention implementation "dsmr", with its masks, and the model type "dsmr" in transformers
(docs/huggingface.md).
"""

try:
    from transformers.cache_utils import get_layer_types_and_kwargs as _  # the newest of what is used
except ImportError as error:
    raise ImportError(
        "dsmr.integrations.huggingface needs transformers 5.23 or newer: pip install 'dsmr[hf]'"
    ) from error

from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

from dsmr.integrations.huggingface.attention import attention, row_starts
from dsmr.integrations.huggingface.cache import DSMRCache
from dsmr.integrations.huggingface.causal_lm import DSMRForCausalLM, DSMRForCausalLMConfig
from dsmr.integrations.huggingface.conversion import from_run, to_run, tokenizer_of, wrap
from dsmr.integrations.huggingface.planning import ATTENTION, get_schedule, set_schedule
from dsmr.integrations.huggingface.state_cache import DSMRStateCache

__all__ = [
    "DSMRCache",
    "DSMRForCausalLM",
    "DSMRForCausalLMConfig",
    "DSMRStateCache",
    "from_run",
    "get_schedule",
    "set_schedule",
    "to_run",
    "tokenizer_of",
    "wrap",
]

AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, row_starts)

AutoConfig.register(DSMRForCausalLMConfig.model_type, DSMRForCausalLMConfig)
AutoModelForCausalLM.register(DSMRForCausalLMConfig, DSMRForCausalLM)
