"""What the kernels must show on a GPU before they serve it unasked: the oracle's results, in a call of every kind."""

import torch


def disagreement(device: torch.device) -> str | None:
    """Why the kernels must not serve a device, in a sentence; None if they may.

    Compiles their most used forms, which takes some seconds when a machine does it first; Triton keeps them on disk.
    Waits for the device.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _compare(device)
    except Exception as error:  # whatever a compiler, a driver or a comparison has to say
        said = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {said}" if said else type(error).__name__
    return None


def _compare(device: torch.device) -> None:
    from dsmr_kernels.api import append_rotated, decode_attention
    from dsmr_kernels.testing import assert_agrees_with_oracle, error, random_case

    case = random_case(
        queries=150, capacity=200, seen=[333, 70], horizon=150, segment_length=64, head_dim=64, dtype=torch.bfloat16
    ).to(device=device)
    assert_agrees_with_oracle(case, "triton")
    memory, q, k, v = case.memory, *(x[:, :, :1] for x in (case.q, case.k, case.v))
    assert memory is not None
    cos, sin = (function(torch.rand(2, 1, 1, 32, device=device)) for function in (torch.cos, torch.sin))
    copy = memory.clone()
    turned = append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton")
    exact = append_rotated(q, k, v, copy, cos=cos, sin=sin, backend="reference")
    same = torch.equal(turned, exact) and all(torch.equal(x, getattr(copy, n)) for n, x in memory.tensors().items())
    assert same, "triton: append_rotated does not store what PyTorch computes"
    exact = decode_attention(turned.double(), memory.to(dtype=torch.float64), backend="reference")
    found = error(decode_attention(turned, memory, backend="triton"), exact)
    assert found < 0.05, f"triton: decode_attention errs by {found:.3g}"
