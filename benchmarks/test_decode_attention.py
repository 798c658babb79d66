"""What does the attention of one more token cost: remember its key and value, then attend?

pytest benchmarks/test_decode_attention.py --benchmark-only --benchmark-group-by=group
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parts.caches import Cache, Concatenation, HuggingFaceSliding, Ring
from benchmarks.parts.contenders import Shape
from benchmarks.parts.rows import DEVICE, OURS, Row, name_of, quick, reported, timed
from benchmarks.test_attention import DTYPES, call_of
from dsmr_kernels import KVMemory, decode_attention
from dsmr_kernels.cases import Case
from dsmr_kernels.costing.cost import decode_work
from dsmr_kernels.dispatch import choose
from dsmr_kernels.tolerance import allowed_error, error

SHAPES = {
    "one stream": Shape(1, 8, 8, 1, 1024, 64) if quick() else Shape(1, 8, 8, 1, 4096, 64),
    "grouped heads": Shape(1, 8, 2, 1, 1024, 64) if quick() else Shape(1, 8, 2, 1, 4096, 64),
    "many streams": Shape(4, 8, 8, 1, 512, 64) if quick() else Shape(8, 8, 8, 1, 2048, 64),
}


class Slots(Cache):
    """A tensor of fixed size, the oldest slot overwritten in place: the order of the keys does not matter here."""

    ordered = False

    def __init__(self, memory: KVMemory) -> None:
        super().__init__(memory)
        self.next = 0

    def append(self, k: Tensor, v: Tensor) -> None:
        place = slice(self.next, self.next + 1)
        self.k[:, :, place], self.v[:, :, place] = k, v
        self.next = (self.next + 1) % self.k.shape[2]


def by_ours(cache: Cache, q: Tensor) -> Tensor:
    """`decode_attention`."""
    assert isinstance(cache, Ring)
    return decode_attention(q, cache.memory)


def by_sdpa(cache: Cache, q: Tensor) -> Tensor:
    """`scaled_dot_product_attention` over all that the cache holds, without a mask."""
    k, v = cache.held()
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def written_out(cache: Cache, q: Tensor) -> Tensor:
    """The softmax in PyTorch."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in cache.held())
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


CONTENDERS: dict[str, tuple[type[Cache], Callable[[Cache, Tensor], Tensor]]] = {
    OURS: (Ring, by_ours),
    "SDPA, slots written in place": (Slots, by_sdpa),
    "SDPA, torch.cat and slice": (Concatenation, by_sdpa),
    "Hugging Face, sliding window layer, SDPA": (HuggingFaceSliding, by_sdpa),
    "written out, torch.cat and slice": (Concatenation, written_out),
}


def made(contender: str, case: Case) -> Callable[[], Tensor]:
    """One more token, always the same one. Raises `Missing` where the contender cannot run."""
    assert case.memory is not None
    kind, attend = CONTENDERS[contender]
    cache = kind(case.memory)

    def call() -> Tensor:
        cache.append(case.k, case.v)
        return attend(cache, case.q)

    return call


def check_decoded(contender: str, out: Tensor, case: Case) -> None:
    """Fail unless `out` is the attention of the case's query over the memory with its token appended."""
    assert case.memory is not None
    memory = case.memory.clone()
    memory.append(case.k, case.v)
    exact = decode_attention(case.q.double(), memory.to(dtype=torch.float64), backend="reference")
    plain = written_out(Ring(memory), case.q)
    found, allowed = error(out, exact), allowed_error("out", plain, exact, case.q.dtype)
    assert found <= allowed, f"{contender}: out errs by {found:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("place", SHAPES)
def test_decode_attention(benchmark: Any, place: str, dtype: torch.dtype, contender: str) -> None:
    shape = SHAPES[place]
    case = shape.case(dtype, device=DEVICE)
    own = contender == OURS
    row = Row(
        question="decode attention",
        case=f"{place}, {name_of(dtype)}: {shape}",
        contender=contender,
        ours=own,
        shape=str(shape),
        dtype=dtype,
        backend=choose(case.q, None).__name__.rsplit(".", 1)[-1] if own else contender,
        work=decode_work(call_of(shape, dtype), shape.memory),
        tokens=shape.batch,
    )
    with reported(benchmark, row), torch.no_grad():
        call = made(contender, case)
        check_decoded(contender, call(), case)
        timed(benchmark, row, call)
