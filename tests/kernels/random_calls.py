"""Random calls of the kernels, held against the oracle for as long as there is time: by hand, for an hour.

    python tests/kernels/random_calls.py --minutes 60                              # in Triton's interpreter
    DSMR_VIRTUAL_GPU=sm_90 python tests/kernels/random_calls.py --minutes 60       # as compiled, on the virtual GPU
    python tests/kernels/random_calls.py --calls decoding --minutes 60             # `decode_attention`, what it stores
    python tests/kernels/random_calls.py --backend sdpa --minutes 60

Draws what `attention_strategy` or `decoding_strategy` draws, sinks included, every turn from another seed, and in every
other turn with grids so small that programs share their tiles, or a ring its splits. Ends at the first call that errs,
with its arguments and the seed that finds it again.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Read when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.environ.get("DSMR_VIRTUAL_GPU") else "1")

import torch
from attention_strategy import attention_calls
from decoding_strategy import Step, assert_step_agrees_with_oracle, decoding_steps
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from dsmr_kernels import memory_attention
from dsmr_kernels.cases import Case
from dsmr_kernels.testing import assert_agrees_with_oracle

VIRTUAL = os.environ.get("DSMR_VIRTUAL_GPU")
A_TURN = 25  # calls of a seed
PHASES = (Phase.explicit, Phase.generate)  # a call that errs is reported as it was drawn


def _turn(
    number: int,
    drawn: SearchStrategy[Case] | SearchStrategy[Step],
    agrees: Callable[[Any, str], None],
    backend: str,
    counts: dict[str, int],
) -> None:
    @seed(number)
    @settings(max_examples=A_TURN, deadline=None, database=None, phases=PHASES, suppress_health_check=list(HealthCheck))
    @given(call=drawn)
    def calls(call: Case | Step) -> None:
        agrees(call, backend)
        counts["calls"] += 1
        counts["with a bias"] += "distance_bias" in call.options
        counts["with sinks"] += "sinks" in call.options
        counts["with an int8 memory"] += call.memory is not None and call.memory.k.dtype == torch.int8

    calls()


def _plain_results(case: Case, backend: str) -> list[torch.Tensor]:
    leaves = {name: getattr(case, name).detach() for name in "qkv"}
    wanted = [leaves[name].requires_grad_() for name in case.learning]
    out = memory_attention(*leaves.values(), case.memory, **case.options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, wanted, case.grad)]


def assert_agrees(case: Case, backend: str) -> None:
    """With the oracle, and where such calls are prepared, the third with the first, bit for bit."""
    assert_agrees_with_oracle(case, backend)
    besides = ("piece_start", "alibi_slopes", "distance_bias", "sinks")
    if not (isinstance(case.options["segment_offset"], torch.Tensor) or any(name in case.options for name in besides)):
        first, _, third = [_plain_results(case, backend) for _ in range(3)]
        assert all(torch.equal(x, y) for x, y in zip(first, third, strict=True)), "a prepared call gives other bits"


def _processors(count: int, device: torch.device) -> int:
    return count


def main() -> int:
    """Turn by turn until the time is over; a line a minute."""
    parser = argparse.ArgumentParser(description="Hold random calls against the oracle.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--backend", choices=("triton", "sdpa"), default="triton")
    parser.add_argument("--calls", choices=("attention", "decoding"), default="attention")
    parser.add_argument("--seed", type=int, default=0, help="of the first turn")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if VIRTUAL:
        from virtual_gpu.driver import pretend

        pretend(VIRTUAL)
    from dsmr_kernels.backends.triton import configs, decode, training

    how: dict[str, Any] = {"dtypes": (torch.bfloat16, torch.float16) if VIRTUAL else (torch.float32, torch.float16)}
    how["head_dims"] = (16, 20) if asked.backend == "triton" else (1, 8, 10, 16)
    if asked.calls == "attention":
        drawn, agrees = attention_calls(**how, most_tokens=36, most_heads=2, more=True), assert_agrees
    else:
        drawn, agrees = decoding_steps(**how), assert_step_agrees_with_oracle
    usual = training.LEAST_KEYS, training.LEAST_QUERIES
    counts = {"calls": 0, "with a bias": 0, "with sinks": 0, "with an int8 memory": 0, "with shared tiles": 0}
    end, said, number = time.monotonic() + 60 * asked.minutes, time.monotonic(), asked.seed
    while time.monotonic() < end:
        shared = number % 2 == 1
        training.LEAST_KEYS, training.LEAST_QUERIES = (16, 16) if shared else usual
        decode.processors = functools.partial(_processors, 16 if shared else 1)
        configs.generation += 1  # what is kept was worked out by the other rule
        before = counts["calls"]
        try:
            _turn(number, drawn, agrees, asked.backend, counts)
        except BaseException:
            print(f"seed {number}", file=sys.stderr)
            raise
        counts["with shared tiles"] += shared * (counts["calls"] - before)
        number += 1
        if time.monotonic() - said > 60:
            said = time.monotonic()
            print(", ".join(f"{count:,} {name}" for name, count in counts.items()), flush=True)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()) + f"; seeds {asked.seed} to {number - 1}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
