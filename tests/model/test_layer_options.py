"""What the attention of other models has, a `DSMRAttention` can have: biases, norms, dropout, part rotary."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.model.attention import DSMRAttention
from dsmr.model.positions import Rotary
from dsmr_kernels.tolerance import error

EVERY = {
    "bias": {"bias": True},
    "biases of q, k and v": {"bias": "qkv"},
    "a head_dim of its own": {"head_dim": 10},
    "q/k norm": {"qk_norm": True, "norm_eps": 1e-3},
    "part rotary": {"rotary_dim": 4},
    "frequencies": {"rotary_dim": 4, "rope_frequencies": [0.5, 0.01]},
    "scale": {"scale": 0.7},
    "no positions": {"position": "none", "bias": True},
    "sinusoidal positions": {"position": "sinusoidal", "bias": True},
    "all": {"bias": True, "head_dim": 12, "qk_norm": True, "rotary_dim": 6, "scale": 0.2},
}


def in_words(layer: DSMRAttention, x: Tensor) -> Tensor:
    """One call over x (1, T, d_model) with nothing behind it, written out."""
    from dsmr.model.positions import sinusoids

    tokens, dim, heads, kv_heads = x.shape[1], layer.head_dim, layer.n_heads, layer.n_kv_heads
    place = torch.arange(tokens)[None]
    placed = x + sinusoids(place, layer.d_model).to(x.dtype) if layer.position == "sinusoidal" else x
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    biases = [None] * 3 if layer.qkv.bias is None else layer.qkv.bias.split(sizes)
    q, k, v = (
        F.linear(source, weight, bias).view(1, tokens, -1, dim).transpose(1, 2)
        for source, weight, bias in zip((placed, placed, x), layer.qkv.weight.split(sizes), biases, strict=True)
    )
    if layer.q_norm is not None:
        q, k = (
            y * (y.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight
            for y, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
    if layer.position == "rope":
        turned = layer.rotary_dim
        frequencies = layer.rope_frequencies or [layer.rope_base ** (-2 * pair / turned) for pair in range(turned // 2)]
        angles = place[0][:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
        rotary = Rotary(angles.cos().float()[None, None], angles.sin().float()[None, None])
        q, k = (torch.cat([rotary(y[..., :turned]), y[..., turned:]], -1) for y in (q, k))
    group = heads // kv_heads
    y = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True, scale=layer.scale
    )
    return layer.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", EVERY)
def test_a_layer_with_options_is_what_they_say(name: str) -> None:
    """Outputs and the gradients of all weights; query head h reads KV head h // (n_heads / n_kv_heads)."""
    layer = DSMRAttention(32, 4, n_kv_heads=2, horizon=20, **EVERY[name]).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    expected, found = in_words(layer, x), layer(x)[0]
    assert error(found, expected) < 1e-5  # angles and turns are rounded to float32, by ours and in words apart
    grad = torch.randn_like(x)
    wanted = torch.autograd.grad(expected, list(layer.parameters()), grad)
    for one, other in zip(torch.autograd.grad(found, list(layer.parameters()), grad), wanted, strict=True):
        assert error(one, other) < 2e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_layer_with_options_is_the_same_however_a_stream_is_cut(name: str) -> None:
    layer = DSMRAttention(32, 4, n_kv_heads=2, horizon=7, segment_length=5, **EVERY[name]).double()
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = layer(x)
        memory, parts = None, []
        for part in x.split([1, 8, 2, 12], 1):
            y, memory = layer(part, memory)
            parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-12


def test_dropout_is_of_the_output_and_in_training_only() -> None:
    layer, x = DSMRAttention(16, 2, horizon=8, dropout=0.5), torch.randn(2, 50, 16)
    torch.manual_seed(3)
    dropped = layer(x)[0]
    torch.manual_seed(3)
    kept = layer.eval()(x)[0]
    assert torch.equal(F.dropout(kept, 0.5), dropped) or bool((dropped == 0).float().mean().sub(0.5).abs() < 0.1)
    assert torch.equal(dropped[dropped != 0], (2 * kept)[dropped != 0])
    assert not bool((kept == 0).any())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1: the kernels never hold the attention weig"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"head_dim": 0}, "head_dim must be an integer >= 1, got 0"),
        ({"head_dim": 5}, "rope needs an even head_dim, got head_dim = 5"),
        ({"bias": "kv"}, "bias must be True, False or \"qkv\", got 'kv'"),
        ({"rotary_dim": 3}, "rotary_dim must be even, at least 2 and at most head_dim = 8, got 3"),
        ({"rotary_dim": 10}, "rotary_dim must be even, at least 2 and at most head_dim = 8, got 10"),
        ({"rotary_dim": 4, "position": "none"}, "rotary_dim goes with position \"rope\" only, got position 'none'"),
        ({"rope_frequencies": [1.0]}, "rope_frequencies must hold one number for each of the 4 pairs, got 1"),
        ({"bias": 1}, 'bias must be True, False or "qkv", got 1'),
        ({"rope_base": 0.0}, "rope_base must be above 0 and finite, got 0.0"),
        ({"rope_base": float("nan")}, "rope_base must be above 0 and finite, got nan"),
        ({"rope_frequencies": [1.0, 0.1, float("inf"), 0.0]}, "rope_frequencies must be finite, got"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"qk_norm": True, "norm_eps": 0.0}, "norm_eps must be above 0 and finite, got 0.0"),
    ],
)
def test_options_that_cannot_be_are_refused_when_the_layer_is_made(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSMRAttention(32, 4, horizon=8, **options)


@pytest.mark.parametrize("shape", [(2, 5, 31), (5, 32), (1, 2, 5, 32)])
def test_inputs_of_another_shape_are_refused_in_a_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(batch, tokens, 32\), got \("):
        DSMRAttention(32, 4, horizon=8)(torch.randn(shape))
