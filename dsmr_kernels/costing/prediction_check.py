"""Predicted beside measured attention: `python -m dsmr_kernels.costing.ceilings --check`.

The shapes lie around the one that the shares were measured at, and none of them is that one. Correctness goes first: a
small cut of every kind is compared with the oracle by the rule of `dsmr_kernels.tolerance`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from dsmr_kernels.cases import random_case
from dsmr_kernels.costing.cost import Call
from dsmr_kernels.costing.predict import Ceilings, attention_seconds
from dsmr_kernels.costing.timed_attention import DTYPES, timed_attention
from dsmr_kernels.costing.timing import Yardstick
from dsmr_kernels.dispatch import choose
from dsmr_kernels.testing import assert_agrees_with_oracle

CHECKED: dict[str, list[Call]] = {
    "cpu": [
        Call(1024, 4096, held=4096, heads=8, kv_heads=8),
        Call(1024, 1024, held=1024, heads=8, kv_heads=8),
        Call(512, 2048, held=2048, batch=2, heads=8, kv_heads=8),
        Call(512, 1024, held=1024, batch=4, heads=8, kv_heads=8),
        Call(1024, 4096, held=4096, heads=8, kv_heads=2),
        Call(512, 1024, held=1024, heads=16, kv_heads=16, head_dim=128),
        Call(512, 2048, held=2048, heads=16, kv_heads=16, head_dim=32),
        Call(4096, 2048, segment_length=512, heads=8, kv_heads=8),
        Call(4096, 512, segment_length=1024, heads=8, kv_heads=8),
        Call(256, 8192, held=8192, heads=8, kv_heads=8),
    ],
}
CHECKED["cuda"] = [
    Call(1024, 4096, held=4096, batch=4, heads=16, kv_heads=16),
    Call(1024, 1024, held=1024, batch=16, heads=16, kv_heads=16),
    Call(512, 2048, held=2048, batch=16, heads=16, kv_heads=16),
    Call(2048, 4096, held=4096, batch=4, heads=16, kv_heads=16),
    Call(1024, 4096, held=4096, batch=8, heads=16, kv_heads=4),
    Call(1024, 4096, held=4096, batch=4, heads=16, kv_heads=16, head_dim=128),
    Call(8192, 2048, segment_length=1024, batch=4, heads=16, kv_heads=16),
    Call(16384, 4096, segment_length=1024, batch=1, heads=16, kv_heads=16),
]
ROUNDS = 7
WITHIN = 0.25


def label(call: Call) -> str:
    """The sizes for a reader."""
    heads = str(call.heads) if call.heads == call.kv_heads else f"{call.heads}/{call.kv_heads}"
    past = f"{call.held} memory" if call.held else f"horizon {call.horizon}, segments of {call.segment_length}"
    return f"{call.batch} x {heads} heads x {call.head_dim}, {call.queries} queries, {past}"


def check(
    ceilings: Ceilings,
    device: torch.device,
    *,
    calls: list[Call] | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Two rows, forward and backward, for each call and dtype: sizes, seconds predicted and measured, their ratio,
    and whether the machine was quiet then, as `dsmr_kernels.costing.timing.Yardstick` tells."""
    _agree()
    calls = CHECKED[device.type] if calls is None else calls
    yardstick = Yardstick(device)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for number, call in enumerate(calls):
            measured, quiet = yardstick.fastest(functools.partial(timed_attention, call, device, DTYPES[dtype], rounds))
            for direction, predicted, seconds in zip(
                ("forward", "backward"), attention_seconds(call, ceilings, dtype), measured, strict=True
            ):
                rows.append(
                    {
                        "shape": label(call),
                        "dtype": dtype,
                        "direction": direction,
                        "predicted_ms": 1e3 * predicted,
                        "measured_ms": 1e3 * seconds,
                        "ratio": predicted / seconds,
                        "quiet": quiet,
                    }
                )
            ratios = ", ".join(f"{row['direction']} {row['ratio']:.2f}" for row in rows[-2:])
            progress(f"{dtype}, {number + 1} of {len(calls)}, {label(call)}: predicted / measured {ratios}")
    return rows


def _agree() -> None:
    """`AssertionError` with the figures if the default backend is wrong on a small cut."""
    for dtype in DTYPES.values():
        for options in (
            {"seen": [70, 70], "horizon": 40},
            {"queries": 64, "tokens": 64, "horizon": 24, "segment_length": 16},
        ):
            case = random_case(dtype=dtype, **options)
            backend = choose(case.q, None).__name__.rsplit(".", 1)[-1]
            assert_agrees_with_oracle(case, backend)


def check_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, and how many lie within 25 %."""
    lines = [
        "| call | dtype | pass | predicted, ms | measured, ms | predicted / measured |",
        "|---|---|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row['shape']} | {row['dtype']} | {row['direction']} | {row['predicted_ms']:.1f} "
        f"| {row['measured_ms']:.1f} | {row['ratio']:.2f}{'' if row['quiet'] else ' (disturbed)'} |"
        for row in rows
    ]
    close = sum(1 - WITHIN <= row["ratio"] <= 1 + WITHIN for row in rows)
    lines.append(f"\n{close} of {len(rows)} predictions lie within {100 * WITHIN:.0f} % of the measured time")
    return "\n".join(lines)
