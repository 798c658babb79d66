"""`DSMR_CHECK=1`: a backend that is broken is stopped, whatever is broken of it, and one that is not is let work."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsmr_kernels import KVMemory, api, decode_attention, memory_attention, watch
from dsmr_kernels.backends import reference, sdpa
from dsmr_kernels.cases import Case, filled_memory, random_case

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def watching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "every", watch.EVERY)
    monkeypatch.setattr(watch, "_calls", {})


class Gradient(torch.autograd.Function):
    """The identity, whose gradient is changed by `spoil`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: Any) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.spoil(grad), None


def broken(**spoilt: Any) -> SimpleNamespace:
    """A backend as `sdpa` is, save that out, lse or the gradient of q, k or v is what `spoilt` makes of it."""

    def attention(inputs: Any, **how: Any) -> Any:
        for name in spoilt.keys() & {"q", "k", "v"}:
            inputs = inputs._replace(**{name: Gradient.apply(getattr(inputs, name), spoilt[name])})
        out, lse = sdpa.memory_attention(inputs)
        return spoilt.get("out", lambda x: x)(out), None if lse is None else spoilt.get("lse", lambda x: x)(lse)

    def decoding(*arguments: Any) -> Tensor:
        return spoilt.get("out", lambda x: x)(sdpa.decode_attention(*arguments))

    return SimpleNamespace(__name__="backends.broken", memory_attention=attention, decode_attention=decoding)


def attend(case: Case, learning: bool = True) -> None:
    q, k, v = (x.detach().requires_grad_(learning) for x in (case.q, case.k, case.v))
    memory_attention(q, k, v, case.memory, **case.options, return_lse=True)


CASES = {
    "wrapped": {"seen": [50, 9], "horizon": 40, "segment_length": 13},
    "no memory": {"horizon": 9, "visibility": "sliding"},
    "bias": {"seen": [50, 9], "horizon": 40, "biased": True, "tokens": 40},
    "wide values": {"seen": [0, 41], "horizon": 20, "v_head_dim": 24},
    "pieces": {"horizon": 40, "seen": [50, 9], "piece_start": torch.tensor([[-1] * 20 + [20] * 13, [3] * 33]).int()},
    "int8": {"seen": [50, 9], "horizon": 40, "stored": torch.int8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_backend_that_is_right_is_let_work(name: str, dtype: torch.dtype) -> None:
    case = random_case(dtype=dtype, **CASES[name])
    if "piece_start" in case.options:
        case.options["piece_start"][1] = 0
    attend(case)
    attend(case, learning=False)
    assert len(watch._calls) == 2


def nudged(place: tuple[int, ...]) -> Any:
    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[place] += 0.25
        return x

    return spoil


@pytest.mark.parametrize("where", [(0, 0, 3), (-1, -1, -1)], ids=str)
@pytest.mark.parametrize("what", ["out", "lse", "q", "k", "v"])
def test_a_backend_that_is_broken_is_stopped(
    what: str, where: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "choose", lambda *given, **options: broken(**{what: nudged(where)}))
    name = what if what in ("out", "lse") else f"d{what}"
    with pytest.raises(watch.DisagreementError, match=f"'broken', memory_attention: {name} errs by"):
        attend(random_case(**CASES["wrapped"]))


def test_nan_that_comes_or_goes_is_a_disagreement_and_nan_in_its_place_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(horizon=9)
    case.q[0, 0, 3] = torch.nan
    attend(case, learning=False)
    monkeypatch.setattr(api, "choose", lambda *given, **options: broken(out=lambda x: x.nan_to_num(0.0)))
    with pytest.raises(watch.DisagreementError, match="out is a number where the oracle has none"):
        attend(case, learning=False)
    monkeypatch.setattr(api, "choose", lambda *given, **options: broken(out=lambda x: x * torch.nan))
    with pytest.raises(watch.DisagreementError, match="out errs by inf"):
        attend(random_case(horizon=10), learning=False)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8], ids=str)
def test_decoding_is_watched(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, q = filled_memory(2, 2, 40, 16, [50, 9]).to(dtype=stored), torch.randn(2, 4, 2, 16)
    options = {"sinks": torch.zeros(4), "visible": torch.tensor([30, 5], dtype=torch.int32)}
    decode_attention(q, memory, **options)
    monkeypatch.setattr(api, "choose", lambda *given, **options: broken(out=nudged((-1, -1, 0))))
    with pytest.raises(watch.DisagreementError, match="'broken', decode_attention: out errs by"):
        decode_attention(q, memory, **options)


def test_the_first_call_of_a_kind_is_looked_at_and_then_one_in_every(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, case = [], random_case(horizon=9)
    honest = reference.memory_attention
    monkeypatch.setattr(reference, "memory_attention", lambda *given, **how: looked.append(1) or honest(*given, **how))
    for _ in range(2 * watch.EVERY):
        memory_attention(case.q, case.k, case.v, horizon=9)
    assert len(looked) == 2 * 2 * 2  # looks, corners, exact and plain
    memory_attention(case.q, case.k, case.v, horizon=10)
    assert len(looked) == 3 * 2 * 2


def test_a_long_call_is_looked_at_in_its_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SCORES", 2 * 10 * (10 + 40))
    case = random_case(**CASES["wrapped"])
    attend(case)
    for place, stopped in ((9, True), (10, False)):
        monkeypatch.setattr(watch, "_calls", {})
        monkeypatch.setattr(api, "choose", lambda *given, at=place, **options: broken(out=nudged((0, 0, at))))
        if stopped:
            with pytest.raises(watch.DisagreementError):
                attend(case)
        else:
            attend(case)


def test_transforms_are_left_alone_and_so_is_the_reference() -> None:
    case = random_case(horizon=9)
    torch.func.grad(lambda q: memory_attention(q, case.k, case.v, horizon=9).sum())(case.q)
    memory_attention(case.q, case.k, case.v, horizon=9, backend="reference")
    assert not watch._calls


@pytest.mark.slow
def test_compiled_calls_are_left_alone() -> None:
    case = random_case(horizon=9)
    compiled = torch.compile(lambda q: memory_attention(q, case.k, case.v, horizon=9), backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(case.q)
    assert not watch._calls


@pytest.mark.slow
def test_the_environment_switches_it_on() -> None:
    code = "from dsmr_kernels import watch; print(watch.every)"
    for value, said in (("1", watch.EVERY), ("0", 0), ("", 0)):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DSMR_CHECK": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) == said


@pytest.mark.parametrize("retention", ["uniform", "random"])
def test_sets_are_watched_too(retention: str) -> None:
    memory = KVMemory.empty(2, 2, 24, 16, retention=retention, room=8, seed=1)
    for _ in range(6):
        q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, 2, 2))
        memory_attention(q, k, v, memory, horizon=24)
        memory.append(k, v)
    assert watch._calls
