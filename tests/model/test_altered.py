"""Adapters in the place of a model's projections, and hooks: they are heard wherever the model learns and plays."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from dsmr.console.errors import UserError
from dsmr.generation.drawing import Sampling
from dsmr.generation.stepping import PlainStep, Step, stepper, weights
from dsmr.generation.stepping.step import altered
from dsmr.model.attention import DSMRAttention
from dsmr.model.config import DSMRConfig
from dsmr.model.recurrent import RecurrentAttention, stream
from dsmr.model.transformer import DSMRModel

MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "sinusoidal": {"position": "sinusoidal"},
    "recall": {"recall": 3},
    "alibi": {"position": "alibi", "ffn": "swiglu"},
}
PLACES = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")


class Adapter(nn.Module):
    """A low-rank change beside a frozen projection (LoRA; Hu et al., 2021), with nothing of an `nn.Linear`."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.t().to(x.dtype) @ self.up.t().to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += self.up @ self.down
        return self.base


class WithWeight(Adapter):
    """One that shows the weight and bias below it, as PEFT's do: whoever reads them takes no notice of the rest."""

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias


def a_model(**options: Any) -> DSMRModel:
    torch.manual_seed(0)
    schedule = "two_scale(layers=2, long=24, short=8, n_long=1)"
    return DSMRModel(DSMRConfig(50, schedule, d_model=32, n_heads=4, segment_length=8, init_std=0.2, **options))


def each_place(model: DSMRModel, how: Any) -> None:
    for block in model.blocks:
        for place in PLACES:
            parent, name = place.split(".")
            setattr(block.get_submodule(parent), name, how(block.get_submodule(place)))


def read(model: DSMRModel) -> torch.Tensor:
    """Logits of three segments, memory between them."""
    tokens = torch.randint(0, 50, (2, 24), generator=torch.Generator("cpu").manual_seed(1))
    state = model.new_state(2, aligned=True)
    return torch.cat([model(part, state).logits for part in tokens.split(8, 1)], 1)


def played(model: DSMRModel, **options: Any) -> list[int]:
    return list(itertools.islice(model.generate([1, 2, 3], sampling=Sampling(seed=1), **options), 30))


@pytest.mark.parametrize("kind", [Adapter, WithWeight])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_learn_and_play_as_what_they_merge_into(name: str, kind: type[Adapter]) -> None:
    model = a_model(**MODELS[name])
    before = read(model).detach(), played(model)
    each_place(model, kind)
    found, music = read(model), played(model)
    assert not torch.allclose(found, before[0], atol=0.1)
    found.square().mean().backward()
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    assert len(adapters) == 8
    for adapter in adapters:
        for weight in (adapter.up, adapter.down):
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0
    each_place(model, kind.merged)
    torch.testing.assert_close(found, read(model), rtol=1e-4, atol=1e-4)
    assert music == played(model) != before[1]


@pytest.mark.parametrize("name", MODELS)
def test_what_a_hook_changes_is_heard(name: str) -> None:
    model = a_model(**MODELS[name])
    before, heard = played(model), list[int]()

    def steer(module: nn.Module, given: Any, found: Any) -> Any:
        heard.append(1)
        return found + 5 * torch.linspace(0, 1, found.shape[-1])

    handle = model.blocks[1].ffn.register_forward_hook(steer)
    assert played(model) != before
    assert len(heard) == 30
    handle.remove()
    assert played(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_a_projection_are_called_where_it_learns(name: str) -> None:
    """Also where it is taken apart, since q, k and v have inputs of their own."""
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        model, heard = a_model(**MODELS[name]), list[int]()

        def hook(*given: Any, heard: list[int] = heard) -> None:
            heard.append(1)

        before = read(model)
        getattr(model.blocks[1].attention.qkv, register)(hook)
        found = read(model)
        found.sum().backward()
        inputs = {"rope": 1, "alibi": 1, "sinusoidal": 2, "recall": 3}[name]
        assert len(heard) == 3 * inputs  # of each of three segments
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


class Louder(DSMRAttention):
    def look(self, *given: Any, **options: Any) -> torch.Tensor:
        return 2 * super().look(*given, **options)


def as_louder(model: DSMRModel) -> None:
    model.blocks[0].attention.__class__ = Louder


OTHERS: dict[str, Any] = {
    "a bias of a norm": lambda model: setattr(model.blocks[0], "ffn_norm", nn.LayerNorm(32)),
    "another eps": lambda model: setattr(model, "norm", nn.LayerNorm(32, bias=False, eps=0.5)),
    "a norm without weights": lambda model: setattr(model, "norm", nn.LayerNorm(32, elementwise_affine=False)),
    "a bias": lambda model: setattr(model.blocks[1].ffn, "up", nn.Linear(32, 128)),
    "other attention": as_louder,
}


@pytest.mark.parametrize("name", OTHERS)
def test_parts_that_do_more_are_heard(name: str) -> None:
    model = a_model().eval()
    OTHERS[name](model)
    steps = [stepper(model, model.new_state(1)), PlainStep(model, model.new_state(1))]
    assert type(steps[0]) is PlainStep
    for token in torch.arange(20)[:, None]:
        assert torch.equal(*(step(token) for step in steps))


class EightBits(nn.Module):
    """Weights of eight bits and a scale for every output, which computes in the dtype of its input."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        scale = base.weight.detach().abs().amax(1) / 127
        self.register_buffer("weight", (base.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


def test_weights_of_eight_bits_are_not_what_is_computed_in() -> None:
    model = a_model()
    before = read(model).detach()
    each_place(model, EightBits)
    assert model.new_state(1).memories[0].dtype == torch.float32
    torch.testing.assert_close(read(model), before, rtol=0.1, atol=0.1)
    assert len(played(model)) == 30


def test_a_model_of_ones_own_and_a_compiled_one_step_fast() -> None:
    class Mine(DSMRModel):
        def more(self) -> None:
            """Nothing that a step would miss."""

    model = Mine(a_model().config).eval()
    for given in (model, torch.compile(model)):
        assert type(stepper(given, model.new_state(1))) is Step


def test_the_fast_step_is_for_what_is_as_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(model: DSMRModel, precision: str = "auto") -> type:
        return type(stepper(model.eval(), model.new_state(1), precision))

    monkeypatch.setattr(weights, "CACHED_BYTES", 0)  # "auto" would be int8
    model = a_model(recall=2, position="sinusoidal")
    assert altered(model) is None
    assert chosen(model) is Step
    nn.utils.parametrize.register_parametrization(model.blocks[0].ffn.up, "weight", nn.Softplus(), unsafe=True)
    assert chosen(model) is Step  # the weight says it
    model = a_model()
    model.blocks[1].ffn.up = WithWeight(model.blocks[1].ffn.up)
    assert altered(model) == "blocks.1.ffn.up"
    assert chosen(model) is chosen(model, "float32") is PlainStep
    with pytest.raises(UserError, match=r"takes 'float32', since its blocks\.1\.ffn\.up has been altered"):
        chosen(model, "int8")
    for alter in (
        lambda model: model.norm.register_forward_pre_hook(lambda module, given: None),
        lambda model: model.register_forward_hook(lambda module, given, found: None),
        lambda model: setattr(model.head, "forward", lambda x: x),
        lambda model: setattr(model.blocks[0].attention, "qkv", torch.compile(model.blocks[0].attention.qkv)),
    ):
        model = a_model()
        alter(model)
        assert chosen(model) is PlainStep


def test_layers_of_their_own_take_adapters_too() -> None:
    x = torch.randn(2, 8, 32)
    for layer in (DSMRAttention(32, 4, horizon=8), RecurrentAttention(32, 4, horizon=8)):
        layer.qkv, layer.out = Adapter(layer.qkv), Adapter(layer.out)
        if isinstance(layer, RecurrentAttention):
            with stream(layer, 2):
                y = layer(x)
        else:
            y, _ = layer(x, layer.new_memory(2))
        y.sum().backward()
        assert layer.qkv.up.grad is not None


@pytest.mark.filterwarnings("ignore")  # it is on its way out, and says so
def test_what_pytorch_has_quantised_reads_and_plays() -> None:
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None:
        pytest.skip("this PyTorch has no quantize_dynamic any more")
    model = quantize(a_model().eval(), {nn.Linear})
    with torch.no_grad():
        assert read(model).isfinite().all()
    assert len(played(model)) == 30
