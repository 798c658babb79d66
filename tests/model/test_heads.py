"""A projection becomes heads as PyTorch's own split, turn and transpose make them, in values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr import DSMRAttention
from dsmr.model.heads import Part, heads_of
from dsmr.model.positions import Rotary

DTYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]
PARTS: list[tuple[Part, ...]] = [((4, True), (2, True), (2, False)), ((3, True),), ((1, False), (1, True))]


def written_out(x: Tensor, parts: tuple[Part, ...], place: Rotary | None, dtype: torch.dtype) -> list[Tensor]:
    found = []
    dim = x.shape[-1] // sum(count for count, _ in parts)
    for part, (_, turned) in zip(x.split([count * dim for count, _ in parts], -1), parts, strict=True):
        heads = part.unflatten(-1, (-1, dim)).transpose(1, 2)
        found.append((place(heads.float()) if turned and place else heads).to(dtype))
    return found


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("made", "kept"), DTYPES)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_heads_equal_split_turn_and_transpose(
    parts: tuple[Part, ...], made: torch.dtype, kept: torch.dtype, turned: bool, tokens: int
) -> None:
    heads = sum(count for count, _ in parts)
    x = torch.randn(2, tokens, heads * 10, dtype=made, requires_grad=True)
    place = Rotary.at(torch.randint(0, 9000, (2, tokens)), 10, 10000.0) if turned else None
    expected, found = written_out(x, parts, place, kept), heads_of(x, parts, place, kept)
    with torch.no_grad():
        plain = heads_of(x, parts, place, kept)
    above = [torch.randn(part.shape).to(kept) for part in found]
    exact = 2 * torch.finfo(torch.float32 if kept == made == torch.float32 else torch.bfloat16).eps
    for one, other, same in zip(found, expected, plain, strict=True):
        assert one.is_contiguous()
        assert (one.dtype, one.shape) == (kept, other.shape)
        assert torch.equal(one, same)
        torch.testing.assert_close(one, other, rtol=exact, atol=exact)
    (grad,) = torch.autograd.grad(found, x, above)
    (wanted,) = torch.autograd.grad(expected, x, above)
    torch.testing.assert_close(grad, wanted, rtol=2 * exact, atol=2 * exact)


def test_heads_can_be_differentiated_twice_and_by_torch_func() -> None:
    parts, place = PARTS[0], Rotary.at(torch.arange(5)[None], 4, 100.0)

    def loss(x: Tensor) -> Tensor:
        return sum((part**3).sum() for part in heads_of(x, parts, place, torch.float32))  # type: ignore[return-value]

    def plain(x: Tensor) -> Tensor:
        return sum((part**3).sum() for part in written_out(x, parts, place, torch.float32))  # type: ignore[return-value]

    x = torch.randn(1, 5, 32, requires_grad=True)
    for function in (loss, plain):
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        if function is loss:
            found = (first, second, torch.func.grad(loss)(x))
    for one, other in zip(found, (first, second, first), strict=True):
        torch.testing.assert_close(one, other)


class Counting(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_layer_concatenates_nothing(position: str) -> None:
    """Neither its projections nor their gradients."""
    layer = DSMRAttention(32, 4, horizon=0, n_kv_heads=2, position=position)
    x, place = torch.randn(2, 6, 32, requires_grad=True), layer.place(torch.arange(6).expand(2, 6))
    with Counting() as counting:
        sum(head.sum() for head in layer.project(x, place, None, torch.float32)).backward()  # type: ignore[union-attr]
    assert counting.calls["aten::mm"] > 0
    assert "aten::cat" not in counting.calls
