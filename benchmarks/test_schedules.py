"""What does the schedule change in the cost of a training step of one model?

pytest benchmarks/test_schedules.py --benchmark-only --benchmark-group-by=group
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.parts.models import Ours, Training, check_learning
from benchmarks.parts.rows import DEVICE, Row, name_of, reported, timed
from benchmarks.test_attention import DTYPES
from benchmarks.test_training_step import CHECKED, SIZES, reference
from dsmr.model.schedule import MemorySchedule


@pytest.mark.parametrize("schedule", SIZES.schedules)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_schedule(benchmark: Any, dtype: torch.dtype, schedule: str) -> None:
    sizes, text = replace(SIZES, dtype=dtype, on=str(DEVICE)), SIZES.schedules[schedule]
    row = Row(
        question="schedules",
        case=f"{name_of(dtype)}: {sizes}",
        contender=str(MemorySchedule.parse(text)),
        ours=schedule != "full",  # full memory is what the others are held against
        shape=str(sizes),
        dtype=dtype,
        backend="model",
        tokens=sizes.tokens,
    )
    with reported(benchmark, row):
        small = replace(CHECKED, dtype=dtype)
        reference(schedule, dtype).hold(schedule, Training(small, lambda sizes: Ours(sizes, schedule)))
        training = Training(sizes, lambda sizes: Ours(sizes, schedule))
        check_learning(schedule, training, training.parameters)
        timed(benchmark, replace(row, parameters=training.parameters), training)
        contender: Any = training.contender
        benchmark.extra_info["kv_mib"] = contender.state.nbytes / 2**20
