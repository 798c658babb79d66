"""What a backend is told: the arguments of one attention call, checked and completed, and what its backward gives; and
what is done to its results afterwards, whichever it is."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
        swift: what computes those of them in which nothing takes part but q, k, v and memory: of these out, or None
            where it is to be asked for as others are. None itself if there is none yet, False if there can be none.
    """

    __slots__ = ("choice", "layout", "negated", "plans", "spec", "swift")

    def __init__(
        self,
        choice: Any,
        spec: AttentionSpec | None = None,
        layout: tuple[Any, ...] = (),
        negated: bool = False,
    ) -> None:
        self.choice, self.spec, self.layout, self.negated = choice, spec, layout, negated
        self.plans: dict[Any, Any] = {}
        self.swift: Any = None


def learning(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward may follow."""
    return torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    )


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of them is differentiated forwards (`torch.func.jvp`, `torch.autograd.forward_ad`). It needs asking
    before a kernel is launched, which PyTorch does not see: the result would have no tangent, and nobody would know."""
    return forward_ad._current_level >= 0 and any(x is not None and _is_dual(x) for x in tensors)


def _is_dual(x: Tensor) -> bool:
    """Whether it has a tangent, also one of a `torch.func.jvp` around the transforms at work: each hides those."""
    functorch = torch._C._functorch
    if not torch._C._are_functorch_transforms_active():
        return forward_ad.unpack_dual(x).tangent is not None
    if not functorch.is_batchedtensor(x) and forward_ad.unpack_dual(x).tangent is not None:
        return True
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter  # private: asked for here alone

    inmost = retrieve_current_functorch_interpreter()
    if functorch.maybe_get_level(x) == inmost.level():
        x = functorch.get_unwrapped(x)
    with inmost.lower():
        return _is_dual(x)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The results of a softmax that one more logit a head takes part in, which has no value: all of a row is weighed
    down by the same factor, so that it may be done afterwards."""
    logits = sinks.to(lse.dtype)[:, None]  # [Hq, 1]
    return (out * torch.sigmoid(lse - logits).unsqueeze(-1)).to(out.dtype), torch.logaddexp(lse, logits)


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


Stored = tuple[Tensor, Tensor, Tensor, Tensor]
"""k, v, length and position of a memory."""


class Prepared(Protocol):
    """Calls of one kind in which nothing takes part but q, k, v and a memory in their dtype, as a backend has prepared
    them: what follows from their kind is no longer asked."""

    def stands(self) -> bool:
        """Whether it is still what the backend would do."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, stored: Stored | None) -> tuple[Tensor, Tensor]:
        """out and lse."""

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, stored: Stored | None, out: Tensor, lse: Tensor, grad: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
        """The gradients of q, k and v that are needed; None if the gradient of out lies in no way that is served."""


class Gradients(NamedTuple):
    """The gradients of a call; None where nobody asks for one."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None
