"""With a schedule, a model of Transformers sees what the schedule says, no more, in as many bytes as it says."""

import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.23")

from tiny_models import LAYERS, prompt, tiny, with_horizons
from transformers import PreTrainedModel

from dsmr.integrations.huggingface import DSMRCache, get_schedule
from dsmr_kernels.visibility import lowest_visible

HORIZONS = (9, 2, 0)
TWO_SCALE = f"two_scale(layers={LAYERS}, long=40, short=8, n_long=1)"


def seen(mask: Tensor, horizon: int, segment_length: int | None) -> Tensor:
    """(batch, 1, T, T) as a mask that is added to scores: a query sees itself and the tokens of its row's text, counted
    from where it begins, that the horizon reaches."""
    starts = mask.argmax(1)[:, None]
    token = torch.arange(mask.shape[1])
    low = lowest_visible(
        token - starts,
        horizon=horizon,
        segment_length=segment_length,
        segment_offset=0,
        visibility="sliding" if segment_length is None else "segment",
    )
    low = torch.maximum(low + starts, starts)
    visible = (token <= token[:, None]) & (token >= low[:, :, None])
    visible |= torch.eye(len(token), dtype=torch.bool)  # padding sees itself, so that nothing is undefined
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)[:, None]


def masked(model: PreTrainedModel, masks: list[Tensor]) -> PreTrainedModel:
    """The model as Transformers runs it, each of its layers with a dense mask of its own."""
    model.set_attn_implementation("sdpa")
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers

    def give(mask: Tensor) -> Any:
        def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, kwargs | {"attention_mask": mask}

        return before

    for layer, mask in zip(layers, masks, strict=True):
        attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
        attention.register_forward_pre_hook(give(mask), with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("name", "segment_length"),
    [
        *((name, None) for name in ("llama", "gpt2", "qwen3", "mistral with its window", "gemma3")),
        *((name, 4) for name in ("llama", "gpt2")),  # refused where the model has a window
    ],
)
def test_a_schedule_is_a_dense_mask(name: str, segment_length: int | None) -> None:
    """Whole rows, and in pieces of any size down to single tokens, of three rows padded on the left."""
    ids, mask = prompt(37, 30, 8)
    model = with_horizons(tiny(name), f"explicit(horizons={list(HORIZONS)})", segment_length=segment_length).double()
    masks = [seen(mask, horizon, segment_length).double() for horizon in HORIZONS]
    kept = mask.bool()
    cuts = (0, 3, 4, 17, 18, 29, 30, 31, 32, 33, 34, 37)  # two rows begin in later calls, one with a call
    with torch.no_grad():
        expected = masked(tiny(name).double(), masks)(ids, attention_mask=mask, use_cache=False).logits[kept]
        found = [model(ids, attention_mask=mask, use_cache=False).logits]
        for slack in (0, 1, 7):
            cache = DSMRCache(model.config, slack=slack)
            pieces = [
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
                for a, b in itertools.pairwise(cuts)
            ]
            found.append(torch.cat(pieces, 1))
    for logits in found:
        torch.testing.assert_close(logits[kept], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_any_rows_in_any_pieces(seed: int) -> None:
    """Random rows, horizons, segments, cuts, slack; between the calls drafts taken back, and rows swapped and back."""
    dice = random.Random(seed)
    lengths = [dice.randint(1, 60) for _ in range(dice.randint(1, 4))]
    horizons = [dice.choice((0, 1, 2, 5, 13, 70)) for _ in range(LAYERS)]
    segment_length, slack = dice.choice((None, None, 1, 3, 8)), dice.choice((0, 1, 2, 6))
    ids, mask = prompt(*lengths)
    model = with_horizons(tiny("llama"), f"explicit(horizons={horizons})", segment_length=segment_length).double()
    masks = [seen(mask, horizon, segment_length).double() for horizon in horizons]
    cache, pieces, begin = DSMRCache(model.config, slack=slack), [], 0
    with torch.no_grad():
        expected = masked(tiny("llama").double(), masks)(ids, attention_mask=mask, use_cache=False).logits
        while begin < ids.shape[1]:
            if slack and begin >= ids.shape[1] - min(lengths):  # all texts have begun
                draft = torch.cat([mask[:, :begin], mask.new_ones(len(lengths), slack)], 1)
                model(ids[:, -1:].repeat(1, slack), attention_mask=draft, past_key_values=cache)
                cache.crop(-slack)
            swap = torch.randperm(len(lengths))
            cache.reorder_cache(swap)
            cache.reorder_cache(swap.argsort())
            end = min(begin + dice.choice((1, 1, 2, 3, 16, 40)), ids.shape[1])
            out = model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache)
            pieces.append(out.logits)
            begin = end
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[kept], expected[kept], rtol=0, atol=1e-12)


def test_a_window_of_the_model_stays_its_bound() -> None:
    model = with_horizons(tiny("mistral with its window"), "explicit(horizons=[40, 11, 3])")
    assert [layer.horizon for layer in DSMRCache(model.config).layers] == [11, 11, 3]
    model = with_horizons(
        tiny("gemma3", layer_types=["sliding_attention", "full_attention", "full_attention"]), TWO_SCALE
    )
    assert [layer.horizon for layer in DSMRCache(model.config).layers] == [11, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize(("slack", "tokens"), [(0, 250), (1, 2000)])
def test_bytes_are_the_budget_and_stay(slack: int, tokens: int) -> None:
    """While the tokens stay those of a model that computes everything anew behind a dense mask."""
    horizons, batch = (30, 8), 2
    model = with_horizons(tiny("llama", num_hidden_layers=2), "two_scale(layers=2, long=30, short=8, n_long=1)")
    cache = DSMRCache(model.config, slack=slack)
    ids, mask = prompt(50, 21)
    token = 2 * 2 * 8 * 4 * batch  # bytes of a token in a layer: keys and values of two heads in float32
    budget = get_schedule(model).budget_bytes(n_heads=2, head_dim=8, bytes_per_element=4, batch=batch)
    assert budget == sum(horizons) * token
    places = set()
    for new in (1, 100, tokens - 101):
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
        mask = torch.cat([mask, mask.new_ones(batch, new)], 1)
        assert cache.nbytes == budget + slack * len(horizons) * token
        places.add(tuple(layer.memory.k.data_ptr() for layer in cache.layers))
    assert len(places) == 1  # nothing was allocated anew
    assert ids.shape[1] == cache.get_seq_length() + 1 == 50 + tokens

    tail = slice(-100, None)  # its second half lies deeper than both horizons together reach
    positions = mask.cumsum(1)[:, tail] - 1
    dense = masked(tiny("llama", num_hidden_layers=2), [seen(mask[:, tail], horizon, None) for horizon in horizons])
    with torch.no_grad():
        logits = dense(ids[:, tail], position_ids=positions, use_cache=False).logits
    assert torch.equal(logits[:, 50:-1].argmax(-1), ids[:, tail][:, 51:])


def test_memory_learns_over_segments_in_a_row() -> None:
    """Training segment by segment with a carried memory: the loss of whole rows, gradients within each call."""
    ids, _ = prompt(24, 24)
    model = with_horizons(tiny("llama"), TWO_SCALE)
    cache = DSMRCache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    for begin in (0, 8, 16):
        out = model.train()(ids[:, begin : begin + 8], past_key_values=cache, labels=ids[:, begin : begin + 8])
        torch.testing.assert_close(out.logits, whole[:, begin : begin + 8], rtol=0, atol=1e-5)
        out.loss.backward()
    assert all(x.grad is not None for x in model.parameters())


@pytest.mark.parametrize("segment_length", [None, 4])
def test_taking_back_is_never_having_seen(segment_length: int | None) -> None:
    model = with_horizons(tiny("llama"), TWO_SCALE, segment_length=segment_length)
    ids, _ = prompt(90, 90)
    caches = [DSMRCache(model.config, slack=5) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :70], past_key_values=cache)
        model(ids[:, 80:85], past_key_values=caches[1])  # a draft
        caches[1].crop(-5)
        straight, again = (model(ids[:, 70:], past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(again, straight, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"6 tokens cannot be taken back.*DSMRCache\(config, slack=6\)"):
        caches[1].crop(-6)


def test_rows_are_repeated_and_selected() -> None:
    model = with_horizons(tiny("llama"), TWO_SCALE)
    ids, mask = prompt(15, 9)
    cache = DSMRCache(model.config)
    assert cache.batch_size == -1
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
        cache.reorder_cache(torch.tensor([2, 0]))
        assert cache.batch_size == 2
        swapped = model(ids[[1, 0], -1:], past_key_values=cache, attention_mask=None).logits
        other = DSMRCache(model.config)
        model(ids, attention_mask=mask, past_key_values=other)
        straight = model(ids[:, -1:], past_key_values=other).logits
    torch.testing.assert_close(swapped, straight.flip(0), rtol=0, atol=1e-6)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
