"""How far a result may lie from the oracle: the one rule, for tests, benchmarks and the trial of a GPU.

The oracle is the reference backend in float64 on upcast inputs. A result in a lower precision may err by at most twice
(outputs) or three times (gradients) what plain PyTorch attention in that precision errs, plus a rounding floor.
"""

import torch
from torch import Tensor

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite if anything is not a number."""
    if result.numel() == 0:
        return 0.0
    difference = (result.detach().double() - exact.detach().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


def allowed_error(name: str, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The rule of this module, for the result called `name`: "out", "lse" or that of a gradient."""
    factor = OUTPUT_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
    size = float(exact.abs().max()) if exact.numel() else 0.0
    if name == "lse":
        dtype = torch.promote_types(dtype, torch.float32) if dtype != torch.float64 else torch.float32
    if name == "db":
        # A bias's gradient is a sum of differences of terms of order one, which may cancel: each takes away what its
        # row has in common, and that is computed from an output that has been rounded.
        size = max(size, 1.0)
    # One rounding of the result, and those of sums over head_dim of terms of order one, which may cancel to nothing.
    terms = 16 if name == "lse" else max((16, *exact.shape[-1:]))
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 4 * terms**0.5
    return factor * error(plain, exact) + torch.finfo(dtype).eps * size + sums * max(size, 1.0)


def assert_within_rule(
    who: str, result: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Fail, with the figures, if one of the results by name lies further from the oracle's than the rule allows."""
    for name, value in result.items():
        found, allowed = error(value, exact[name]), allowed_error(name, plain[name], exact[name], dtype)
        if not found <= allowed:
            raise AssertionError(f"{who}: {name} errs by {found:.3g}, allowed {allowed:.3g} ({dtype})")
