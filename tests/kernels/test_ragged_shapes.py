"""Pieces begin anywhere, and products in bfloat16 are compiled for every shape: a stream may not show ever new ones."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsmr_kernels import KVMemory, memory_attention
from dsmr_kernels.backends.sdpa import tuned
from dsmr_kernels.backends.sdpa.processor import Choice
from dsmr_kernels.backends.sdpa.products import GRAIN
from dsmr_kernels.cases import random_case
from dsmr_kernels.testing import run

BF16 = torch.bfloat16
LENGTH, HORIZON = 64, 192


@pytest.fixture(autouse=True)
def _as_where_bfloat16_is_fast() -> Iterator[None]:
    tuned.use({(BF16, "forward"): Choice("products", BF16), (BF16, "backward"): Choice("products", BF16)})
    yield
    tuned.use(None)


class Products(TorchDispatchMode):
    """Notes the sizes of all matrix products in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in str(func) and any(isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args):
            self.shapes.add(tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor)))
        return func(*args, **(kwargs or {}))


def stream(seed: int, segments: int) -> set[tuple[tuple[int, ...], ...]]:
    """What two rows show whose pieces begin where they will."""
    numbers = torch.Generator().manual_seed(seed)
    memory = KVMemory.empty(2, 2, HORIZON, 16, dtype=torch.bfloat16)
    with Products() as products:
        for _ in range(segments):
            starts = torch.full((2, LENGTH), -1, dtype=torch.int32)
            for row in range(2):
                at = int(torch.randint(3 * LENGTH, (), generator=numbers))
                starts[row, min(at, LENGTH) :] = at
            q, k, v = (torch.randn(2, 2, LENGTH, 16, generator=numbers).bfloat16().requires_grad_() for _ in range(3))
            out = memory_attention(
                q,
                k,
                v,
                memory=memory,
                horizon=HORIZON,
                segment_length=LENGTH,
                piece_start=starts,
                backend="sdpa",
            )
            out.sum().backward()
            memory.append(k.detach(), v.detach(), piece_start=starts)
    return products.shapes


def test_a_stream_soon_shows_products_no_new_shapes() -> None:
    """A training of short pieces held a gigabyte of compiled products."""
    shapes = stream(seed=1, segments=60)
    odd = {size for tensors in shapes for shape in tensors for size in shape if size > GRAIN and size % GRAIN}
    assert shapes
    assert not odd


def test_segments_of_any_length_keep_their_dtype() -> None:
    """A stream shows one length of them, however odd; float32 would take up to twice as long."""
    sizes = {"queries": 150, "kv_heads": 4, "capacity": 60, "seen": [90, 90], "horizon": 60, "dtype": BF16}
    for length, is_shown in ((50, True), (40, False)):  # three whole segments; three and a part
        with Products() as products:
            run(random_case(**sizes, segment_length=length), "sdpa")
        assert bool(products.shapes) == is_shown
