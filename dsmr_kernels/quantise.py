"""Eight-bit keys and values: integers from -127 to 127, with one float32 scale a token and head.

Symmetric, so that nothing but a factor stands between a stored vector and its value: it may be applied to a score or a
weight instead of the vector. The scale is float32 because keys of any float dtype must fit it; beside a head of 64
that is 4 bytes on 64, where float16 would save 2 and overflow. Integers know no NaN: a vector that is not finite has a
scale of NaN, and is NaN to whoever reads it.
"""

import torch
from torch import Tensor

MOST = 127
SCALE_BYTES = 4  # of a key's or value's scale


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., head_dim) -> int8 of the same shape, rounded to nearest, and its scale (...) float32: the largest
    magnitude is stored as 127, a vector of zeros as zeros with a scale of 0, and one that is not finite as anything,
    with a scale of NaN."""
    wide = x.detach().to(torch.float32)
    scale = wide.abs().amax(-1) * (1 / MOST)
    # Below the normal numbers a reciprocal overflows: such a vector is as good as zeros.
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0) + scale * 0  # NaN if it is not finite
    inverse = 1 / torch.where(scale > 0, scale, 1.0)[..., None]
    return (wide * inverse).round_().clamp_(-MOST, MOST).to(torch.int8), scale


def dequantise(x: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that `quantise` stored."""
    return (x.to(torch.float32) * scale[..., None]).to(dtype)
