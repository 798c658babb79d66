"""What does a training step of a model with memory cost: forward, backward, clipping, AdamW?

pytest benchmarks/test_training_step.py --benchmark-only --benchmark-group-by=group

The full comparison at 25 million parameters, with peak memory, is `python -m benchmarks.training_step`.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.parts.models import CONTENDERS, Ours, ReferenceStep, Sizes, Training, check_learning
from benchmarks.parts.rows import DEVICE, Row, name_of, quick, reported, timed
from benchmarks.test_attention import DTYPES

SIZES = {
    ("cpu", True): Sizes(2, 128, 4, 64, 256, 2),
    ("cpu", False): Sizes(4, 256, 4, 256, 1024, 2),
    ("cuda", True): Sizes(4, 256, 4, 256, 1024, 4),
    ("cuda", False): Sizes(8, 512, 8, 512, 2048, 8),
}[DEVICE.type, quick()]
CHECKED = Sizes(4, 64, 2, 32, 96, 2, vocabulary=64, on=str(DEVICE))  # the same code, small enough for the reference


@functools.cache
def reference(schedule: str, dtype: torch.dtype) -> ReferenceStep:
    return ReferenceStep(replace(CHECKED, dtype=dtype), schedule)


@functools.cache
def our_parameters(sizes: Sizes) -> int:
    return sum(parameter.numel() for parameter in Ours(sizes, "full").model.parameters())


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_training_step(benchmark: Any, dtype: torch.dtype, contender: str) -> None:
    sizes = replace(SIZES, dtype=dtype, on=str(DEVICE))
    same = contender.startswith("ours")  # in its results, too
    row = Row(
        question="training step",
        case=f"{name_of(dtype)}: {sizes}",
        contender=contender,
        ours=contender in ("ours, full", "ours, two_scale"),
        shape=str(sizes),
        dtype=dtype,
        backend="model",
        tokens=sizes.tokens,
        parameters=our_parameters(sizes),
    )
    with reported(benchmark, row):
        if same:
            small = replace(CHECKED, dtype=dtype)
            reference(contender.split(", ")[1], dtype).hold(contender, Training(small, CONTENDERS[contender]))
        training = Training(sizes, CONTENDERS[contender])
        check_learning(contender, training, our_parameters(sizes))
        timed(benchmark, replace(row, parameters=training.parameters), training)
