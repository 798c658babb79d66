"""A Llama that nobody changed, generating in a cache that does not grow: long horizons below, a short one above."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmr.integrations.huggingface import DSMRCache, set_schedule


def main(tokens: int = 300) -> list[int]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()  # or LlamaForCausalLM.from_pretrained(...)
    model.set_attn_implementation("dsmr")
    set_schedule(model, "two_scale(layers=4, long=128, short=16, n_long=1)")

    ids = torch.randint(1, 100, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # the second prompt is shorter: padded on the left
    cache = DSMRCache(model.config)
    sizes = []
    for _ in range(2):  # generation goes on with the same cache
        ids = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens // 2, do_sample=False
        )
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        sizes.append(cache.nbytes)
    print(f"{ids.shape[1]} tokens a row; bytes of the cache after each half: {sizes}")
    return sizes


if __name__ == "__main__":
    main()
