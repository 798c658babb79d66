"""What does attention over memory and segment cost, beside what people write instead?

pytest benchmarks/test_attention.py --benchmark-only --benchmark-group-by=group
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.parts.contenders import Oracle, Shape, backward, forward, forward_backward, ours
from benchmarks.parts.flex_cpu import FlexOnCPU
from benchmarks.parts.peers import PEERS, Attention, Missing
from benchmarks.parts.rows import DEVICE, OURS, Row, ceilings, name_of, quick, reported, timed
from dsmr_kernels.cases import Case
from dsmr_kernels.costing.cost import Call, Work, backward_parts, forward_parts, total
from dsmr_kernels.costing.predict import attention_seconds
from dsmr_kernels.dispatch import choose

SHAPES = {
    ("cpu", True): {
        "training": Shape(2, 4, 4, 128, 512, 64),
        "long memory": Shape(1, 4, 4, 256, 2048, 64),
        "grouped heads": Shape(1, 8, 2, 128, 1024, 64),
        "tiny": Shape(1, 4, 4, 16, 64, 32),
    },
    ("cpu", False): {
        "training": Shape(2, 8, 8, 512, 2048, 64),
        "long memory": Shape(1, 8, 8, 1024, 4096, 64),
        "grouped heads": Shape(1, 8, 2, 512, 4096, 64),
        "tiny": Shape(1, 4, 4, 16, 64, 32),
    },
    ("cuda", True): {"training": Shape(8, 8, 8, 512, 1024, 64), "tiny": Shape(1, 8, 8, 64, 128, 64)},
    ("cuda", False): {
        "training": Shape(8, 8, 8, 512, 1024, 64),
        "long memory": Shape(8, 16, 16, 1024, 8192, 128),
        "grouped heads": Shape(8, 16, 4, 1024, 4096, 128),
        "tiny": Shape(1, 8, 8, 64, 128, 64),
    },
}[DEVICE.type, quick()]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cpu" else [torch.bfloat16]
PASSES = {"forward": forward, "backward": backward, "forward + backward": forward_backward}
FLEX = "FlexAttention, block mask"
# On a CPU a kernel takes the compiler longer than all other rows together.
COMPILED = () if quick() else (("long memory", torch.float32),)


@functools.lru_cache(maxsize=1)
def case_and_oracle(shape: Shape, dtype: torch.dtype) -> tuple[Case, Oracle]:
    case = shape.case(dtype, device=DEVICE)
    return case, Oracle(case)


def call_of(shape: Shape, dtype: torch.dtype) -> Call:
    """The sizes for the cost model."""
    return Call(
        shape.queries,
        shape.memory,
        held=shape.memory,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        bytes_per_element=dtype.itemsize,
    )


def work_of(call: Call, direction: str, backward: str) -> Work:
    """Of one pass or of both."""
    parts = {"forward": forward_parts(call), "backward": backward_parts(call, backward=backward)}
    return total(work for name in parts if name in direction for work in parts[name].values())


def predicted(call: Call, direction: str, dtype: torch.dtype) -> float | None:
    """Seconds of one pass or of both; None without measured ceilings."""
    limits = ceilings()
    if limits is None:
        return None
    seconds = dict(zip(("forward", "backward"), attention_seconds(call, limits, name_of(dtype)), strict=True))
    return sum(part for name, part in seconds.items() if name in direction)


def made(contender: str, case: Case, place: str, direction: str) -> Attention:
    """Ours or a peer, ready to be called. Raises `Missing` where it cannot run."""
    if contender == OURS:
        return ours
    if contender == FLEX and DEVICE.type == "cpu":
        if direction != "forward":
            raise Missing("FlexAttention has no backward on a CPU")
        if (place, case.q.dtype) not in COMPILED:
            raise Missing("compiled on a CPU for one row of full runs alone: a shape takes half a minute")
        return FlexOnCPU(case)
    return PEERS[contender](case)


def results(attention: Attention, case: Case, direction: str) -> dict[str, torch.Tensor]:
    """What is checked: the output, and the gradients if they will be timed."""
    found = {"out": forward(attention, case)()}
    if "backward" in direction:
        found |= dict(zip(("dq", "dk", "dv"), forward_backward(attention, case)(), strict=True))
    return found


@pytest.mark.parametrize("contender", [OURS, *PEERS])
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("place", SHAPES)
def test_attention(benchmark: Any, place: str, dtype: torch.dtype, direction: str, contender: str) -> None:
    shape, pass_ = SHAPES[place], PASSES[direction]
    compare(benchmark, place, shape, dtype, direction, pass_, contender)


def compare(
    benchmark: Any,
    place: str,
    shape: Shape,
    dtype: torch.dtype,
    direction: str,
    pass_: Callable[[Attention, Case], Callable[[], Any]],
    contender: str,
) -> None:
    """One row: checked, then timed."""
    case, oracle = case_and_oracle(shape, dtype)
    own = contender == OURS
    backend = choose(case.q, None).__name__.rsplit(".", 1)[-1]
    call = call_of(shape, dtype)
    row = Row(
        question=f"attention, {direction}",
        case=f"{place}, {name_of(dtype)}: {shape}",
        contender=contender,
        ours=own,
        shape=str(shape),
        dtype=dtype,
        backend=backend if own else contender,
        work=work_of(call, direction, "split" if backend == "triton" else "fused"),
        predicted=predicted(call, direction, dtype) if own else None,
    )
    with reported(benchmark, row):
        attention = made(contender, case, place, direction)
        oracle.hold(contender, results(attention, case, direction))
        timed(benchmark, row, pass_(attention, case))
