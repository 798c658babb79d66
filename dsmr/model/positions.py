"""Positions in the piece: rotary angles, sinusoids, ALiBi slopes. Computed once a call and shared by all layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmr_kernels.rotary import rotate

POSITIONS = ("rope", "sinusoidal", "alibi", "none")


def token_positions(seen: Tensor, tokens: int, piece_start: Tensor | None) -> Tensor:
    """Position in its piece of each token of a call.

    Args:
        seen: (B,) int64, tokens of each row's piece before the call.
        piece_start: (B, T) as in `memory_attention`.

    Returns:
        (B, T) int64.
    """
    index = torch.arange(tokens, device=seen.device)
    positions = seen[:, None] + index
    if piece_start is None:
        return positions
    return torch.where(piece_start >= 0, index - piece_start, positions)


def _angles(positions: Tensor, dim: int, base: float, frequencies: Sequence[float] | None = None) -> Tensor:
    """(B, T) -> (B, T, dim // 2) angles in radians. In float64 where there is one: a stream plays on for ever, and
    float32 would lose a whole turn after a few million tokens."""
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    if frequencies is not None:
        return positions.to(wide)[..., None] * torch.tensor(frequencies, dtype=wide, device=positions.device)
    exponent = torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim
    return positions.to(wide)[..., None] * base**-exponent


@dataclass(frozen=True)
class Rotary:
    """cos and sin of the rotary angles of a call's tokens, (B, 1, T, rotary_dim // 2) float32 each."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(
        cls, positions: Tensor, rotary_dim: int, base: float, frequencies: Sequence[float] | None = None
    ) -> "Rotary":
        """Rotary embedding (Su et al., 2021) at `positions` (B, T): of `base`, or with the angles a token that are
        given, rotary_dim // 2 of them."""
        angles = _angles(positions, rotary_dim, base, frequencies)[:, None]
        return cls(angles.cos().to(torch.float32), angles.sin().to(torch.float32))

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (B, H, T, head_dim) by pairing its two halves, those of its first rotary_dim numbers; in float32,
        returned in x's dtype."""
        turned = 2 * self.cos.shape[-1]
        if turned == x.shape[-1]:
            return rotate(x, self.cos, self.sin)
        return torch.cat([rotate(x[..., :turned], self.cos, self.sin), x[..., turned:]], -1)

    def rotate_into(self, out: Tensor, x: Tensor) -> None:
        """The same for one token a row, with no new memory: x and out (B, H, head_dim), float32, apart."""
        half = x.shape[-1] // 2
        cos, sin = self.cos[:, :, 0], self.sin[:, :, 0]
        (first, second), (to_first, to_second) = x.split(half, -1), out.split(half, -1)
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding (Vaswani et al., 2017) of positions (B, T): (B, T, dim) float32, sines then cosines."""
    angles = _angles(positions, dim, 10000.0)
    return torch.cat([angles.sin(), angles.cos()], -1).to(torch.float32)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi slopes (Press et al., 2022): (heads,) float32, a geometric sequence that ends at 2 ** -8; for a number of
    heads that is not a power of two, the odd ones of the next finer sequence fill up."""

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    power = 2 ** int(math.log2(heads))
    slopes = geometric(power) + geometric(2 * power)[::2][: heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
