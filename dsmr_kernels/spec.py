"""What a backend is told: the arguments of one attention call, checked and completed, and what its backward gives."""

from typing import NamedTuple

from torch import Tensor

from dsmr_kernels.ring import Ring


class AttentionSpec(NamedTuple):
    """The scalar arguments of one `memory_attention` call; the scale is > 0."""

    horizon: int
    segment_length: int | None
    segment_offset: int
    visibility: str
    detach_segments: bool
    scale: float
    return_lse: bool


class Inputs(NamedTuple):
    """The arguments of one call. Every tensor of keys, values and queries is contiguous in its last dimension.

    `offsets`: (B,) int64, each row's own segment offset, in the place of the spec's.
    `bias`, `buckets`: (Hq, n) float32 and (D,) int64, what is added to the score of a key by its distance, see
    `memory_attention`; both or none.
    `recorded`: a backward may follow, which wants the log-sum-exp whether the caller does or not.
    `live`: the memory is no snapshot and has been written to: a recomputation must not read it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    memory: Ring | None
    piece_start: Tensor | None
    alibi: Tensor | None
    offsets: Tensor | None
    bias: Tensor | None
    buckets: Tensor | None
    spec: AttentionSpec
    recorded: bool = False
    live: bool = False

    @property
    def wants_lse(self) -> bool:
        return self.recorded or self.spec.return_lse


class Needs(NamedTuple):
    """Which gradients are asked for."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = False


class Gradients(NamedTuple):
    """The gradients of a call; None where nobody asks for one."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
