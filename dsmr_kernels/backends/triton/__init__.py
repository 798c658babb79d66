"""Fused Triton kernels: one online softmax over ring memory and current keys, forward and backward.

`primitives` holds the visibility rule for a tile, `walk` its way over its keys, `forward` and `backward` the kernels,
`splits` the sharing of tiles in small grids, `bias` the kernels of a learned bias by distance, `configs` tile sizes by
architecture, `launch` the way to the GPU, `training` that of one call, `prepared` the short one of a call like an
earlier one, and `limits` how far it reaches; `decode` serves
the newest tokens alone, `step` stores them before, `arrivals` tells which program of several is the last; `tuned` reads
measured tile sizes. `hopper` and `descriptors` are forwards for Hopper that are asked for, `stretches` their way over
the keys, and `bulk` the way to them.

Under TRITON_INTERPRET=1 they run on CPU tensors, for tests. They may import the contract and `autograd`, and Triton,
which need not be installed: nothing but the dispatcher, its trial and the tools may import this room, and only when it
is asked for.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends.autograd import Method, attention_by
from dsmr_kernels.backends.triton import training
from dsmr_kernels.backends.triton.configs import DTYPES, HEAD_DIMS
from dsmr_kernels.backends.triton.decode import decode_attention
from dsmr_kernels.backends.triton.launch import INTERPRETED
from dsmr_kernels.backends.triton.prepared import prepare
from dsmr_kernels.backends.triton.step import append_rotated
from dsmr_kernels.spec import Gradients, Inputs, Needs

__all__ = ["append_rotated", "decode_attention", "memory_attention", "unsupported"]
_ELSEWHERE = "backend 'sdpa' serves it as it is"


def unsupported(q: Tensor, v_head_dim: int) -> str | None:
    """Why this backend cannot serve `q`; None if it can."""
    if q.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"it runs on {'CPU tensors under TRITON_INTERPRET=1' if INTERPRETED else 'GPUs'}, not on {q.device}"
    dtypes = (torch.float16, torch.float32) if INTERPRETED else DTYPES  # the interpreter errs in bfloat16
    if q.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, q.dtype)]
        # Eight-bit floats are nearest to the narrowest dtype, float64 to the widest.
        nearest = names[0] if q.dtype.itemsize < 2 else "float16" if q.dtype == torch.bfloat16 else names[-2]
        return f"it computes in {', '.join(names[:-1])}, not {names[-1]}; nearest: {nearest}; {_ELSEWHERE}"
    least, most = HEAD_DIMS
    for dim, whose in ((q.shape[3], ""), (v_head_dim, " of v")):
        if not least <= dim <= most:
            edge = least if dim < least else most
            return f"it serves head_dim{whose} from {least} to {most}, not {dim}; nearest: {edge}; {_ELSEWHERE}"
    return None


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor, None]:
    return *training.forward(inputs), None


def _backward(
    inputs: Inputs,
    plan: None,
    result: tuple[Tensor, Tensor] | None,
    grad: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    assert result is not None
    return training.backward(inputs, *result, grad, grad_lse, needs)


memory_attention = attention_by(Method("triton", _forward, _backward, lambda inputs: True, prepare))
