"""Runs the Gluon kernel for Hopper on a CPU, as it is written: its source with other meanings for Gluon's words.

Every partition is a thread. Barriers count arrivals and bytes and have phases; a copy leaves NaN where it is to land
until it lands, late; a product is computed when it begins or when it is waited for, from what then lies in its stage.
So a stage that is overwritten too early, read too early or never released shows as NaN, another result or a deadlock.
Layouts, registers and fences mean nothing here.
"""

import random
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOM = Path(__file__).resolve().parents[2] / "dsmr_kernels" / "backends" / "triton"
PATIENCE = 20.0  # seconds that a wait may take before it is a deadlock
_here = threading.local()


class Barrier:
    """An mbarrier: a phase is over when all arrivals and all bytes that it expects have come."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed, self.count, self.pending, self.bytes, self.phase = changed, 0, 0, 0, 0

    def change(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.phase, self.pending = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int, pred: bool = True) -> None:
        with self.changed:
            if pred and not self.changed.wait_for(lambda: self.phase % 2 != parity, PATIENCE):
                raise TimeoutError("deadlock: a barrier's phase never ends")


class Shared:
    """A part of shared memory."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def index(self, i: int) -> "Shared":
        return Shared(self.x[i])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.x[start : start + length])

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.x.view(shape))

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.x.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.x.clone()

    def store(self, value: Tensor) -> None:
        self.x.copy_(value)


class Barriers(list[Barrier]):
    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]


class Pointer:
    """Where a tensor lies, and offsets to it in elements."""

    def __init__(self, x: Tensor, offset: Any = 0) -> None:
        self.x, self.offset, self.dtype = x, offset, SimpleNamespace(element_ty=x.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.x, self.offset + offset)

    def flat(self) -> Tensor:
        return torch.as_strided(self.x, (self.x.untyped_storage().nbytes() // self.x.itemsize,), (1,), 0)


class Descriptor:
    """A (batch, heads, tokens, head_dim) tensor in blocks of rows; zeros beyond its tokens."""

    def __init__(self, x: Tensor, rows: int) -> None:
        self.x, self.rows, self.layout = x, rows, None
        self.block_type = SimpleNamespace(nbytes=rows * x.shape[3] * x.itemsize)

    def block(self, at: list[int]) -> Tensor:
        rows = at[2] + torch.arange(self.rows)
        inside = (rows >= 0) & (rows < self.x.shape[2])
        return torch.where(inside[:, None], self.x[at[0], at[1], rows.clamp(0, self.x.shape[2] - 1)], 0.0)


class Product:
    """A product that is under way."""

    def __init__(self, a: Any, b: Shared, acc: Tensor) -> None:
        self.of = a, b, acc
        self.result: Tensor | None = None

    def finish(self) -> None:
        if self.result is not None:
            return
        a, b, acc = self.of
        self.result = acc + (a.x if isinstance(a, Shared) else a).float() @ b.x.float()


def _tensors(*xs: Any) -> list[Tensor]:
    return [torch.as_tensor(x) for x in xs]


def _scalar_or(function: Any, of_tensors: Any) -> Any:
    def call(*xs: Any) -> Any:
        return of_tensors(*_tensors(*xs)) if any(isinstance(x, Tensor) for x in xs) else function(*xs)

    return call


def _load(pointer: Pointer) -> Any:
    found = pointer.flat()[pointer.offset + pointer.x.storage_offset()]
    return found if isinstance(pointer.offset, Tensor) else int(found)


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    mask = mask.expand(value.shape)
    pointer.flat()[pointer.offset.expand(value.shape)[mask]] = value[mask]


def _multiply(a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(a, b, acc if use_acc else torch.zeros_like(acc))
    if random.random() < 0.5:
        product.finish()
    _here.products.append(product)
    return product


def _wait_for_products(outstanding: int, deps: list[Any]) -> Any:
    time.sleep(random.random() * 1e-3)
    while len(_here.products) > outstanding:
        _here.products.pop(0).finish()
    found = [dep.result if isinstance(dep, Product) else dep for dep in deps]
    assert all(x is not None for x in found), "a result that was not waited for"
    return found[0] if len(found) == 1 else tuple(found)


class Machine:
    """One launch, program by program."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.program = 0
        self.failures: list[BaseException] = []

    def _copy(self, source: Descriptor, at: list[int], barrier: Barrier, to: Shared) -> None:
        to.x.fill_(torch.nan)

        def land() -> None:
            time.sleep(random.choice((0.0, 1e-3, 2e-2)))
            to.x.copy_(source.block(at).view(to.x.shape))
            barrier.change(expected=-source.block_type.nbytes)

        threading.Thread(target=land, daemon=True).start()

    def _allocate(self, kind: Any, shape: list[int], layout: Any) -> Any:
        if kind == "barrier":
            return Barriers(Barrier(self.changed) for _ in range(shape[0]))
        return Shared(torch.full(shape, torch.nan, dtype=kind))

    def _specialise(self, parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
        assert len(parts) - 1 == len(warps) == len(registers)

        def run(function: Any, arguments: tuple[Any, ...]) -> None:
            try:
                _here.products = []
                function(*arguments)
                assert not _here.products, "a product was never waited for"
            except BaseException as failure:
                self.failures.append(failure)

        threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failures:
            raise self.failures[0]

    def words(self) -> dict[str, Any]:
        """What Gluon's names mean here, and Triton's in `walk` and `stretches`."""

        def jit(*function: Any, **options: Any) -> Any:
            return function[0] if function else lambda kernel: kernel

        def init(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        minimum, maximum = _scalar_or(min, torch.minimum), _scalar_or(max, torch.maximum)
        where = _scalar_or(lambda condition, a, b: a if condition else b, torch.where)
        layout = SimpleNamespace(get_default_for=lambda *given: None)
        language = SimpleNamespace(
            constexpr=None, int64="barrier", float32=torch.float32, minimum=minimum, maximum=maximum, where=where,
            cdiv=lambda a, b: -(-a // b), load=_load, store=_store, exp2=torch.exp2, log2=torch.log2,
            arange=lambda begin, end, layout=None: torch.arange(begin, end), max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            convert_layout=lambda x, layout: x, program_id=lambda axis: self.program, static_range=range,
            static_assert=lambda true, said: None, allocate_shared_memory=self._allocate,
            warp_specialize=self._specialise, NVMMASharedLayout=layout,
            **dict.fromkeys(
                ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"), lambda *given: None
            ),
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: None, init=init, arrive=lambda barrier: barrier.change(arrivals=1),
            expect=lambda barrier, expected: barrier.change(1, expected),
            wait=lambda barrier, parity, pred=True: barrier.wait(parity, pred),
        )  # fmt: skip
        return {
            "gluon": SimpleNamespace(jit=jit), "triton": SimpleNamespace(jit=jit), "gl": language, "tl": language,
            "mbarrier": barriers, "tma": SimpleNamespace(async_copy_global_to_shared=self._copy),
            "warpgroup_mma": _multiply, "warpgroup_mma_wait": _wait_for_products, "fence_async_shared": lambda: None,
        }  # fmt: skip


def _source(name: str) -> str:
    """A module without its imports, and without the widths of integers, which have one here."""
    text = (ROOM / f"{name}.py").read_text(encoding="utf-8")
    text = re.sub(r"^(from|import) [^(\n]+(\([^)]*\))?\n", "", text, flags=re.M)
    return re.sub(r"\.to\((gl|tl)\.int(32|64)\)", "", text)


def _only(name: str, *functions: str) -> str:
    """These functions of a module, with their decorators."""
    found = [re.search(rf"^@triton\.jit\ndef {f}\(.*?(?=\n\n\n|\Z)", _source(name), re.M | re.S) for f in functions]
    return "\n\n\n".join(x.group() for x in found if x)


def run(tensors: tuple[Any, ...], numbers: tuple[float, ...], programs: int, **constants: Any) -> None:
    """Launch the Gluon kernel of `hopper` with tensors and `Descriptor`s, numbers and constants in their order."""
    machine = Machine()
    names = machine.words()
    exec(_only("walk", "key_blocks", "edge_block") + "\n\n\n" + _source("stretches"), names)
    exec(_source("hopper"), names)
    given = [Pointer(x) if isinstance(x, Tensor) else x for x in tensors]
    for machine.program in range(programs):
        names["hopper_kernel"](*given, *numbers, **constants)
