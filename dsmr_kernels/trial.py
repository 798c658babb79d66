"""What the Triton kernels must show on a GPU before they serve it unasked: the oracle's results.

Tried out are a forward and a backward over a wrapped memory, the same in a grid so small that programs share its tiles,
and a token that is stored and decoded, by the tolerance rule, in each dtype and class of head_dim that is asked for,
since each is compiled anew, and so is a learned bias by distance: whether this GPU, its driver and this Triton run our
code, not every form that it takes.
"""

import torch
from torch import Tensor

from dsmr_kernels.backends import reference
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.memory import KVMemory
from dsmr_kernels.rotary import rotate
from dsmr_kernels.tolerance import assert_within_rule

CAPACITY = 1024  # a ring of which decoding makes several splits
CLASSES = (16, 32, 64, 128, 256)


def class_of(head_dim: int) -> int:
    """The class that a head_dim belongs to, by the width that it is padded to."""
    return next((width for width in CLASSES if head_dim <= width), CLASSES[-1])


def disagreement(device: torch.device, head_dim: int, dtype: torch.dtype, biased: bool = False) -> str | None:
    """Why the kernels must not serve a head_dim in a dtype on a device, in a sentence; None if they may.

    `biased`: asked of calls with a learned bias by distance.

    Compiles, which takes some seconds when a machine does it first; Triton keeps the result on disk. Waits for the
    device, and leaves every random generator as it is. An access that the GPU forbids ends its use by the process,
    here as anywhere.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            _compare(device, head_dim, dtype, biased)
    except Exception as failure:  # whatever a compiler, a driver or a comparison has to say
        said = str(failure).strip().split("\n")[0]
        return f"{type(failure).__name__}: {said}" if said else type(failure).__name__
    return None


def _compare(device: torch.device, head_dim: int, dtype: torch.dtype, biased: bool) -> None:
    from dsmr_kernels.backends import triton  # not above: importing it fails where Triton is missing

    case = random_case(
        queries=150, capacity=CAPACITY, seen=[1500, 70], horizon=250, segment_length=64, head_dim=head_dim, dtype=dtype,
        biased=biased,
    ).to(device=device)  # fmt: skip
    if reason := triton.unsupported(case.q, head_dim):
        raise ValueError(f"backend 'triton' cannot serve these inputs: {reason}")
    shared = random_case(
        batch=1, heads=4, kv_heads=1, queries=200, capacity=1500, seen=[1600], horizon=1500, head_dim=head_dim,
        dtype=dtype, biased=biased,
    ).to(device=device)  # fmt: skip
    for one in (case, shared):
        exact = one.to(torch.float64).computed_by(reference.memory_attention)
        plain = one.computed_by(reference.memory_attention, work=dtype)
        assert_within_rule("triton", one.computed_by(triton.memory_attention), plain, exact, dtype)
    with torch.no_grad():
        _compare_a_step(case)


def _compare_a_step(case: Case) -> None:
    """A token of a case, turned, stored in its memory and decoded."""
    from dsmr_kernels.backends import triton

    memory, dtype, (q, k, v) = case.memory, case.q.dtype, (x[:, :, :1] for x in (case.q, case.k, case.v))
    assert memory is not None
    half = torch.arange(q.shape[3] // 2, dtype=torch.float32, device=q.device).expand(2, 1, 1, -1)
    cos, sin = half.cos(), half.sin()
    before, stored = memory.k.clone(), memory.clone()
    stored.append(k, v)  # whatever the rotation: where it lies, and what lies there but for the new keys
    turned = triton.append_rotated(q, k, v, memory, cos, sin)
    for name, x in stored.tensors().items():
        untouched = stored.k == before if name == "k" else torch.ones_like(x, dtype=torch.bool)
        if not torch.equal(getattr(memory, name)[untouched], x[untouched]):
            raise AssertionError(f"append_rotated leaves other {name} than KVMemory.append")
    newest = (memory.position - 1).remainder(memory.capacity)
    rows = torch.arange(len(newest), device=newest.device)
    found = {"turned q": turned, "turned k": memory.k[rows, :, newest].unsqueeze(2)}
    plain = {"turned q": rotate(q, cos, sin), "turned k": rotate(k, cos, sin)}
    exact = {"turned q": _rotated_exactly(q, cos, sin), "turned k": _rotated_exactly(k, cos, sin)}
    assert_within_rule("append_rotated", found, plain, exact, dtype)

    scale = q.shape[3] ** -0.5
    bias, buckets = (case.options.get(name) for name in ("distance_bias", "distance_buckets"))
    held = KVMemory(memory.k.double(), memory.v.double(), memory.length, memory.position)
    keys, values, mask = memory.ordered()
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = (turned @ keys.mT) * scale
    if bias is not None and buckets is not None:  # the newest slot is at distance 0
        distance = torch.arange(memory.capacity - 1, -1, -1, device=q.device).clamp(max=len(buckets) - 1)
        scores = scores + bias[:, buckets[distance]].to(dtype).unsqueeze(1)
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    assert_within_rule(
        "decode_attention",
        {"out": triton.decode_attention(turned, memory, None, None, None, bias, buckets, scale)},
        {"out": scores.softmax(-1) @ values},
        {"out": reference.decode_attention(turned.double(), held, None, None, None, bias, buckets, scale)},
        dtype,
    )


def _rotated_exactly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.double().chunk(2, -1)
    return torch.cat([first * cos.double() - second * sin.double(), first * sin.double() + second * cos.double()], -1)
