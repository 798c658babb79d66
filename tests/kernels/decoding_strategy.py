"""Hypothesis draws steps of decoding from the whole argument space: new tokens that are turned and stored, and their
attention over the ring. Each is held against the oracle, what it stores bit for bit."""

from dataclasses import dataclass, field

import torch
from attention_strategy import LAYOUTS, laid_out
from hypothesis import strategies as st
from torch import Tensor

from dsmr_kernels import KVMemory, append_rotated, decode_attention
from dsmr_kernels.cases import filled_memory
from dsmr_kernels.tolerance import error


@dataclass
class Step:
    """The inputs of one `append_rotated` and of the `decode_attention` after it."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: KVMemory
    angles: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, object] = field(default_factory=dict)


def _options(draw: st.DrawFn, heads: int, new: int, length: Tensor, normal: torch.Generator) -> dict[str, object]:
    options: dict[str, object] = {}
    if draw(st.booleans()):
        sees = [draw(st.integers(min(new, int(held)), int(held) + 3)) for held in length]
        options["visible"] = torch.tensor(sees, dtype=torch.int32)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads, generator=normal)
    if draw(st.booleans()):
        options["sinks"] = torch.tensor(
            draw(
                st.lists(st.sampled_from([-float("inf"), -50.0, -1.0, 0.0, 2.0, 50.0]), min_size=heads, max_size=heads)
            )
        )
    if draw(st.booleans()):
        columns, distances = draw(st.integers(1, 6)), draw(st.integers(1, 80))
        options["distance_bias"] = torch.randn(heads, columns, generator=normal)
        options["distance_buckets"] = torch.randint(columns, (distances,), generator=normal)
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.05, 0.5]))
    return options


@st.composite
def decoding_steps(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...]) -> Step:
    """Any step: rows, groups, new tokens, a ring that is empty, part full or wrapped, in q's dtype or int8, values of
    another width, layouts, and every option."""
    kv_heads, group, batch = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    new = draw(st.integers(1, 16))
    capacity = draw(st.integers(new, 150))
    seen = draw(st.lists(st.integers(0, 200), min_size=batch, max_size=batch))
    dim, dtype = draw(st.sampled_from(head_dims)), draw(st.sampled_from(dtypes))
    v_dim = draw(st.none() | st.sampled_from([16, 24, 40])) or dim
    normal = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    memory = filled_memory(batch, kv_heads, capacity, dim, seen, v_head_dim=v_dim, dtype=dtype, generator=normal)
    memory = memory.to(dtype=draw(st.sampled_from([None, torch.int8])))
    shapes = ((kv_heads * group, dim), (kv_heads, dim), (kv_heads, v_dim))
    q, k, v = (
        laid_out(torch.randn(batch, heads, new, width, generator=normal).to(dtype), draw(st.sampled_from(LAYOUTS)))
        for heads, width in shapes
    )
    angles = {}
    if dim % 2 == 0 and draw(st.booleans()):
        angles = {name: torch.randn(batch, 1, new, dim // 2, generator=normal) for name in ("cos", "sin")}
    length = (memory.length + new).clamp(max=capacity)
    return Step(q, k, v, memory, angles, _options(draw, kv_heads * group, new, length, normal))


def assert_step_agrees_with_oracle(step: Step, backend: str) -> None:
    """Fail if the backend stores, turns or attends otherwise than the reference."""
    memory, other = step.memory, step.memory.clone()
    turned = append_rotated(step.q, step.k, step.v, memory, **step.angles, backend=backend)
    assert torch.equal(turned, append_rotated(step.q, step.k, step.v, other, **step.angles, backend="reference"))
    for name, x in memory.tensors().items():
        assert torch.equal(x, getattr(other, name)), name
    held = KVMemory(*memory.values(torch.float32), memory.length, memory.position).to(dtype=torch.float64)
    out = decode_attention(turned, memory, backend=backend, **step.options)
    exact = decode_attention(turned.double(), held, backend="reference", **step.options)
    found, allowed = error(out, exact), 8 * torch.finfo(turned.dtype).eps * max(1.0, float(held.v.abs().max()))
    assert found <= allowed, f"{backend}: errs by {found:.3g}, allowed {allowed:.3g} ({turned.dtype})"
