"""Weights as a step wants them: one row of activations times a matrix reads the whole matrix, so bytes are time.

    float32    the model's own numbers, in the layout that the machine multiplies a single row with fastest
    bfloat16   half the bytes; activations are rounded to bfloat16 before each product
    int8       a quarter of the bytes: a scale for every output, and activations in eight bits too, with a scale each
               time, by PyTorch's `linear_dynamic` (FBGEMM), which reads nearly as fast as memory gives; where that is
               not to be had, activations in bfloat16, by `_weight_int8pack_mm` (what torchao and gpt-fast call)

Only the large matrices of the layers are converted: embedding, norms, the residual stream, attention with its memory,
and the logits stay in float32. `PRECISIONS["auto"]` is a fixed rule, so that a seed plays the same at every start: int8
where the weights are larger than a core's cache, float32 below, where conversions cost more than they save.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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

# Private to PyTorch: without it and `linear_dynamic` int8 is refused, and auto is float32.
_INT8_MM = getattr(torch.ops.aten, "_weight_int8pack_mm", None)


def resolve_precision(name: str, model: nn.Module) -> str:
    """The precision called `name`, "auto" resolved for `model`; `UserError` for one that is not there."""
    if name not in PRECISIONS:
        raise UserError(f"unknown dtype '{name}': use one of {', '.join(PRECISIONS)}")
    if name == "int8" and not _has_int8():
        raise UserError(
            "dtype 'int8' needs PyTorch's linear_dynamic or _weight_int8pack_mm, which this version does not have"
        )
    if name != "auto":
        return name
    if next(model.parameters()).device.type != "cpu":
        return "float32"
    large = 4 * sum(parameter.numel() for parameter in model.parameters()) > CACHED_BYTES
    return "int8" if large and _has_int8() else "float32"


def _has_int8() -> bool:
    return _INT8_MM is not None or _has_linear_dynamic()


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
            with torch.inference_mode(False):  # it is written to in whatever mode the next call comes
                self._out = x.new_empty(x.shape[0], self.outputs)
        return torch.mm(x, self.weight, out=self._out)


class BFloat16Product:
    """PyTorch's own product of a matrix and a row; oneDNN's takes more than twice as long."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.to(torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.bfloat16), self.weight)


def _rounded(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)


def _scales(weight: Tensor) -> Tensor:
    return weight.abs().amax(1).clamp(min=1e-12) / 127


class Int8Product:
    """Symmetric, a scale for every output; activations are rounded to eight bits between the least and the largest of
    the call (seven where the processor's products of bytes would overflow)."""

    def __init__(self, weight: Tensor) -> None:
        self._packed = _packed(weight.float())
        self._fewer_bits = _overflows()

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, self._fewer_bits)
        return out


@contextlib.contextmanager
def _fbgemm() -> Iterator[None]:
    """Weights are packed for FBGEMM inside; PyTorch warns that its quantised tensors may go, and then we do without."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.quantized.engine = before


def _packed(weight: Tensor) -> Any:
    """`weight` (outputs, inputs) float32 as `linear_dynamic` takes it."""
    scales = _scales(weight)
    with _fbgemm():
        zeros = torch.zeros(len(scales), dtype=torch.int64, device="cpu")
        made = torch._make_per_channel_quantized_tensor(_rounded(weight, scales), scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(made, None)


@functools.cache
def _overflows() -> bool:
    """Whether FBGEMM adds two products of eight bits in 16, as it does without VNNI: found out on a row of the largest
    numbers."""
    ones = torch.ones(16, 128, dtype=torch.float32, device="cpu")
    largest = torch.cat([ones[:1, :64], 0 * ones[:1, 64:]], 1)
    found = torch.ops.quantized.linear_dynamic(largest, _packed(ones), False)
    return bool(((found - 64).abs() > 1).any())


@functools.cache
def _has_linear_dynamic() -> bool:
    """Whether `Int8Product` can be had; what PyTorch may do without is asked for by doing it."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return False
    try:
        _overflows()
    except (AttributeError, RuntimeError):
        return False
    return True


class Int8PackProduct:
    """Symmetric, a scale for every output, activations in bfloat16; the scales are rounded to bfloat16 before the
    weights are, so that their rounding is no error."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.float()
        self.scales = _scales(weight).to(torch.bfloat16)
        # The operator reads whole blocks of inputs, and beyond the end of a matrix that has none.
        self.missing = -weight.shape[1] % INT8_BLOCK
        self.weight = F.pad(_rounded(weight, self.scales.float()), (0, self.missing))

    def __call__(self, x: Tensor) -> Tensor:
        assert _INT8_MM is not None
        x = x.to(torch.bfloat16)
        return _INT8_MM(F.pad(x, (0, self.missing)) if self.missing else x, self.weight, self.scales)


def _int8_product(weight: Tensor) -> Product:
    return Int8Product(weight) if _has_linear_dynamic() else Int8PackProduct(weight)


_PRODUCTS: dict[str, Callable[[Tensor], Product]] = {
    "float32": Float32Product,
    "bfloat16": BFloat16Product,
    "int8": _int8_product,
}
