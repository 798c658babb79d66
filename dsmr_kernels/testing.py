"""What tests and benchmarks share: random cases, and the one rule for how far a result may lie from the oracle.

The oracle is the reference backend in float64 on upcast inputs. A result in a lower precision may err by at most twice
(outputs) or three times (gradients) what plain PyTorch attention in that precision errs, plus a rounding floor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.api import memory_attention
from dsmr_kernels.backends import reference
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.memory import KVMemory

OUTPUT_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


@dataclass
class Case:
    """The inputs of one `memory_attention` call and the gradient that comes from above."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: KVMemory | None
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Case":
        """The same case in another dtype or on another device."""
        memory = None if self.memory is None else self.memory.to(device=device, dtype=dtype)
        q, k, v, grad = (x.to(device=device, dtype=dtype) for x in (self.q, self.k, self.v, self.grad))
        options = {name: x.to(device=device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return Case(q, k, v, memory, grad, options)


def _normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Whatever PyTorch's default dtype and device are."""
    return torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator).to(dtype)


def filled_memory(
    batch: int,
    kv_heads: int,
    capacity: int,
    head_dim: int,
    seen: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> KVMemory:
    """A memory whose row b has seen `seen[b]` tokens of its piece: empty, part full, full or wrapped."""
    memory = KVMemory.empty(batch, kv_heads, capacity, head_dim, dtype=dtype, device="cpu")
    most = max(seen, default=0)
    if most:
        start = torch.tensor([[most - count] * most for count in seen], dtype=torch.int32, device="cpu")
        # Before its piece, a token of another one.
        start = torch.minimum(start, torch.arange(most, dtype=torch.int32, device="cpu"))
        k, v = (_normal((batch, kv_heads, most, head_dim), dtype, generator) for _ in range(2))
        memory.append(k, v, start)
        for row, count in enumerate(seen):
            if count == 0:
                memory.reset(torch.arange(batch, device="cpu") == row)
    return memory


def random_case(
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 33,
    tokens: int | None = None,
    head_dim: int = 16,
    capacity: int = 40,
    seen: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A case with normal inputs; `seen` as in `filled_memory`, None for no memory at all."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = queries if tokens is None else tokens

    def normal(h: int, t: int) -> Tensor:
        return _normal((batch, h, t, head_dim), dtype, generator)

    memory = None
    if seen is not None:
        memory = filled_memory(batch, kv_heads, capacity, head_dim, seen, dtype=dtype, generator=generator)
    q, k, v, grad = normal(heads, queries), normal(kv_heads, tokens), normal(kv_heads, tokens), normal(heads, queries)
    return Case(q, k, v, memory, grad, options)


def _differentiated(case: Case, call: Callable[[Tensor, Tensor, Tensor], Any]) -> dict[str, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = call(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), case.grad)
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """out, lse and the gradients of q, k and v."""
    return _differentiated(
        case,
        lambda q, k, v: memory_attention(q, k, v, case.memory, **case.options, return_lse=True, backend=backend),
    )


def run_plain(case: Case) -> dict[str, Tensor]:
    """What plain PyTorch attention gives when all of it is computed in the case's own dtype."""
    options: dict[str, Any] = {
        "segment_length": None,
        "segment_offset": 0,
        "visibility": "segment",
        "detach_segments": True,
    }
    options |= case.options
    piece_start, slopes = options.pop("piece_start", None), options.pop("alibi_slopes", None)
    scale = options.pop("scale", None)
    scale = case.q.shape[-1] ** -0.5 if scale is None else scale
    spec = AttentionSpec(**options, scale=scale, return_lse=True)
    return _differentiated(
        case,
        lambda q, k, v: reference.memory_attention(q, k, v, case.memory, piece_start, slopes, spec, work=case.q.dtype),
    )


def error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; infinite if anything is not a number."""
    if result.numel() == 0:
        return 0.0
    difference = (result.detach().double() - exact.detach().double()).abs()
    return float(difference.max()) if bool(difference.isfinite().all()) else float("inf")


def allowed_error(name: str, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The tolerance rule of this module, for the result called `name`."""
    factor = OUTPUT_FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
    size = float(exact.abs().max()) if exact.numel() else 0.0
    if name == "lse":
        dtype = torch.promote_types(dtype, torch.float32) if dtype != torch.float64 else torch.float32
    # One rounding of the result, and those of sums over head_dim of terms of order one, which may cancel to nothing.
    terms = 16 if name == "lse" else max((16, *exact.shape[-1:]))
    sums = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 4 * terms**0.5
    return factor * error(plain, exact) + torch.finfo(dtype).eps * size + sums * max(size, 1.0)


def assert_agrees_with_oracle(case: Case, backend: str) -> None:
    """Fail, with the figures, if a backend's outputs or gradients lie further from the oracle than the rule allows."""
    exact = run(case.to(torch.float64), "reference")
    plain = run_plain(case)
    result = run(case, backend)
    for name, value in result.items():
        found, allowed = error(value, exact[name]), allowed_error(name, plain[name], exact[name], case.q.dtype)
        if not found <= allowed:
            raise AssertionError(f"{backend}: {name} errs by {found:.3g}, allowed {allowed:.3g} ({case.q.dtype})")
