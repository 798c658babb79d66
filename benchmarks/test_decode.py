"""What does one more token cost, with ours and with what people use instead?

pytest benchmarks/test_decode.py --benchmark-only --benchmark-group-by=group
"""

from typing import Any

import pytest
import torch

from benchmarks.conftest import quick
from benchmarks.decode import CONTEXT, DENSE_MUSIC
from benchmarks.decoders import CONTENDERS, Contender, random_context, ready


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_decoding(benchmark: Any, contender: Contender) -> None:
    if contender.missing:
        pytest.skip(contender.missing)
    context = CONTEXT // 4 if quick() else CONTEXT
    decoder = ready(contender, random_context(context))
    benchmark.group = f"CPU: one more token behind {context:,}"
    benchmark.pedantic(lambda: decoder.step(1), rounds=20, iterations=1, warmup_rounds=3)
    benchmark.extra_info.update(
        {
            "device": "CPU",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "parameters": decoder.parameters,
            "times dense music": 1 / benchmark.stats["median"] / DENSE_MUSIC,
        }
    )
