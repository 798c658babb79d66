"""What the Triton kernels must show on a GPU before they serve it unasked: the oracle's results.

Tried out are a forward and a backward over a wrapped memory, and a token that is stored and decoded, in bfloat16 at
head_dim 64: whether this GPU, its driver and this Triton run our code, not every form that it takes.
"""

import torch

from dsmr_kernels.backends import reference
from dsmr_kernels.cases import random_case
from dsmr_kernels.memory import KVMemory
from dsmr_kernels.tolerance import assert_within_rule, error

HEAD_DIM, CAPACITY = 64, 1024  # a ring of which decoding makes several splits


def disagreement(device: torch.device) -> str | None:
    """Why the kernels must not serve a device, in a sentence; None if they may.

    Compiles, which takes some seconds when a machine does it first; Triton keeps the result on disk. Waits for the
    device, and leaves every random generator as it is. An access that the GPU forbids ends its use by the process,
    here as anywhere.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _compare(device)
    except Exception as failure:  # whatever a compiler, a driver or a comparison has to say
        said = str(failure).strip().split("\n")[0]
        return f"{type(failure).__name__}: {said}" if said else type(failure).__name__
    return None


def _compare(device: torch.device) -> None:
    from dsmr_kernels.backends import triton  # not above: importing it fails where Triton is missing

    case = random_case(
        queries=150, capacity=CAPACITY, seen=[1500, 70], horizon=CAPACITY, segment_length=64, head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
    ).to(device=device)  # fmt: skip
    if reason := triton.unsupported(case.q, case.q.shape[3], False):
        raise ValueError(f"backend 'triton' cannot serve these inputs: {reason}")
    exact = case.to(torch.float64).computed_by(reference.memory_attention)
    plain = case.computed_by(reference.memory_attention, work=case.q.dtype)
    assert_within_rule("triton", case.computed_by(triton.memory_attention), plain, exact, case.q.dtype)
    memory, q, k, v = case.memory, *(x[:, :, :1] for x in (case.q, case.k, case.v))
    assert memory is not None
    angles = torch.arange(HEAD_DIM, dtype=torch.float32, device=device).view(2, 1, 1, 1, -1).expand(-1, 2, -1, -1, -1)
    cos, sin = angles.cos(), angles.sin()
    copy, scale = memory.clone(), HEAD_DIM**-0.5
    with torch.no_grad():
        turned = triton.append_rotated(q, k, v, memory, cos[0], sin[0])
        told = reference.append_rotated(q, k, v, copy, cos[0], sin[0])
        stored = all(torch.equal(x, getattr(copy, name)) for name, x in memory.tensors().items())
        if not (stored and torch.equal(turned, told)):
            raise AssertionError("append_rotated does not store what PyTorch computes")
        held = KVMemory(memory.k.double(), memory.v.double(), memory.length, memory.position)
        decoded = reference.decode_attention(turned.double(), held, None, None, None, None, None, scale)
        found = error(triton.decode_attention(turned, memory, None, None, None, None, None, scale), decoded)
    allowed = 4 * torch.finfo(torch.bfloat16).eps * float(decoded.abs().max())
    if not found <= allowed:
        raise AssertionError(f"decode_attention errs by {found:.3g}, allowed {allowed:.3g}")
