"""Training calls of a kind, prepared: what is left of one is to make room for its results and to launch at addresses.

For the calls that a model makes at every step: queries, keys, values and a memory in their dtype or none, all of them
as in an earlier call (`dsmr_kernels.alike`) but for where they lie. Everything else goes through `training`, whose
plans these are, and gives the same bits. Forward and backward gather addresses each for itself: a function for both
would be a call of Python, of which there are to be few.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.triton import bulk, configs, training
from dsmr_kernels.backends.triton import launch as launching
from dsmr_kernels.backends.triton.launch import hooked
from dsmr_kernels.backends.triton.training import room
from dsmr_kernels.spec import Inputs, Needs, Stored

_MOST = 16  # backwards of a kind, which differ in the strides of a gradient and in what is needed


class Prepared:
    """See `dsmr_kernels.spec.Prepared`."""

    __slots__ = ("_as_wide", "_backwards", "_device", "_forward", "_generation", "_plans", "_processors")

    def __init__(self, inputs: Inputs) -> None:
        q, v = inputs.q, inputs.v
        _, self._plans = training.read(inputs)
        self._device, self._generation, self._processors = q.device, configs.generation, training.processors(q.device)
        self._as_wide = v.shape[3] == q.shape[3]
        plan = self._plans.forward
        self._forward = None if plan.together is not None else plan.launch
        self._backwards: dict[Any, tuple[Any, ...]] = {}

    def stands(self) -> bool:
        """Whether `training` would launch the same."""
        return (
            self._generation == configs.generation
            and not bulk.asked_for()
            and self._processors == training.processors(self._device)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, stored: Stored | None) -> tuple[Tensor, Tensor]:
        """out and lse; `stored` lies as the memory of the call did that this was prepared from."""
        plans, device, launch = self._plans, self._device, self._forward
        out = room(q) if self._as_wide else torch.empty(plans.out_shape, dtype=q.dtype, device=device)
        lse = torch.empty_strided(*plans.lse, dtype=torch.float32, device=device)
        with launching.on(device):
            stream = launching.stream_of(device)
            if launch is not None and launch.by_address and not hooked():
                a, b, c, o, s = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr()
                bits = a | b | c | o | s
                if stored is None:
                    ring = b, c, a, a, a, a
                else:
                    m, n, u, w = stored
                    d, e, f, g = m.data_ptr(), n.data_ptr(), u.data_ptr(), w.data_ptr()
                    bits |= d | e | f | g
                    ring = d, e, a, a, f, g
                if not bits & 15:
                    launch.at(stream, a, b, c, *ring, a, a, a, o, s)
                    return out, lse
            training.start_forward(stream, plans, _as_read(q, k, v, stored), out, lse)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, stored: Stored | None, out: Tensor, lse: Tensor, grad: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
        """The gradients of q, k and v that are needed; None where the tensors lie in another way than they did."""
        key = grad.stride(), needs
        found = self._backwards.get(key)
        if found is None:
            if launching.as_rows(grad) is not grad:
                return None
            if len(self._backwards) >= _MOST:
                self._backwards.clear()
            plans = self._plans.backward(grad, False, Needs(*needs))
            whole = all(plan is not None and plan.together is None for plan in plans)
            found = self._backwards[key] = plans, whole
        plans, whole = found
        dq, dk, dv = room(q) if needs[0] else None, room(k) if needs[1] else None, room(v) if needs[2] else None
        delta = lse if plans[0] is None else room(lse)
        with launching.on(self._device):
            stream = launching.stream_of(self._device)
            if whole and plans[0].launch.by_address and plans[1].launch.by_address and not hooked():
                a, b, c, i, o, s = (
                    q.data_ptr(), k.data_ptr(), v.data_ptr(), grad.data_ptr(), out.data_ptr(), lse.data_ptr(),
                )  # fmt: skip
                t, x = delta.data_ptr(), a if dq is None else dq.data_ptr()
                y, z = b if dk is None else dk.data_ptr(), b if dv is None else dv.data_ptr()
                bits = a | b | c | i | o | s | t | x | y | z
                if stored is None:
                    ring = b, c, a, a, a, a
                else:
                    m, n, u, w = stored
                    d, e, f, g = m.data_ptr(), n.data_ptr(), u.data_ptr(), w.data_ptr()
                    bits |= d | e | f | g
                    ring = d, e, a, a, f, g
                if not bits & 15:
                    plans[0].launch.at(stream, a, b, c, *ring, a, a, a, i, a, o, s, t, x)
                    plans[1].launch.at(stream, a, b, c, a, a, a, i, s, t, y, z)
                    return dq, dk, dv
            tensors = _as_read(q, k, v, stored)
            training.start_backward(stream, plans, tensors, (grad, None, out, lse, delta), (dq, dk, dv))
        return dq, dk, dv


def _as_read(q: Tensor, k: Tensor, v: Tensor, stored: Stored | None) -> tuple[Tensor, ...]:
    """As `training.read` gives them."""
    if stored is None:
        return q, k, v, k, v, q, q, q, q, q, q, q
    keys, values, length, position = stored
    return q, k, v, keys, values, q, q, length, position, q, q, q


def prepare(inputs: Inputs) -> Prepared | None:
    """Of a call in which nothing takes part but q, k, v and a memory in their dtype; None if it cannot be prepared, or
    would be outdated at once."""
    memory = inputs.memory
    if not inputs.q.numel() or bulk.asked_for():
        return None
    if memory is not None:
        counters = memory.length.is_contiguous() and memory.position.is_contiguous()
        if not memory.k.numel() or memory.k_scale is not None or not counters:
            return None
    return Prepared(inputs)
