"""Ceilings of a machine that does not exist, whose figures are easy to reckon with."""

from dsmr_kernels.costing.predict import Ceilings

SHARE = {"products": 0.5, "exponentials": 0.25, "own": 1.0, "edge": 0.0}
KNOWN = Ceilings(
    device="abacus",
    threads=1,
    torch="2",
    kernels="none",
    copy_bytes=1e9,
    matrix_flops={"float32": 1e9, "bfloat16": 4e9},
    exponentials=1e8,
    operator_seconds=1e-6,
    attention_seconds={"forward": 1e-3, "backward": 2e-3},
    attained={dtype: {"forward": SHARE, "backward": SHARE} for dtype in ("float32", "bfloat16")},
)
