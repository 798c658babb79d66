"""Weights as a step wants them: one row of activations times a matrix reads the whole matrix, so bytes are time.

    float32    the model's own numbers, in the layout that the machine multiplies a single row with fastest
    bfloat16   half the bytes; activations are rounded to bfloat16 before each product
    int8       a quarter of the bytes: a scale for every output, activations in bfloat16, by PyTorch's weight-only
               operator `_weight_int8pack_mm` (what torchao and gpt-fast call)

Only the large matrices of the layers are converted: embedding, norms, the residual stream, attention with its memory,
and the logits stay in float32. `PRECISIONS["auto"]` is a fixed rule, so that a seed plays the same at every start: int8
where the weights are larger than a core's cache, float32 below, where conversions cost more than they save.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.console.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16", "int8")
CACHED_BYTES = 4 * 2**20
"""Float32 weights of up to so many bytes stay in a core's cache from token to token."""

INT8_BLOCK = 64

Product = Callable[[Tensor], Tensor]
"""x (B, inputs), float32 or what the last product gave -> (B, outputs)."""

# Private to PyTorch: without it int8 is refused, and auto is float32.
_INT8_MM = getattr(torch.ops.aten, "_weight_int8pack_mm", None)


def resolve_precision(name: str, model: nn.Module) -> str:
    """The precision called `name`, "auto" resolved for `model`; `UserError` for one that is not there."""
    if name not in PRECISIONS:
        raise UserError(f"unknown dtype '{name}': use one of {', '.join(PRECISIONS)}")
    if name == "int8" and _INT8_MM is None:
        raise UserError("dtype 'int8' needs PyTorch's _weight_int8pack_mm, which this version does not have")
    if name != "auto":
        return name
    if next(model.parameters()).device.type != "cpu":
        return "float32"
    large = 4 * sum(parameter.numel() for parameter in model.parameters()) > CACHED_BYTES
    return "int8" if large and _INT8_MM is not None else "float32"


def product(weight: Tensor, precision: str) -> Product:
    """x -> x @ weight.T in `precision`; `weight` is (outputs, inputs) and is copied."""
    return _PRODUCTS[precision](weight.detach())


class Float32Product:
    """Writes into a buffer of its own, which the next call overwrites."""

    def __init__(self, weight: Tensor) -> None:
        self.outputs = weight.shape[0]
        # Rows of inputs side by side are read faster, but for wide inputs, whose result is summed too often.
        turned = weight.shape[1] <= weight.shape[0]
        weight = weight.float()
        self.weight = weight.t().contiguous() if turned else weight.clone().t()
        self._out = weight.new_empty(0, self.outputs)

    def __call__(self, x: Tensor) -> Tensor:
        if self._out.shape[0] != x.shape[0]:
            self._out = x.new_empty(x.shape[0], self.outputs)
        return torch.mm(x, self.weight, out=self._out)


class BFloat16Product:
    """PyTorch's own product of a matrix and a row; oneDNN's takes more than twice as long."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight)


class Int8Product:
    """Symmetric, a scale for every output; the scales are rounded to bfloat16 before the weights are, so that their
    rounding is no error."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.float()
        self.scales = (weight.abs().amax(1).clamp(min=1e-12) / 127).to(torch.bfloat16)
        rounded = (weight / self.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        # The operator reads whole blocks of inputs, and beyond the end of a matrix that has none.
        self.missing = -weight.shape[1] % INT8_BLOCK
        self.weight = F.pad(rounded, (0, self.missing))

    def __call__(self, x: Tensor) -> Tensor:
        assert _INT8_MM is not None
        x = x.to(torch.bfloat16)
        return _INT8_MM(F.pad(x, (0, self.missing)) if self.missing else x, self.weight, self.scales)


_PRODUCTS: dict[str, Callable[[Tensor], Product]] = {
    "float32": Float32Product,
    "bfloat16": BFloat16Product,
    "int8": Int8Product,
}
