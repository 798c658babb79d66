"""Guard bands: tensors inside larger storage, so that a stray read shows up as NaN and a stray write is found."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsmr_kernels import KVMemory
from dsmr_kernels.cases import Case

BAND = 64  # elements, or rows
_MARK = 12345.0


def surrounded(x: torch.Tensor) -> torch.Tensor:
    """The same values with NaN around them on every side: rows, columns, heads and batch entries."""
    nothing = float("nan") if x.is_floating_point() else 127
    outer = torch.full([size + 2 * (1 if i < 2 else BAND) for i, size in enumerate(x.shape)], nothing).to(x)
    inner = outer[1:-1, 1:-1, BAND:-BAND, BAND:-BAND]
    inner.copy_(x)
    return inner


def surrounded_case(case: Case) -> Case:
    """A case whose every floating tensor lies among NaN, and whose slots of the ring that are not held are NaN."""
    memory = None
    if case.memory is not None:
        old = case.memory
        scales = [x.clone() for x in (old.k_scale, old.v_scale) if x is not None]
        memory = KVMemory(surrounded(old.k), surrounded(old.v), old.length, old.position, *scales)
        slots = torch.arange(old.capacity, device=old.k.device)
        back = (old.position[:, None] - 1 - slots) % max(old.capacity, 1)  # how many tokens before the newest
        empty = (back >= old.length[:, None])[:, None, :, None]
        for x in scales or (memory.k, memory.v):
            x.masked_fill_(empty if x.dim() == 4 else empty[..., 0], float("nan"))
    q, k, v, grad = (surrounded(x) for x in (case.q, case.k, case.v, case.grad))
    return replace(case, q=q, k=k, v=v, memory=memory, grad=grad)


class Buffers:
    """Stands in for `torch.empty` in the module that allocates outputs: they begin as NaN, between two bands."""

    def __init__(self, empty: Callable[..., torch.Tensor] = torch.empty) -> None:
        self.empty = empty
        self.storages: list[torch.Tensor] = []
        self.sizes: list[int] = []

    def __call__(self, *shape: Any, **options: Any) -> torch.Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        inner = self.empty(shape, device="meta")
        storage = self.empty(inner.numel() + 2 * BAND, **options)
        storage.fill_(_MARK)
        middle = storage[BAND:-BAND]
        middle.fill_(float("nan") if storage.is_floating_point() else -1)
        self.storages.append(storage)
        self.sizes.append(inner.numel())
        return middle.view(inner.shape)

    def like(self, x: torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        """Stands in for `torch.empty_like`."""
        assert memory_format == torch.contiguous_format
        return self(x.shape, dtype=x.dtype, device=x.device)

    def strided(self, shape: tuple[int, ...], strides: tuple[int, ...], **options: Any) -> torch.Tensor:
        """Stands in for `torch.empty_strided`."""
        made = self(shape, **options)
        assert made.stride() == strides
        return made

    def assert_untouched(self) -> None:
        """Fail if anything was written outside a buffer."""
        for storage in self.storages:
            for band in (storage[:BAND], storage[-BAND:]):
                assert bool((band == band.new_tensor(_MARK)).all()), "a kernel wrote outside its output buffer"


def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    """For a fixture: the Triton backend's output buffers begin as NaN, so that an element that no kernel writes is
    found, and lie between guard bands, which are looked at in the end."""
    buffers = Buffers()
    monkeypatch.setattr("dsmr_kernels.backends.triton.training.torch.empty", buffers)
    monkeypatch.setattr("dsmr_kernels.backends.triton.training.torch.empty_like", buffers.like)
    monkeypatch.setattr("dsmr_kernels.backends.triton.training.torch.empty_strided", buffers.strided)
    yield buffers
    buffers.assert_untouched()
