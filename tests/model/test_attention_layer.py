"""`DSMRAttention` alone, in somebody else's model, is the recurrence that its arguments describe."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.model.attention import DSMRAttention
from dsmr.model.positions import POSITIONS, Rotary, alibi_slopes, sinusoids
from dsmr_kernels import available_backends
from dsmr_kernels.tolerance import error

every = pytest.mark.parametrize("backend", [name for name in available_backends() if name != "triton"])


def written_out(layer: DSMRAttention, x: Tensor, past: tuple[Tensor, Tensor] | None, seen: int) -> tuple[Tensor, tuple]:
    """The recurrence as one would write it by hand: concatenate, attend, slice, detach."""
    batch, tokens, width = x.shape
    dim, kv_width = width // layer.n_heads, width // layer.n_heads * layer.n_kv_heads
    place = torch.arange(seen, seen + tokens)[None].expand(batch, -1)
    to_q, to_k, to_v = layer.qkv.weight.split([width, kv_width, kv_width])
    placed = x + sinusoids(place, width).to(x.dtype) if layer.position == "sinusoidal" else x
    q, k, v = (
        F.linear(*pair).view(batch, tokens, -1, dim).transpose(1, 2)
        for pair in ((placed, to_q), (placed, to_k), (x, to_v))
    )
    if layer.position == "rope":
        rotate = Rotary.at(place, dim, layer.rope_base)
        q, k = rotate(q), rotate(k)
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    before = k.shape[2] - tokens
    distance = torch.arange(before, before + tokens)[:, None] - torch.arange(k.shape[2])
    bias = torch.zeros(distance.shape, dtype=x.dtype).masked_fill(distance < 0, -torch.inf)
    if layer.position == "alibi":
        bias = bias - alibi_slopes(layer.n_heads)[:, None, None].to(x.dtype) * distance
    group = layer.n_heads // layer.n_kv_heads
    scores = q @ k.repeat_interleave(group, 1).mT * dim**-0.5 + bias
    y = layer.out((scores.softmax(-1) @ v.repeat_interleave(group, 1)).transpose(1, 2).flatten(2))
    kept = min(layer.horizon, k.shape[2])
    return y, tuple(part[:, :, part.shape[2] - kept :].detach() for part in (k, v))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_layer_is_differentiated_forwards_where_its_backend_is(position: str) -> None:
    x, step = torch.randn(2, 5, 24), torch.randn(2, 5, 24)
    layer = DSMRAttention(24, 4, horizon=8, position=position, backend="reference")
    _, memory = layer(torch.randn(2, 7, 24))
    held = memory.snapshot()
    _, tangent = torch.func.jvp(lambda x: layer(x, held)[0], (x,), (step,))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(layer(leaf, held)[0].sum(), leaf)
    torch.testing.assert_close(tangent.sum(), (dx * step).sum(), rtol=1e-4, atol=1e-4)
    layer.backend = "sdpa"
    with pytest.raises(RuntimeError, match='use backend="reference", which can'):
        torch.func.jvp(lambda x: layer(x, held)[0], (x,), (step,))


@pytest.mark.slow
@every
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("horizon", "kv_heads"), [(10, None), (10, 1), (3, 2), (0, 2), (100, 4)])
def test_the_layer_equals_the_recurrence_written_out(
    backend: str, position: str, horizon: int, kv_heads: int | None
) -> None:
    """Each call one segment; outputs, gradients of the input and of the weights."""
    layer = DSMRAttention(24, 4, horizon=horizon, n_kv_heads=kv_heads, position=position, backend=backend).double()
    for sizes in ([7, 7, 7, 7], [1, 12, 5, 1, 1, 9]):
        memory, past, seen = None, None, 0
        for size in sizes:
            x = torch.randn(2, size, 24, dtype=torch.float64, requires_grad=True)
            grad = torch.randn(2, size, 24, dtype=torch.float64)
            expected, past = written_out(layer, x, past, seen)
            wanted = torch.autograd.grad(expected, [x, *layer.parameters()], grad)
            y, memory = layer(x, memory)
            found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
            assert error(y, expected) < 1e-6  # rotary angles are applied in float32
            for one, other in zip(found, wanted, strict=True):
                assert error(one, other) < 1e-5
            seen += size
        assert memory.position.tolist() == [seen] * 2
        assert memory.capacity == horizon


@every
@pytest.mark.parametrize("visibility", ["segment", "sliding"])
def test_any_call_sizes_in_another_model(backend: str, visibility: str) -> None:
    """A stranger's residual model, fed in calls of any size, by counting its own segment offset."""

    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"segment_length": 6, "visibility": visibility, "backend": backend}
            self.layers = nn.ModuleList(DSMRAttention(16, 2, horizon=horizon, **options) for horizon in (9, 4))

        def forward(self, x: Tensor, memories: list, offset: int) -> tuple[Tensor, list]:
            after = []
            for layer, memory in zip(self.layers, memories, strict=True):
                y, memory = layer(x, memory, segment_offset=offset)
                x = x + y
                after.append(memory)
            return x, after

    model, x = Stranger().double(), torch.randn(2, 50, 16, dtype=torch.float64)
    with torch.no_grad():
        whole, _ = model(x, [None, None], 0)
        for sizes in ([1] * 50, [5, 1, 13, 30, 1], [6, 12, 32]):
            memories, begin, parts = [None, None], 0, []
            for size in sizes:
                y, memories = model(x[:, begin : begin + size], memories, begin % 6)
                parts.append(y)
                begin += size
            assert error(torch.cat(parts, 1), whole) < 1e-12


def test_pieces_begin_anew() -> None:
    layer = DSMRAttention(16, 2, horizon=20, position="rope").double()
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    starts = torch.tensor([[-1] * 5 + [5] * 7], dtype=torch.int32)
    with torch.no_grad():
        y, memory = layer(x, piece_start=starts)
        alone, alone_memory = layer(x[:, 5:])
    assert error(y[:, 5:], alone) < 1e-12
    assert memory.length.tolist() == alone_memory.length.tolist() == [7]
    for one, other in zip(memory.ordered()[:2], alone_memory.ordered()[:2], strict=True):
        assert error(one[:, :, -7:], other[:, :, -7:]) < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 25}, "d_model must be a multiple of n_heads, got d_model=25 and n_heads=4"),
        ({"n_heads": 0}, "d_model must be a multiple of n_heads"),
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads, got 4 and 3"),
        ({"position": "learned"}, "position must be one of rope, sinusoidal, alibi, none, got 'learned'"),
        ({"d_model": 20}, "rope needs an even head_dim, got d_model / n_heads = 5"),
        ({"d_model": 5, "n_heads": 5, "position": "sinusoidal"}, "sinusoidal positions need an even d_model, got 5"),
        ({"horizon": -1}, "horizon must be >= 0, got -1"),
        ({"segment_length": 0}, "segment_length must be >= 1, got 0"),
        ({"visibility": "all"}, "visibility must be one of segment, sliding, got 'all'"),
    ],
)
def test_bad_arguments_are_refused_when_the_layer_is_made(change: dict, message: str) -> None:
    arguments = {"d_model": 24, "n_heads": 4, "horizon": 7}
    with pytest.raises(ValueError, match=message):
        DSMRAttention(**(arguments | change))
