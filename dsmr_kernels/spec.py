"""What a backend is told beside the tensors."""

from typing import NamedTuple


class AttentionSpec(NamedTuple):
    """The scalar arguments of one `memory_attention` call, checked and completed; the scale is > 0."""

    horizon: int
    segment_length: int | None
    segment_offset: int
    visibility: str
    detach_segments: bool
    scale: float
    return_lse: bool
