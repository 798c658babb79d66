"""What the Triton kernels must show on a GPU before they serve it unasked: the oracle's results.

Tried out are a forward and a backward over a wrapped memory, and a token that is stored and decoded, in bfloat16 at
head_dim 64: whether this GPU, its driver and this Triton run our code, not every form that it takes.
"""

import torch

from dsmr_kernels.api import append_rotated, decode_attention
from dsmr_kernels.memory import KVMemory
from dsmr_kernels.testing import assert_agrees_with_oracle, error, random_case

HEAD_DIM, CAPACITY = 64, 1024  # a ring of which decoding makes several splits


def disagreement(device: torch.device) -> str | None:
    """Why the kernels must not serve a device, in a sentence; None if they may.

    Compiles, which takes some seconds when a machine does it first; Triton keeps the result on disk. Waits for the
    device, and leaves every random generator as it is. An access that the GPU forbids ends its use by the process,
    here as anywhere.

    Raises:
        ValueError: if DSMR_TUNED names a file of configurations that cannot be used.
    """
    from dsmr_kernels.backends.triton import configs, launch

    configs.choose("forward", launch.architecture(device), HEAD_DIM, torch.bfloat16)  # no fault of the kernels
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _compare(device)
    except Exception as failure:  # whatever a compiler, a driver or a comparison has to say
        said = str(failure).strip().split("\n")[0]
        return f"{type(failure).__name__}: {said}" if said else type(failure).__name__
    return None


def _compare(device: torch.device) -> None:
    case = random_case(
        queries=150,
        capacity=CAPACITY,
        seen=[1500, 70],
        horizon=CAPACITY,
        segment_length=64,
        head_dim=HEAD_DIM,
        dtype=torch.bfloat16,
    ).to(device=device)
    assert_agrees_with_oracle(case, "triton")
    memory, q, k, v = case.memory, *(x[:, :, :1] for x in (case.q, case.k, case.v))
    assert memory is not None
    angles = torch.arange(HEAD_DIM, dtype=torch.float32, device=device).view(2, 1, 1, 1, -1).expand(-1, 2, -1, -1, -1)
    cos, sin = angles.cos(), angles.sin()
    copy = memory.clone()
    turned = append_rotated(q, k, v, memory, cos=cos[0], sin=sin[0], backend="triton")
    exact = append_rotated(q, k, v, copy, cos=cos[0], sin=sin[0], backend="reference")
    stored = all(torch.equal(x, getattr(copy, name)) for name, x in memory.tensors().items())
    if not (stored and torch.equal(turned, exact)):
        raise AssertionError("append_rotated does not store what PyTorch computes")
    held = KVMemory(memory.k.double(), memory.v.double(), memory.length, memory.position)
    exact = decode_attention(turned.double(), held, backend="reference")
    found = error(decode_attention(turned, memory, backend="triton"), exact)
    allowed = 4 * torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
    if not found <= allowed:
        raise AssertionError(f"decode_attention errs by {found:.3g}, allowed {allowed:.3g}")
