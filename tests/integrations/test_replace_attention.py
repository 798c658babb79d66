"""Attention of other people's models, replaced: what it did, with a memory; or refused, and the model as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_blocks import CausalSelfAttention, Encoder, MultiheadBlock, NanoBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from dsmr import DSMRAttention, RecurrentAttention, replace_attention, stream
from dsmr_kernels.tolerance import error

OURS: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": lambda: nn.Sequential(NanoBlock(), NanoBlock()),
    "blocks of nn.MultiheadAttention": lambda: nn.Sequential(MultiheadBlock(), MultiheadBlock()),
    "and tokens first": lambda: nn.Sequential(MultiheadBlock(False), MultiheadBlock(False)),
    "nn.TransformerEncoder": Encoder,
    "nn.TransformerEncoder, tokens first": lambda: Encoder(False),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_a_block_does_what_it_did_and_over_a_stream_what_it_does_over_the_whole(name: str, training: bool) -> None:
    """float64, exact; also the path that nn.TransformerEncoderLayer takes around its attention when it evaluates."""
    model = OURS[name]().double().train(training)
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = model(x)
        layers = replace_attention(model, "uniform(layers=2, horizon=100)")
        assert [layer.horizon for layer in layers] == [100, 100]
        assert error(model(x), expected) < 1e-12
        with stream(model, 2):
            parts = [model(part) for part in x.split([7, 1, 16], 1)]
    assert error(torch.cat(parts, 1), expected) < 1e-12


def test_a_shorter_horizon_is_that_of_a_dense_mask() -> None:
    model = nn.Sequential(NanoBlock(), NanoBlock()).double()
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    old = [copy.deepcopy(block.attn) for block in model]
    layers = replace_attention(model, "explicit(horizons=[6, 3])", visibility="sliding")
    token = torch.arange(24)
    back = token[:, None] - token
    for layer, host in zip(layers, old, strict=True):
        seen = (back >= 0) & (back <= layer.horizon)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in host.c_attn(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        assert error(layer(x), host.c_proj(y.transpose(1, 2).flatten(2))) < 1e-12


def test_training_goes_on_from_the_weights_that_were_there() -> None:
    model = OURS["nn.TransformerEncoder"]().double()
    for parameter in model.layers.layers[0].self_attn.parameters():
        parameter.requires_grad_(False)
    (frozen, learnt) = replace_attention(model, "uniform(layers=2, horizon=8)")
    model(torch.randn(2, 9, 32, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in learnt.parameters())


# --- one module -------------------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_so_and_nothing_else_whatever_the_mode() -> None:
    """Biases alone may be learnt (BitFit), and a model may be taken over under no_grad."""
    for learnt in ("weight", "bias"):
        host = CausalSelfAttention(32, 4)
        for name, parameter in host.named_parameters():
            parameter.requires_grad_(name.endswith(learnt))
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                layer = DSMRAttention.from_attention(host, horizon=8)
            assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
                f"{part}.{learnt}" for part in ("qkv", "out")
            }


def test_from_attention_takes_options_and_keeps_what_was_trained() -> None:
    host = CausalSelfAttention(dropout=0.3).eval()
    layer = RecurrentAttention.from_attention(host, horizon=9, segment_length=4, position="alibi")
    assert isinstance(layer, RecurrentAttention)
    assert (layer.horizon, layer.segment_length, layer.position, layer.dropout) == (9, 4, "alibi", 0.3)
    assert not layer.training
    assert torch.equal(layer.qkv.weight, host.c_attn.weight)
    assert layer.qkv.weight.data_ptr() != host.c_attn.weight.data_ptr()
    with pytest.raises(ValueError, match="n_heads is 4 in CausalSelfAttention, which was trained with it: 8"):
        DSMRAttention.from_attention(host, horizon=9, n_heads=8)


def _nano(change: Callable[[CausalSelfAttention], Any]) -> CausalSelfAttention:
    host = CausalSelfAttention()
    change(host)
    return host


def _odd_norm(host: CausalSelfAttention) -> None:
    host.q_norm = nn.LayerNorm(8)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout of weights": (
        lambda: nn.MultiheadAttention(32, 4, dropout=0.1),
        "has dropout .0.1., which a DSMRAttention",
    ),
    "bias_kv": (lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True), "has add_bias_kv"),
    "zero_attn": (lambda: nn.MultiheadAttention(32, 4, add_zero_attn=True, batch_first=True), "has add_zero_attn"),
    "cross": (lambda: nn.MultiheadAttention(32, 4, kdim=16, batch_first=True), "has kdim or vdim .* cross-attention"),
    "nanoGPT's dropout": (lambda: _nano(lambda host: setattr(host.attn_dropout, "p", 0.2)), "has attention dropout"),
    "a nanoGPT with more": (lambda: _nano(_odd_norm), r"has more parts than nanoGPT's \(\['q_norm'\]\)"),
    "grouped in one": (
        lambda: _nano(lambda host: setattr(host, "c_attn", nn.Linear(32, 64))),
        "c_attn of CausalSelfAttention must go from a width, .* to three times that width, got 32 to 64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_carry_over_is_refused_and_the_model_left_as_it_was(name: str) -> None:
    make, message = REFUSED[name]
    model = nn.Sequential(NanoBlock(), make(), nn.MultiheadAttention(32, 4, dropout=0.5))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message) as refused:
        replace_attention(model, "uniform(layers=3, horizon=8)")
    assert "Sequential is left as it was" in str(refused.value)
    assert "\n- 1: " in str(refused.value)
    assert "\n- 2: nn.MultiheadAttention has dropout (0.5)" in str(refused.value)  # all of them are listed
    assert dict(model.named_modules()) == before
    if name != "dropout of weights":
        with pytest.raises(ValueError, match=message):
            DSMRAttention.from_attention(make(), horizon=8)


Adapter = type("Linear", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})  # as PEFT names its


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda host: setattr(host, "c_attn", Adapter(32, 96)), "c_attn of CausalSelfAttention must be a plain proj"),
        (lambda host: prune.random_unstructured(host.c_proj, "weight", 0.5), "c_proj of CausalSelfAttention has hooks"),
        (lambda host: host.c_attn.register_full_backward_hook(print), "c_attn of CausalSelfAttention has hooks"),
        (lambda host: host.resid_dropout.register_forward_hook(print), "resid_dropout of CausalSelf.* has hooks"),
        (lambda host: host.register_forward_hook(print), "CausalSelfAttention has hooks, or a forward of its own"),
        (lambda host: setattr(host, "forward", print), "CausalSelfAttention has hooks, or a forward of its own"),
        (lambda host: setattr(host, "resid_dropout", nn.Linear(32, 32)), "resid_dropout of .* must be an nn.Dropout"),
    ],
)
def test_adapters_and_hooks_are_not_left_behind(change: Callable[[CausalSelfAttention], Any], message: str) -> None:
    model = nn.Sequential(NanoBlock())
    change(model[0].attn)
    before = dict(model.named_modules())
    with pytest.raises((TypeError, ValueError), match=message):
        DSMRAttention.from_attention(model[0].attn, horizon=8)
    with pytest.raises(ValueError, match=message):
        replace_attention(model, "uniform(layers=1, horizon=8)")
    assert dict(model.named_modules()) == before


class LocalAttention(nn.Module):
    """Of a kind that nobody knows."""


def test_what_is_no_stack_of_known_attention_is_refused() -> None:
    shared = NanoBlock()
    for model, message in (
        (nn.Sequential(NanoBlock(), LocalAttention()), r"1 \(LocalAttention\) attends in a way that is not known"),
        (nn.Sequential(shared, shared), "1.attn is 0.attn once more, and a memory is of one layer only"),
        (nn.TransformerDecoderLayer(32, 4, dropout=0.0), "has cross-attention"),
        (nn.Linear(3, 3), "it has no attention that is known"),
        (CausalSelfAttention(), "the model is itself an attention"),
        (nn.Sequential(NanoBlock()), "the schedule has 2 layers, but the model has 1"),
        (nn.Sequential(RecurrentAttention(32, 4, horizon=3), NanoBlock()), "0 has a memory already"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, "uniform(layers=2, horizon=8)")
    with pytest.raises(ValueError, match="the schedule asks for 2 KV heads, but the model has 4"):
        replace_attention(nn.Sequential(NanoBlock()), "uniform(layers=1, horizon=8, kv_heads=2)")
    with pytest.raises(TypeError, match="the projections of a Linear cannot be read: what can is"):
        DSMRAttention.from_attention(nn.Linear(3, 3), horizon=4)
    with pytest.raises(ValueError, match="set batch_first = True where its inputs are so"):
        DSMRAttention.from_attention(nn.MultiheadAttention(32, 4), horizon=4)


def test_calls_that_ask_for_more_than_causal_attention_are_refused() -> None:
    model = nn.Sequential(MultiheadBlock())
    (layer,) = replace_attention(model, "uniform(layers=1, horizon=8)")
    x, other, row = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(5, 32)
    window = torch.ones(5, 5, dtype=torch.bool).triu(1) | torch.ones(5, 5, dtype=torch.bool).tril(-2)
    bias = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    bias[4, 0] = -1.0
    padded = torch.tensor([[False] * 5, [False] * 4 + [True]])
    for arguments, options, message in (
        ((x, other, other), {"is_causal": True}, "query, key and value must be one tensor"),
        ((x, x, x), {}, "attends in both directions"),
        ((x, x, x), {"attn_mask": window}, "attn_mask is not a plain causal one"),
        ((x, x, x), {"attn_mask": ~window}, "attn_mask is not a plain causal one"),
        ((x, x, x), {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, "attn_mask is not a plain causal one"),
        ((x, x, x), {"attn_mask": bias}, "attn_mask is not a plain causal one"),
        ((x, x, x), {"attn_mask": bias[:4]}, "attn_mask must be causal over 5 tokens"),
        ((x, x, x), {"is_causal": True, "key_padding_mask": padded}, "key_padding_mask masks tokens"),
        ((row, row, row), {"is_causal": True}, "query must have three dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*arguments, **options)


# --- Transformers -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 48}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama with biases, a head_dim of its own": ("Llama", GROUPED | {"attention_bias": True, "head_dim": 12}),
    "llama 3 (scaled rotary)": ("Llama", GROUPED | {"rope_parameters": LLAMA3}),
    "llama, linear scaling": (
        "Llama",
        GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral with its window": ("Mistral", GROUPED | {"sliding_window": 6}),
    "gpt2": ("GPT2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "n_positions": 64}),
    "gpt2, scaled by layer": (
        "GPT2",
        {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True},
    ),
}


def theirs(name: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'dsmr[hf]'")
    kind, options = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | options | more)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.slow  # imports Transformers
@pytest.mark.parametrize("attends", ["sdpa", "eager"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_does_what_it_did_and_goes_on_over_a_stream(name: str, attends: str) -> None:
    model = theirs(name)
    model.set_attn_implementation(attends)
    ids = torch.randint(1, 61, (2, 24))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        replace_attention(model, "uniform(layers=2, horizon=100)")
        assert error(model(ids).logits, expected) < 1e-5
        parts, begin = [], 0
        with stream(model, 2):
            for part in ids.split([7, 1, 16], 1):
                where = torch.arange(begin, begin + part.shape[1])[None].expand(2, -1)
                parts.append(model(part, position_ids=where).logits)  # for GPT-2, whose positions are the model's
                begin += part.shape[1]
    assert error(torch.cat(parts, 1), expected) < 1e-5


@pytest.mark.slow  # imports Transformers
def test_a_projection_is_read_the_way_its_kind_holds_it() -> None:
    """A GPT-2 of `nn.Linear`s is what one of its own `Conv1D`s is."""
    model = theirs("gpt2").eval()
    ids = torch.randint(1, 61, (2, 8))
    for block in model.transformer.h:
        held = block.attn.c_proj
        block.attn.c_proj = nn.Linear(*held.weight.shape)
        with torch.no_grad():
            block.attn.c_proj.weight.copy_(held.weight.T)
            block.attn.c_proj.bias.copy_(held.bias)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        replace_attention(model, "uniform(layers=2, horizon=100)")
        assert error(model(ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.slow  # imports Transformers
def test_a_model_that_was_asked_for_hidden_states_is_not_taken_for_a_hooked_one() -> None:
    """Transformers leaves hooks of its own behind for good, which do nothing from then on."""
    model = theirs("llama").eval()
    ids = torch.randint(1, 61, (2, 8))
    with torch.no_grad():
        expected = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True).logits
        replace_attention(model, "uniform(layers=2, horizon=100)")
        assert error(model(ids, use_cache=False).logits, expected) < 1e-5


@pytest.mark.slow  # imports Transformers
def test_models_of_transformers_that_cannot_be_are_refused() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    for name, more, message in (
        ("llama", {"attention_dropout": 0.1}, "LlamaAttention has attention dropout .0.1."),
        ("gpt2", {"attn_pdrop": 0.1}, "GPT2Attention has attention dropout .0.1."),
        ("gpt2", {"add_cross_attention": True}, "has cross-attention: decoders alone can have memories"),
        ("llama", {"rope_parameters": yarn}, "has a rotary embedding of type 'yarn'"),
    ):
        model = theirs(name, **more)
        names = set(model.state_dict())
        with pytest.raises(ValueError, match=message):
            replace_attention(model, "uniform(layers=2, horizon=8)")
        assert set(model.state_dict()) == names
    window = theirs("mistral with its window")
    with pytest.raises(ValueError, match="the horizon at most 5, got 'sliding' and 9"):
        DSMRAttention.from_attention(window.model.layers[0].self_attn, horizon=9, visibility="sliding")


@pytest.mark.slow  # imports Transformers
def test_calls_of_a_model_of_transformers_that_ask_for_more_are_refused() -> None:
    model = theirs("llama")
    replace_attention(model, "uniform(layers=2, horizon=8)")
    ids = torch.randint(1, 61, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="holds its own memory: call it with use_cache=False"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="attention_mask is not a plain causal one"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match=r"position_ids must go up by one|attention_mask is not a plain causal one"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).expand(2, -1))


@pytest.mark.slow  # imports Transformers
def test_generation_is_without_a_cache_and_outside_of_a_stream() -> None:
    model, ids = theirs("llama"), torch.randint(1, 61, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    expected = model.generate(ids, **options)
    replace_attention(model, "uniform(layers=2, horizon=100)")
    for same in (model, copy.deepcopy(model)):
        assert torch.equal(same.generate(ids, **options), expected)
    with pytest.raises(ValueError, match="holds its own memory: call it with use_cache=False"):
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), model.generate(ids, **options))
    with stream(model, 2), pytest.raises(ValueError, match="generate hands over the whole text for every token"):
        model.generate(ids, **options)


@pytest.mark.slow  # imports Transformers
def test_their_gradient_checkpointing_has_the_same_gradients() -> None:
    def gradients(again: bool) -> list[Tensor]:
        torch.manual_seed(2)
        model = theirs("llama").double().train()
        replace_attention(model, "uniform(layers=2, horizon=16)")
        if again:
            model.gradient_checkpointing_enable()
        with stream(model, 2):
            for _ in range(3):
                ids = torch.randint(1, 61, (2, 8))
                model(ids, labels=ids).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert error(one, other) < 1e-6
