"""With horizons that reach over everything, a model of Transformers does what it does without them."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.23")

from tiny_models import LAYERS, MODELS, OTHERS, other, prompt, tiny, with_horizons
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from dsmr.integrations.huggingface import DSMRCache, get_schedule

FULL = f"full(layers={LAYERS}, length=512)"


def guest(name: str) -> PreTrainedModel:
    return with_horizons(tiny(name), FULL)


def greedy(model: PreTrainedModel, new: int, *lengths: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The tokens that are generated, and the scores of each (batch, new, vocabulary)."""
    ids, mask = prompt(*lengths)
    options = {"max_new_tokens": new, "do_sample": False} | options
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, 1) if out.logits else torch.empty(0)


def allowed(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_full_horizons_generate_what_the_model_generates(name: str) -> None:
    """Three rows that are padded on the left."""
    new = 200 if name in ("llama", "mistral", "qwen3", "gpt2") else 60
    tokens, logits = greedy(tiny(name), new, 17, 5, 11)
    model = guest(name)
    ours, our_logits = greedy(model, new, 17, 5, 11, past_key_values=DSMRCache(model.config))
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=0, atol=allowed(torch.float32))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MODELS),
        *((name, torch.float64) for name in MODELS if name != "gpt-oss"),  # whose experts are not computed in it
    ],
)
def test_full_horizons_give_the_logits_of_the_model(name: str, dtype: torch.dtype) -> None:
    """Of a whole prompt, without a cache, with one, in chunks, and behind a cache of Transformers."""
    host, model = tiny(name).to(dtype), guest(name).to(dtype)
    ids, mask = prompt(23, 7)
    kept = mask.bool()
    with torch.no_grad():
        expected = host(ids, attention_mask=mask).logits[kept]
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        found = [whole]
        for cache in (DSMRCache(model.config), DSMRCache(model.config, slack=0), DynamicCache(config=model.config)):
            pieces = [
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in ((0, 9), (9, 16), (16, 20), (20, 21), (21, 22), (22, 23))
            ]
            found.append(torch.cat(pieces, 1))
    for logits in found:
        torch.testing.assert_close(logits[kept], expected, rtol=0, atol=allowed(dtype))
    assert dtype == logits.dtype


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders_give_their_logits_too(name: str) -> None:
    host, model = other(name), with_horizons(other(name), FULL)
    ids, mask = prompt(23, 7)
    kept, cache = mask.bool(), DSMRCache(model.config)
    with torch.no_grad():
        expected = host(ids, attention_mask=mask).logits[kept]
        whole = model(ids, attention_mask=mask, use_cache=False).logits[kept]
        cuts = itertools.pairwise((0, 15, 21, 22, 23))
        pieces = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits for a, b in cuts]
    for logits in (whole, torch.cat(pieces, 1)[kept]):
        torch.testing.assert_close(logits, expected, rtol=0, atol=allowed(torch.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["beams", "chunked prefill", "samples"],
)
def test_ways_to_generate(options: dict[str, Any]) -> None:
    host, model = tiny("llama"), guest("llama")
    torch.manual_seed(0)
    tokens, _ = greedy(host, 40, 9, 6, **options)
    torch.manual_seed(0)
    ours, _ = greedy(model, 40, 9, 6, past_key_values=DSMRCache(model.config), **options)
    assert torch.equal(ours, tokens)


@pytest.mark.parametrize("horizon", [512, 9])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_assisted_decoding_takes_drafts_back(way: str, horizon: int) -> None:
    """With short horizons the drafts that are taken back have pushed tokens out of the memory, but for its slack."""
    model = with_horizons(tiny("llama"), f"uniform(layers={LAYERS}, horizon={horizon})")
    plain, _ = greedy(model, 60, 12, past_key_values=DSMRCache(model.config))
    if way == "assistant":
        torch.manual_seed(3)  # other weights, so that some drafts are wrong
        helper = tiny("llama")
        torch.nn.init.normal_(helper.lm_head.weight, std=0.02)
        options: dict[str, Any] = {"assistant_model": helper}
    else:
        options = {"prompt_lookup_num_tokens": 5}
    cache = DSMRCache(model.config)
    assisted, _ = greedy(model, 60, 12, past_key_values=cache, **options)
    assert torch.equal(assisted, plain)
    assert cache.get_seq_length() == assisted.shape[1] - 1


def test_a_conversation_goes_on_with_its_cache() -> None:
    host, model = tiny("qwen3"), guest("qwen3")
    cache = DSMRCache(model.config)
    first, _ = greedy(model, 20, 8, past_key_values=cache)
    longer = torch.cat([first, prompt(6)[0]], 1)
    ours = model.generate(longer, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, host.generate(longer, max_new_tokens=20, do_sample=False))


def test_a_prompt_is_read_once_for_several_continuations() -> None:
    """A copied cache is a cache of its own, in inference mode too."""
    model = with_horizons(tiny("llama"), f"uniform(layers={LAYERS}, horizon=6)")
    expected, _ = greedy(model, 20, 14, 9, past_key_values=DSMRCache(model.config))
    ids, mask = prompt(14, 9)
    cache = DSMRCache(model.config)
    with torch.inference_mode():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        for own in (copy.deepcopy(cache), cache):
            found = model.generate(ids, attention_mask=mask, past_key_values=own, max_new_tokens=20, do_sample=False)
            assert torch.equal(found, expected)


def test_the_schedule_is_saved_with_the_model(tmp_path: Path) -> None:
    model = with_horizons(tiny("llama"), f"uniform(layers={LAYERS}, horizon=6)")
    expected, _ = greedy(model, 30, 9, past_key_values=DSMRCache(model.config))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="dsmr")
    assert str(get_schedule(again)) == f"uniform(layers={LAYERS}, horizon=6)"
    found, _ = greedy(again, 30, 9, past_key_values=DSMRCache(again.config))
    assert torch.equal(found, expected)


def test_a_model_learns_over_whole_rows_what_it_learns_without() -> None:
    """Gradients, without a cache."""
    ids, mask = prompt(19, 12)
    grads = []
    for model in (tiny("llama"), guest("llama")):
        labels = ids.masked_fill(mask == 0, -100)
        model.train()(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append([x.grad for x in model.parameters()])
    for ours, theirs in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_autocast_and_eight_bits() -> None:
    """Under autocast keys come in float32 and values in bfloat16; an int8 memory rounds what it holds."""
    ids, _ = prompt(30)
    host, model = tiny("llama"), guest("llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = host(ids).logits
        for dtype in (None, torch.int8):
            cache = DSMRCache(model.config, dtype=dtype)
            pieces = [model(x, past_key_values=cache).logits for x in ids.split((20, 9, 1), 1)]
            torch.testing.assert_close(torch.cat(pieces, 1).float(), expected.float(), rtol=0, atol=0.02)
            assert cache.layers[0].memory.dtype == (dtype or torch.bfloat16)
