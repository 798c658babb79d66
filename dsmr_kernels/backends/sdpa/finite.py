"""Values that are not finite, kept to the queries that see them: a weight of 0 does not silence a NaN in a product.

Where nobody sees a key its score is replaced before the softmax, so that what is wrong with a key stays with those who
see it. A token whose value is not finite is therefore given a key of NaN and a value of zeros: who sees it has NaN for
a result, and nobody else. Such a token shows in the results, whose sum is taken, and only then is it looked for.
"""

import math

import torch
from torch import Tensor

from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Inputs


def finite(*tensors: Tensor) -> bool:
    """Whether all is; a sum that overflows says no, which costs time and changes nothing."""
    total = 0.0
    for x in tensors:
        total += (x.sum(dtype=torch.float32) if x.dtype == torch.float16 else x.sum()).item()
    return math.isfinite(total)


def marked(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of k and v: NaN for the keys of the tokens whose values are not finite, and zeros for their values."""
    broken = ~v.isfinite().all(-1, keepdim=True)
    return k.masked_fill(broken, math.nan), v.masked_fill(broken, 0.0)


def _marked_ring(memory: Ring) -> Ring:
    view = Ring(**memory.tensors(), room=memory.room)
    if memory.k_scale is not None and memory.v_scale is not None:
        broken = ~memory.v_scale.isfinite()
        view.k_scale, view.v_scale = memory.k_scale.masked_fill(broken, math.nan), memory.v_scale.masked_fill(broken, 0)
    else:
        view.k, view.v = marked(memory.k, memory.v)
    return view


def kept_apart(inputs: Inputs) -> Inputs:
    """The call with values that its products may multiply by 0: itself, unless some of its own are not finite, or of
    those that tiles of its memory see in part."""
    memory = inputs.memory
    values = [inputs.v] if inputs.q.shape[2] > 1 else []
    if memory is not None and inputs.spec.visibility == "sliding" and inputs.q.shape[2] > 1:
        values.append(memory.v if memory.v_scale is None else memory.v_scale)
    if finite(*values):
        return inputs
    k, v = marked(inputs.k, inputs.v)
    ring = None if memory is None else _marked_ring(memory)
    return inputs._replace(k=k, v=v, memory=ring, alike=None)
