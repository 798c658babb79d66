"""The end of a step: gradients are clipped as PyTorch clips them. And in a step, weights are cast once."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr import DSMRConfig, DSMRModel
from dsmr.console.devices import autocast
from dsmr.training.update import clip_gradients


def gradients(scale: float) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((5, 7), (3,), (2, 2), (4,))]
    for parameter in parameters[:-1]:
        parameter.grad = scale * torch.randn(parameter.shape)
    return parameters


@pytest.mark.parametrize("longest", [1.0, 0.3, math.inf])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_gradients_are_clipped_as_pytorch_clips_them(scale: float, longest: float) -> None:
    ours, theirs = gradients(scale), gradients(scale)
    assert clip_gradients(ours, longest) == torch.nn.utils.clip_grad_norm_(theirs, longest).item()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_length_that_is_not_finite_is_told_and_changes_nothing(value: float) -> None:
    parameters = gradients(1.0)
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    parameters[1].grad[0] = value  # type: ignore[index]
    before[1][0] = value  # type: ignore[index]
    assert not math.isfinite(clip_gradients(parameters, 1.0))
    for parameter, was in zip(parameters, before, strict=True):
        assert was is None or torch.equal(parameter.grad.nan_to_num(7), was.nan_to_num(7))  # type: ignore[union-attr]


class Casts(TorchDispatchMode):
    """How often a matrix of `rows` rows is cast to bfloat16."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function._schema.name == "aten::_to_copy" and made.dtype == torch.bfloat16 and made.shape[0] == self.rows:
            self.count += 1
        return made


@pytest.mark.parametrize("schedule", ["full(layers=3, length=8)", "full(layers=3, length=8, retention=uniform)"])
def test_a_step_casts_each_weight_once_however_many_segments_it_reads(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By autocast's own cache; the second schedule reads the segments one after another. On a processor that has no
    products in bfloat16, nothing is cast at all (tests/console/test_rounding.py)."""
    monkeypatch.setattr("dsmr.console.devices.multiplies_bfloat16", lambda: True)
    config = DSMRConfig(20, schedule, d_model=16, n_heads=2, segment_length=4, d_ff=99)  # type: ignore[arg-type]
    model, tokens = DSMRModel(config), torch.randint(0, 20, (1, 12))
    with Casts(rows=99) as casts, autocast(torch.device("cpu"), torch.bfloat16):
        loss = model(tokens, model.new_state(1, aligned=True), targets=tokens).loss
    with casts:
        loss.backward()
    assert casts.count == 3  # ffn.up of three layers
