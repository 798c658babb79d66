"""What a backend is told: the arguments of one attention call, checked and completed, and what its backward gives."""

from typing import Any, NamedTuple

import torch
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


def layout(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """How queries, keys and values lie."""
    return q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype


class Alike:
    """What calls of the same shapes, strides, dtypes, devices and options have in common, see `dsmr_kernels.alike`.

    Attributes:
        spec: their scalar arguments; None of a call that is no `memory_attention`.
        layout: of q, k and v as a backend is handed them.
        negated: whether q was, since the scale was negative.
        choice: the backend's, see `dsmr_kernels.dispatch.Choice`.
        plans: what the backend has worked out; its own affair.
    """

    __slots__ = ("choice", "layout", "negated", "plans", "spec")

    def __init__(
        self,
        choice: Any,
        spec: AttentionSpec | None = None,
        layout: tuple[Any, ...] = (),
        negated: bool = False,
    ) -> None:
        self.choice, self.spec, self.layout, self.negated = choice, spec, layout, negated
        self.plans: dict[Any, Any] = {}


def learning(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    )


class Inputs(NamedTuple):
    """The arguments of one call. Every tensor of keys, values and queries is contiguous in its last dimension.

    `offsets`: (B,) int64, each row's own segment offset, in the place of the spec's.
    `bias`, `buckets`: (Hq, n) float32 and (D,) int64, what is added to the score of a key by its distance, see
    `memory_attention`; both or none.
    `recorded`: a backward may follow, which wants the log-sum-exp whether the caller does or not.
    `live`: the memory is no snapshot and has been written to: a recomputation must not read it.
    `alike`: what calls of these shapes, strides, dtypes and options have in common, for a backend that keeps something
    of it; whoever puts other tensors in their place takes it out.
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
    alike: Alike | None = None

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
