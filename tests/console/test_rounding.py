"""Linear layers in bfloat16 on a processor that has no products of it: as in float32, rounded."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.console import devices
from dsmr.console.devices import autocast
from dsmr.console.rounding import as_now
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

CPU = torch.device("cpu")


@pytest.fixture(params=["AVX2", "AVX-512"])
def without_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies no bfloat16, whatever this one does."""
    for module in ("dsmr.console.devices", "dsmr_kernels.backends.sdpa.processor"):
        monkeypatch.setattr(f"{module}.instruction_set", lambda: request.param)


def narrow() -> AbstractContextManager[object]:
    return autocast(CPU, torch.bfloat16)


def results(layer: nn.Linear, x: Tensor, context: Callable[[], AbstractContextManager[object]]) -> list[Tensor]:
    """Its result, and the gradients of input, weight and bias."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    with context():
        y = layer(x)
    wanted = [x, *layer.parameters()]
    return [y, *torch.autograd.grad((y.double() ** 3).sum(), wanted)]


@pytest.mark.usefixtures("without_products")
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_in_float32_and_rounds(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(96, 64, bias=bias), torch.randn(3, 5, 96)
    y, *gradients = results(layer, x, narrow)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16().float(), layer.weight, layer.bias).bfloat16())
    plain = results(layer, x, lambda: torch.autocast("cpu", dtype=torch.bfloat16))[1:]
    exact = results(copy.deepcopy(layer).double(), x.double(), lambda: torch.autocast("cpu", enabled=False))[1:]
    for ours, theirs, true, of in zip(gradients, plain, exact, [x, *layer.parameters()], strict=True):
        assert ours.dtype == of.dtype
        assert (ours - true).norm() <= (theirs - true).norm()


@pytest.mark.usefixtures("without_products")
def test_nothing_else_changes() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    with narrow():
        assert layer.double()(x.double()).dtype == torch.float64  # as autocast leaves it
        assert (x @ x.T).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer.float()(x), F.linear(x, layer.weight, layer.bias))
    assert layer(x).dtype == torch.float32
    with autocast(CPU, torch.float32):
        assert layer(x).dtype == torch.float32


@pytest.mark.usefixtures("without_products")
def test_what_waits_for_the_backward_is_narrow() -> None:
    layer, kept = nn.Linear(8, 8), []
    x = torch.randn(64, 8).bfloat16().requires_grad_()

    def keeps(x: Tensor) -> list[torch.dtype]:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t), narrow():
            layer(x)
        return kept

    assert keeps(x) == [torch.bfloat16, torch.float32]  # the input, and the weight, which is there anyway
    assert keeps(x.detach()) == [torch.bfloat16]
    layer.requires_grad_(False)
    assert keeps(x) == [torch.float32]


@pytest.mark.usefixtures("without_products")
def test_any_call_of_a_linear_layer_is_served() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(8, requires_grad=True)
    context = narrow()
    for _ in range(2):  # as `torch.autocast`, which may be entered again
        with context:
            y = F.linear(input=x, weight=layer.weight, bias=layer.bias)
    assert y.shape == (4,)
    (dx,) = torch.autograd.grad(y.float().sum(), [x])
    assert dx.shape == (8,)
    with torch.inference_mode(), context:
        assert layer(torch.ones(0, 3, 8)).shape == (0, 3, 4)

    class Known(Tensor):
        """A weight that has its own idea of a product."""

        @classmethod
        def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> str:
            return "its own"

    with context:
        assert F.linear(x, layer.weight.detach().as_subclass(Known)) == "its own"


@pytest.mark.usefixtures("without_products")
def test_a_layer_that_is_computed_again_is_computed_alike() -> None:
    """In the backward the context has ended."""
    torch.manual_seed(0)
    settings = {"schedule": "two_scale(layers=2, long=24, short=8, n_long=1)", "segment_length": 8}
    model, tokens = DSMRModel(DSMRConfig(vocab_size=17, d_model=32, n_heads=2, **settings)), torch.randint(17, (2, 8))

    def gradients(again: bool) -> list[Tensor]:
        model.checkpoint_layers = again
        with narrow():
            state = model.new_state(2, aligned=True)
            model(tokens, state, targets=tokens)
            loss = model(tokens, state, targets=tokens).loss
        assert loss is not None
        once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        twice = torch.autograd.grad(loss, list(model.parameters()))
        assert all(map(torch.equal, once, twice))
        return list(once)

    assert all(map(torch.equal, gradients(True), gradients(False)))
    assert as_now() == {}


@pytest.mark.slow
@pytest.mark.usefixtures("without_products")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_model_computes_layers_again(dtype: torch.dtype) -> None:
    """The compiler takes no context of ours for what is computed again, unless it is needed."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DSMRModel(DSMRConfig(vocab_size=17, schedule="uniform(layers=1, horizon=8)", d_model=32, n_heads=2))
    tokens = torch.randint(17, (2, 8))

    def loss(call: Callable[..., Any]) -> Tensor:
        with autocast(CPU, dtype):
            found: Tensor = call(tokens, model.new_state(2), targets=tokens).loss
        (gradient,) = torch.autograd.grad(found, [model.head.weight])
        assert gradient.isfinite().all()
        return found.detach()

    model.checkpoint_layers = True
    assert torch.allclose(loss(torch.compile(model, backend="aot_eager")), loss(model), rtol=1e-2)


def test_a_processor_that_has_them_is_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AMX", "AVX-512 BF16", "ARM BF16"):
        monkeypatch.setattr("dsmr_kernels.backends.sdpa.processor.instruction_set", lambda name=name: name)
        assert isinstance(narrow(), torch.autocast)
    monkeypatch.setattr(devices, "instruction_set", lambda: "AVX-512 BF16")
    assert devices.resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(devices, "instruction_set", lambda: "AVX-512")
    assert devices.resolve_dtype("auto", CPU) == torch.float32


def test_what_pytorch_is_held_to_counts() -> None:
    """With ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA any processor is as one that has no more."""
    program = "import torch; from dsmr.console.devices import resolve_dtype as r; print(r('auto', torch.device('cpu')))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.float32"
