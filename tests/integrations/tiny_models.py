"""Models of Transformers with a few thousand random weights: nothing is fetched."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dsmr.integrations.huggingface import set_schedule

LAYERS, VOCABULARY, PAD = 3, 61, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, GROUPED | {"sliding_window": None}),
    "mistral with its window": (MistralForCausalLM, MistralConfig, GROUPED | {"sliding_window": 12}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, GROUPED),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 4096}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GROUPED | {"sliding_window": 12}),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        GROUPED | {"sliding_window": 12, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}

WIDE: dict[str, Any] = {"intermediate_size": 48}
OTHERS: dict[str, dict[str, Any]] = {  # by the beginning of their classes' names
    "Gemma": GROUPED,
    "Phi": WIDE,
    "Phi3": WIDE,
    "Olmo2": WIDE,
    "Olmo3": GROUPED | {"sliding_window": 12},
    "GPTNeoX": WIDE,
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Starcoder2": WIDE,
    "Cohere2": GROUPED | {"sliding_window": 12},
    "SmolLM3": WIDE,
    "Granite": WIDE,
    "Qwen3Moe": GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    "Exaone4": GROUPED | {"sliding_window": 12},
    "Glm4": GROUPED,
}
WITHOUT_INTERFACE: dict[str, dict[str, Any]] = {"Falcon": {}, "Bloom": {}, "GPTJ": {"rotary_dim": 4}}


def other(name: str) -> PreTrainedModel:
    """One of `OTHERS` or `WITHOUT_INTERFACE`, as `tiny`."""
    sizes = (OTHERS | WITHOUT_INTERFACE)[name]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SIZES | sizes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tiny(name: str, **changed: Any) -> PreTrainedModel:
    """A model of its default initial weights, the same at every call, in evaluation, as Transformers runs it."""
    model, config, sizes = MODELS[name]
    torch.manual_seed(1)
    return model(config(**SIZES | sizes | changed)).eval()


def with_horizons(model: PreTrainedModel, schedule: str, **options: Any) -> PreTrainedModel:
    model.set_attn_implementation("dsmr")
    set_schedule(model, schedule, **options)
    return model


def prompt(*lengths: int) -> tuple[Tensor, Tensor]:
    """Rows of random tokens of these lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(2)
    longest = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask
