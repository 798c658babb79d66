"""What does attention over memory and segment cost on this CPU, beside concatenating for PyTorch's own attention?

pytest benchmarks/test_attention.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch

from benchmarks.contenders import Shape, check, forward, forward_backward, matmul_rate, ours
from benchmarks.peers import MaskedSDPA

SHAPES = [
    pytest.param(Shape(1, 8, 8, 256, 512, 64), id="small"),
    pytest.param(Shape(1, 8, 8, 1024, 4096, 64), id="long-memory", marks=pytest.mark.slow),
    pytest.param(Shape(2, 8, 8, 512, 2048, 64), id="training", marks=pytest.mark.slow),
    pytest.param(Shape(1, 8, 2, 1024, 4096, 64), id="grouped", marks=pytest.mark.slow),
]
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16")]
PASSES = {"forward": forward, "forward+backward": forward_backward}


@pytest.mark.parametrize("contender", ["dsmr", "sdpa-concatenated"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", PASSES)
def test_attention(benchmark: Any, direction: str, shape: Shape, dtype: torch.dtype, contender: str) -> None:
    case = shape.case(dtype)
    attention = ours if contender == "dsmr" else MaskedSDPA(case)
    check(case, contender, attention)
    benchmark.group = f"CPU: attention {direction}, {shape}, {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(PASSES[direction](attention, case), rounds=7, iterations=1, warmup_rounds=2)
    benchmark.extra_info.update(
        {
            "device": "CPU",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "forward GFLOP": shape.forward_flops / 1e9,
        }
    )
    if direction == "forward":
        benchmark.extra_info["GFLOP/s"] = shape.forward_flops / benchmark.stats["min"] / 1e9


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_machines_matrix_product(benchmark: Any, dtype: torch.dtype) -> None:
    """The ceiling that the rates above are held against."""
    size = 1024
    benchmark.group = f"CPU: matrix product {size} x {size}, {str(dtype).removeprefix('torch.')}"
    benchmark.pedantic(matmul_rate(dtype, size), rounds=7, iterations=1, warmup_rounds=2)
    benchmark.extra_info["GFLOP/s"] = 2 * size**3 / benchmark.stats["min"] / 1e9
