"""What a memory cannot take the place of is refused in a sentence, before it gives a wrong number."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")

from tiny_models import LAYERS, WITHOUT_INTERFACE, other, prompt, tiny, with_horizons
from transformers import BartConfig, Gemma2Config, GPT2Config, LlamaConfig, PreTrainedModel, StaticCache

from dsmr.integrations.huggingface import DSMRCache, get_schedule, set_schedule

SHORT = f"uniform(layers={LAYERS}, horizon=6)"


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ("uniform(layers=2, horizon=6)", {}, "the schedule has 2 layers, but the model has 3"),
        ("fhcr(layers=3, length=64, kv_heads=1)", {}, "asks for 1 KV heads in layer 0, but the model has 2"),
        ("uniform(layers=3, horizon=6, retention=random)", {}, "keeps the newest tokens only"),
        ("wide(layers=3)", {}, "schedule 'wide' is unknown"),
        (SHORT, {"segment_length": 0}, "segment_length must be None or an integer >= 1, got 0"),
    ],
)
def test_schedules_that_do_not_fit(schedule: str, options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        set_schedule(tiny("llama"), schedule, **options)


def test_schedules_that_fit_may_name_their_heads() -> None:
    model = tiny("llama")
    set_schedule(model, "fhcr(layers=3, length=64)")
    assert get_schedule(model).kv_heads == (2, 2, 2)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BartConfig(decoder_layers=3), "cross-attention"),
        (GPT2Config(n_layer=3, add_cross_attention=True), "cross-attention"),
        (Gemma2Config(num_hidden_layers=3), "capped scores"),
        (LlamaConfig(num_hidden_layers=3, is_causal=False), "both directions"),
    ],
)
def test_models_that_cannot_have_horizons(config: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        set_schedule(config, SHORT)


def test_segments_beside_a_window_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"layer 0 has a sliding window of its own \(12 tokens\)"):
        set_schedule(tiny("mistral with its window"), SHORT, segment_length=4)


def test_caches_that_do_not_fit() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="no memory schedule yet"):
        DSMRCache(model.config)
    with_horizons(model, SHORT)
    for options in ({"slack": -1}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            DSMRCache(model.config, **options)
    for layers in (2, 5):
        other = with_horizons(tiny("llama", num_hidden_layers=layers), f"uniform(layers={layers}, horizon=6)")
        with pytest.raises(ValueError, match=f"for a model of {layers} layers, but this one has 3"):
            model(prompt(5)[0], past_key_values=DSMRCache(other.config))


def test_a_cache_is_not_moved_off_its_device() -> None:
    cache = DSMRCache(with_horizons(tiny("llama"), SHORT).config)
    for layer in cache.layers:
        with pytest.raises(ValueError, match="not moved off its device: what it takes there, its schedule decides"):
            layer.offload()


def test_a_model_that_attends_otherwise() -> None:
    model = tiny("llama")
    set_schedule(model, SHORT)
    with pytest.raises(RuntimeError, match=r'set_attn_implementation\("dsmr"\).*attends with "sdpa"'):
        model.generate(prompt(5)[0], past_key_values=DSMRCache(model.config), max_new_tokens=2)


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_models_whose_attention_cannot_be_exchanged(name: str) -> None:
    """Transformers warns and leaves them as they are; their own attention would see the newest tokens alone."""
    model = with_horizons(other(name), SHORT)
    with pytest.raises(RuntimeError, match=r"needs model.set_attn_implementation"):
        model(prompt(5)[0], past_key_values=DSMRCache(model.config))


def test_keys_that_do_not_come_through() -> None:
    """A model that computes on the keys between the cache and the attention function."""
    model = with_horizons(tiny("llama"), SHORT)
    cache = DSMRCache(model.config)
    cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    with pytest.raises(RuntimeError, match="cannot have memory horizons"):
        model(prompt(5)[0], past_key_values=cache)
    cache.reset()
    model(prompt(5)[0], past_key_values=cache)


IDS, MASK = prompt(8, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model(IDS, attention_mask=MASK.index_fill(1, torch.tensor([7]), 0)), "padding on the left only"),
        (lambda model: model(IDS, attention_mask=MASK.index_fill(1, torch.tensor([3]), 0)), "padding on the left only"),
        (lambda model: model(IDS, attention_mask=torch.ones(2, 1, 8, 8).bool()), "no mask that was made elsewhere"),
        (lambda model: model(IDS, position_ids=torch.arange(4).repeat(2, 2), use_cache=False), "no packed sequences"),
        (
            lambda model: model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=32)),
            "no static cache",
        ),
        (lambda model: model.generate(IDS, cache_implementation="static", max_new_tokens=2), "no static cache"),
    ],
    ids=["right padding", "a gap", "a dense mask", "packed rows", "static cache", "generate with a static cache"],
)
def test_calls_that_a_memory_cannot_serve(call: Callable[[PreTrainedModel], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(with_horizons(tiny("llama"), SHORT))


def test_a_mask_of_the_new_tokens_alone() -> None:
    model = with_horizons(tiny("llama"), SHORT)
    cache = DSMRCache(model.config)
    model(IDS, attention_mask=MASK, past_key_values=cache)
    with pytest.raises(ValueError, match=r"\(batch, tokens seen\) = \(2, 9\), got \(2, 1\)"):
        model(IDS[:, :1], attention_mask=MASK[:, :1], past_key_values=cache)


def test_dropout_in_training() -> None:
    model = with_horizons(tiny("llama", attention_dropout=0.1), SHORT)
    cache = DSMRCache(model.config)
    with pytest.raises(ValueError, match="no dropout on attention"):
        model.train()(IDS, past_key_values=cache)
    model.eval()(IDS, past_key_values=cache)  # nothing has happened to it
    assert cache.get_seq_length() == IDS.shape[1]


def test_drafts_longer_than_the_slack() -> None:
    model = with_horizons(tiny("llama"), SHORT)
    cache = DSMRCache(model.config)
    model.generate(prompt(20)[0], past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"4 tokens cannot be taken back.*slack=4\)"):
        cache.crop(-4)


def test_transformers_missing() -> None:
    code = "import sys; sys.modules['transformers'] = None; import dsmr.integrations.huggingface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "needs transformers 5.23 or newer: pip install 'dsmr[hf]'" in done.stderr.splitlines()[-1]


def test_segments_behind_a_cache_of_transformers() -> None:
    model = with_horizons(tiny("llama"), SHORT, segment_length=4)
    with pytest.raises(ValueError, match="with a DSMRCache as past_key_values only"):
        model.generate(IDS, max_new_tokens=3)
