"""What does one more token cost, with ours and with what people use instead?

pytest benchmarks/test_decode.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch

from benchmarks.decode import CONTEXT, DENSE_MUSIC
from benchmarks.parts.decoders import CONTENDERS, Contender, config, random_context, ready
from benchmarks.parts.peers import Missing
from benchmarks.parts.rows import DEVICE, Row, quick, reported, timed


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_decoding(benchmark: Any, contender: Contender) -> None:
    context, sizes = CONTEXT // 4 if quick() else CONTEXT, config()
    row = Row(
        question="one generated token",
        case=f"behind {context:,} tokens, batch 1, {sizes.schedule.layers} layers, width {sizes.d_model}",
        contender=contender.name,
        ours=contender.ours,
        shape=f"{sizes.schedule.layers} layers, width {sizes.d_model}, {sizes.schedule}",
        dtype=torch.bfloat16 if "bfloat16" in contender.name else torch.float32,
        backend=contender.name,
        tokens=1,
    )
    with reported(benchmark, row):
        if contender.missing:
            raise Missing(contender.missing)
        if DEVICE.type != "cpu":
            raise Missing("the decoders of this comparison are made for a CPU")
        decoder = ready(contender, random_context(context))
        timed(benchmark, row, lambda: decoder.step(1))
        benchmark.extra_info["parameters"] = decoder.parameters
        benchmark.extra_info["times dense music"] = benchmark.extra_info["tokens_per_s"] / DENSE_MUSIC
