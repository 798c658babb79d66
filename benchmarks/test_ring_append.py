"""What does it cost to remember a segment and forget the oldest?

pytest benchmarks/test_ring_append.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parts.caches import CACHES, Cache, Ring
from benchmarks.parts.contenders import Shape
from benchmarks.parts.rows import DEVICE, OURS, Row, name_of, quick, reported, timed
from benchmarks.test_attention import DTYPES
from dsmr_kernels import KVMemory
from dsmr_kernels.costing.cost import Work

SHAPES = {
    "a segment": Shape(2, 4, 4, 128, 1024, 64) if quick() else Shape(2, 8, 8, 512, 2048, 64),
    "one token": Shape(1, 4, 4, 1, 1024, 64) if quick() else Shape(1, 8, 8, 1, 2048, 64),
}


def check_appended(cache: Cache, memory: KVMemory, news: list[tuple[Tensor, Tensor]]) -> None:
    """Fail unless the cache holds exactly the newest tokens of the memory and what is appended to it; appends it."""
    old, most = memory.ordered()[:2], memory.k.shape[2]
    for k, v in news:
        cache.append(k, v)
    found = cache.memory.ordered()[:2] if isinstance(cache, Ring) else cache.held()
    for side, name in enumerate("kv"):
        expected = torch.cat([old[side], *(new[side] for new in news)], 2)[:, :, -most:]
        assert torch.equal(found[side], expected), f"{type(cache).__name__}: {name} is not the newest {most} tokens"


@pytest.mark.parametrize("contender", CACHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("place", SHAPES)
def test_append(benchmark: Any, place: str, dtype: torch.dtype, contender: str) -> None:
    shape = SHAPES[place]
    case = shape.case(dtype, device=DEVICE)
    assert case.memory is not None
    size = 2 * case.k.nbytes
    row = Row(
        question="ring append",
        case=f"{place}, {name_of(dtype)}: {shape}",
        contender=contender,
        ours=contender == OURS,
        shape=str(shape),
        dtype=dtype,
        backend=contender,
        work=Work(bytes_read=size, bytes_written=size, calls=1),
        tokens=shape.batch * shape.queries,
    )
    with reported(benchmark, row), torch.no_grad():
        cache = CACHES[contender](case.memory)
        check_appended(cache, case.memory, [(case.k, case.v), (case.v, case.k), (case.k, case.v)])
        timed(benchmark, row, lambda: cache.append(case.k, case.v))
