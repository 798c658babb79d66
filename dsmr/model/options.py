"""What a layer's options may be, beside those that say whom it sees: refused when the layer is made, in a sentence."""

import math
from collections.abc import Sequence


def check_options(
    position: str,
    head_dim: int,
    rope_base: float,
    bias: bool | str,
    norm_eps: float,
    dropout: float,
    attention_dropout: float,
    rotary_dim: int | None,
    rope_frequencies: Sequence[float] | None,
    scale: float | None,
) -> None:
    """`ValueError` for options of `DSMRAttention`, of these names, that it cannot have."""
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"head_dim must be an integer >= 1, got {head_dim!r}")
    if not (isinstance(bias, bool) or (isinstance(bias, str) and bias == "qkv")):  # 1 == True, but is another option
        raise ValueError(f'bias must be True, False or "qkv", got {bias!r}')
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be above 0 and finite, got {norm_eps}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if attention_dropout:
        raise ValueError(
            f"attention_dropout must be 0, got {attention_dropout}: the kernels never hold the attention weights that "
            "it would drop; dropout= drops of the output"
        )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if not 0 < rope_base < math.inf:
        raise ValueError(f"rope_base must be above 0 and finite, got {rope_base}")
    _check_rotary(position, head_dim, rotary_dim, rope_frequencies)


def _check_rotary(
    position: str, head_dim: int, rotary_dim: int | None, rope_frequencies: Sequence[float] | None
) -> None:
    for name, given in (("rotary_dim", rotary_dim), ("rope_frequencies", rope_frequencies)):
        if given is not None and position != "rope":
            raise ValueError(f'{name} goes with position "rope" only, got position {position!r}')
    if rotary_dim is not None and (rotary_dim % 2 or not 2 <= rotary_dim <= head_dim):
        raise ValueError(f"rotary_dim must be even, at least 2 and at most head_dim = {head_dim}, got {rotary_dim}")
    pairs = (rotary_dim or head_dim) // 2
    if rope_frequencies is not None and len(rope_frequencies) != pairs:
        raise ValueError(
            f"rope_frequencies must hold one number for each of the {pairs} pairs, got {len(rope_frequencies)}"
        )
    if rope_frequencies is not None and not all(map(math.isfinite, rope_frequencies)):
        raise ValueError(f"rope_frequencies must be finite, got {tuple(rope_frequencies)}")
