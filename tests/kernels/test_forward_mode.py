"""Forward-mode differentiation: the reference carries tangents on, and no other backend leaves one out in silence."""

import pytest
import torch
from torch.autograd import forward_ad

from dsmr_kernels import available_backends, decode_attention, memory_attention
from dsmr_kernels.cases import random_case

BACKENDS = [name for name in available_backends() if name != "triton"]
fast = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
every = pytest.mark.parametrize("backend", BACKENDS)


@fast
def test_forward_differentiation_is_refused_with_a_sentence(backend: str) -> None:
    case = random_case(seen=[57, 57], horizon=40)
    q, k, v = case.q, case.k, case.v

    def attend(q: torch.Tensor, how: str = backend) -> torch.Tensor:
        out = memory_attention(q, k, v, case.memory, horizon=40, backend=how)
        assert isinstance(out, torch.Tensor)
        return out

    with pytest.raises(RuntimeError, match="cannot be differentiated forwards"):
        torch.func.jvp(attend, (q,), (torch.ones_like(q),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="cannot be differentiated forwards"):
        attend(forward_ad.make_dual(q, torch.ones_like(q)))
    with forward_ad.dual_level():  # nothing here has a tangent
        torch.testing.assert_close(attend(q), attend(q, "reference"), rtol=1e-4, atol=1e-4)


@fast
def test_a_tangent_is_seen_through_every_transform(backend: str) -> None:
    """Each hides those of the ones around it."""
    case = random_case(queries=3, capacity=6, seen=[5, 5], horizon=4)
    q, k, v, weight = case.q, case.k, case.v, torch.randn(case.q.shape[3])

    def attend(q: torch.Tensor) -> torch.Tensor:
        out = memory_attention(q, k, v, case.memory, horizon=4, backend=backend)
        assert isinstance(out, torch.Tensor)
        return out

    vmap, grad, jvp = torch.func.vmap, torch.func.grad, torch.func.jvp
    for function, at in (
        (vmap(attend), q[None]),
        (grad(lambda q: attend(q).square().sum()), q),
        (lambda q: grad(lambda weight: (attend(q) * weight).sum())(weight), q),
        (lambda weight: grad(lambda q: (attend(q) * weight).sum())(q), weight),
        (lambda q: vmap(lambda weight: attend(q) * weight)(weight[None]), q),
    ):
        with pytest.raises(RuntimeError, match='use backend="reference", which can'):
            jvp(function, (at,), (torch.ones_like(at),))
    with pytest.raises(RuntimeError, match='use backend="reference", which can'):
        torch.func.jacfwd(grad(lambda scale: attend(q * scale).sum()))(torch.tensor(1.0))


@fast
def test_the_tangent_of_a_gradient_or_of_the_slopes_is_not_left_out(backend: str) -> None:
    case = random_case(queries=3, capacity=6, seen=[5, 5], horizon=4)
    q, slopes = case.q.requires_grad_(), torch.rand(case.q.shape[1])
    for _ in range(3):  # the later ones by what the first has prepared
        out = memory_attention(q, case.k, case.v, case.memory, horizon=4, backend=backend)
        assert isinstance(out, torch.Tensor)
        with forward_ad.dual_level():
            step = torch.ones_like(out)
            with pytest.raises(RuntimeError, match='use backend="reference", which can'):
                torch.autograd.grad(out, q, forward_ad.make_dual(step, step), retain_graph=True)
            torch.autograd.grad(out, q, step)  # has none
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='use backend="reference", which can'):
        memory_attention(
            case.q.detach(), case.k, case.v, case.memory, horizon=4, backend=backend,
            alibi_slopes=forward_ad.make_dual(slopes, slopes),
        )  # fmt: skip


@every
def test_decoding_does_not_leave_the_tangent_of_what_is_learned_out(backend: str) -> None:
    case = random_case(queries=2, capacity=6, seen=[5, 5], horizon=4)
    heads, buckets = case.q.shape[1], torch.tensor([0, 1, 1])
    with forward_ad.dual_level():
        row, table = (forward_ad.make_dual(x, x) for x in (torch.rand(heads), torch.rand(heads, 2)))
        for more in (
            {"sinks": row},
            {"alibi_slopes": row},
            {"distance_bias": table, "distance_buckets": buckets},
        ):
            with pytest.raises(RuntimeError, match=r"decode_attention cannot be differentiated forwards \(jvp\)"):
                decode_attention(case.q, case.memory, backend=backend, **more)


@every
def test_compiled_code_leaves_no_tangent_out(backend: str) -> None:
    """It goes on without a graph where the backend cannot."""
    case = random_case(queries=3, capacity=6, seen=[5, 5], horizon=4)
    q, step = case.q, torch.ones_like(case.q)

    def attend(q: torch.Tensor, how: str = backend) -> torch.Tensor:
        out = memory_attention(q, case.k, case.v, case.memory, horizon=4, backend=how)
        assert isinstance(out, torch.Tensor)
        return out

    def tangent(q: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(attend, (q,), (step,))[1]

    torch.compiler.reset()
    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=backend == "reference")
    if backend == "reference":
        torch.testing.assert_close(compiled(q, step), tangent(q, step))
    else:
        with pytest.raises(RuntimeError, match="cannot be differentiated forwards"):
            compiled(q, step)


def test_forward_differentiation_of_the_reference_is_its_gradient_and_leaves_memory_out() -> None:
    case = random_case(seen=[57, 57], horizon=40)
    q, step = case.q, torch.randn_like(case.q)

    def attend(q: torch.Tensor) -> torch.Tensor:
        out = memory_attention(q, case.k, case.v, case.memory, horizon=40, backend="reference")
        assert isinstance(out, torch.Tensor)
        return out

    _, tangent = torch.func.jvp(attend, (q,), (step,))
    leaf = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(attend(leaf).sum(), leaf)
    torch.testing.assert_close(tangent.sum(), (dq * step).sum(), rtol=1e-4, atol=1e-4)

    memory = case.memory.clone()
    with forward_ad.dual_level():
        memory.append(forward_ad.make_dual(case.k, torch.ones_like(case.k)), case.v)
        out = memory_attention(q, case.k, case.v, memory, horizon=40, backend="reference")
        assert isinstance(out, torch.Tensor)
        assert forward_ad.unpack_dual(out).tangent is None
