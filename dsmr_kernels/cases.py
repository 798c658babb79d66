"""The inputs of one attention call, at random: for tests, benchmarks, tuning and the trial of a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.memory import KVMemory
from dsmr_kernels.spec import AttentionSpec, Inputs, with_sinks


@dataclass
class Case:
    """The inputs of one `memory_attention` call and the gradients that come from above, of out and perhaps of lse;
    `learning` names those of q, k, v, b, the bias by distance, and s, the sinks, whose gradients are asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory: KVMemory | None
    grad: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    grad_lse: Tensor | None = None
    learning: str = "qkv"

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Case":
        """The same case in another dtype or on another device."""
        memory = None if self.memory is None else self.memory.to(device=device, dtype=dtype)
        q, k, v, grad = (x.to(device=device, dtype=dtype) for x in (self.q, self.k, self.v, self.grad))
        options = {name: x.to(device=device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        for name in ("distance_bias", "sinks"):
            if dtype is not None and name in options:
                options[name] = options[name].to(torch.promote_types(dtype, torch.float32))
        grad_lse = None if self.grad_lse is None else self.grad_lse.to(device=device)
        return replace(self, q=q, k=k, v=v, memory=memory, grad=grad, options=options, grad_lse=grad_lse)

    def differentiated(self, call: Callable[..., Any]) -> dict[str, Tensor]:
        """out and lse of `call(q, k, v)`, and the gradients that are asked for: dq, dk, dv, db, ds. Of a bias by
        distance and of sinks `call` is given those that there are, too, as `distance_bias` and `sinks`."""
        inputs = {name: getattr(self, name).detach() for name in "qkv"}
        named = {"b": "distance_bias", "s": "sinks"}
        inputs |= {name: self.options[name].detach() for name in named.values() if name in self.options}
        leaves = [inputs[named.get(name, name)].requires_grad_() for name in self.learning]
        out, lse = call(**inputs)
        results, grads = [out], [self.grad]
        if self.grad_lse is not None:
            results, grads = [out, lse], [self.grad, self.grad_lse]
        found = torch.autograd.grad(results, leaves, grads)
        grads_by_name = {f"d{name}": x for name, x in zip(self.learning, found, strict=True)}
        return {"out": out.detach(), "lse": lse.detach().float(), **grads_by_name}

    def computed_by(self, memory_attention: Callable[..., Any], **how: Any) -> dict[str, Tensor]:
        """The same of a backend's own `memory_attention`, unchecked; `how` is what that one takes beyond the others."""
        options: dict[str, Any] = {"segment_length": None, "segment_offset": 0, "visibility": "segment"}
        options |= {"detach_segments": True} | self.options
        names = ("piece_start", "alibi_slopes", "distance_bias", "distance_buckets", "sinks")
        piece_start, alibi, _, buckets, _ = (options.pop(name, None) for name in names)
        offsets = options["segment_offset"] if isinstance(options["segment_offset"], Tensor) else None
        if offsets is not None:
            options["segment_offset"] = 0
        if options.get("scale") is None:
            options["scale"] = self.q.shape[-1] ** -0.5
        spec = AttentionSpec(**options, return_lse=True)

        def call(
            q: Tensor, k: Tensor, v: Tensor, distance_bias: Tensor | None = None, sinks: Tensor | None = None
        ) -> Any:
            inputs = Inputs(q, k, v, self.memory, piece_start, alibi, offsets, distance_bias, buckets, spec)
            out, lse = memory_attention(inputs, **how)
            return (out, lse) if sinks is None else with_sinks(out, lse, sinks)

        return self.differentiated(call)


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
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> KVMemory:
    """A memory whose row b has seen `seen[b]` tokens of its piece: empty, part full, full or wrapped."""
    dims = head_dim, v_head_dim or head_dim
    memory = KVMemory.empty(batch, kv_heads, capacity, head_dim, v_head_dim=dims[1], dtype=dtype, device="cpu")
    most = max(seen, default=0)
    if most:
        start = torch.tensor([[most - count] * most for count in seen], dtype=torch.int32, device="cpu")
        # Before its piece, a token of another one.
        start = torch.minimum(start, torch.arange(most, dtype=torch.int32, device="cpu"))
        k, v = (_normal((batch, kv_heads, most, dim), dtype, generator) for dim in dims)
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
    v_head_dim: int | None = None,
    capacity: int = 40,
    seen: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    stored: torch.dtype | None = None,
    seed: int = 0,
    lse_gradient: bool = False,
    learning: str | None = None,
    biased: bool = False,
    **options: Any,
) -> Case:
    """A case with normal inputs; `seen` as in `filled_memory`, None for no memory at all; `stored`: the memory's dtype,
    if not the others'; `lse_gradient`: whether a gradient comes from lse, too; `biased`: whether there is a learned
    bias by distance, with fewer columns than distances."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = queries if tokens is None else tokens

    def normal(h: int, t: int, dim: int = head_dim) -> Tensor:
        return _normal((batch, h, t, dim), dtype, generator)

    memory = None
    if seen is not None:
        memory = filled_memory(
            batch, kv_heads, capacity, head_dim, seen, v_head_dim=v_head_dim, dtype=dtype, generator=generator
        ).to(dtype=stored)
    values = v_head_dim or head_dim
    q, k = normal(heads, queries), normal(kv_heads, tokens)
    v, grad = normal(kv_heads, tokens, values), normal(heads, queries, values)
    grad_lse = _normal((batch, heads, queries), torch.float32, generator) if lse_gradient else None
    if biased:
        options["distance_bias"] = _normal((heads, 6), torch.promote_types(dtype, torch.float32), generator)
        options["distance_buckets"] = torch.arange(1, 34, device="cpu").log2().long()  # 0, 1, 1, 2 ... 5
    return Case(q, k, v, memory, grad, options, grad_lse, learning or ("qkvb" if biased else "qkv"))
