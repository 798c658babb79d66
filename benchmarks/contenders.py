"""The calls that the benchmarks compare: ours, and what a user would write instead. Shared with the tests."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmr_kernels import KVMemory, memory_attention
from dsmr_kernels.cost import attention_flops, visible_pairs
from dsmr_kernels.testing import Case, allowed_error, error, run, run_plain

Attention = Callable[[Case], Tensor]


@dataclass(frozen=True)
class Shape:
    """One segment of `queries` tokens behind a full memory of `memory` tokens."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    memory: int
    head_dim: int

    def __str__(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"batch {self.batch}, {heads} heads x {self.head_dim}, {self.queries} queries, {self.memory} memory"

    @property
    def forward_flops(self) -> float:
        """Of the pairs that are visible, both products."""
        pairs = self.queries * self.memory + visible_pairs(self.queries, horizon=0, segment_length=None)
        return attention_flops(self.batch * pairs, heads=self.heads, head_dim=self.head_dim)

    def case(self, dtype: torch.dtype, seed: int = 0) -> Case:
        """Random inputs behind a memory that has wrapped."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, tokens: int) -> Tensor:
            return torch.randn(self.batch, heads, tokens, self.head_dim, generator=generator).to(dtype)

        memory = KVMemory.empty(self.batch, self.kv_heads, self.memory, self.head_dim, dtype=dtype)
        memory.append(normal(self.kv_heads, self.memory + 7), normal(self.kv_heads, self.memory + 7))
        q, grad = normal(self.heads, self.queries), normal(self.heads, self.queries)
        k, v = normal(self.kv_heads, self.queries), normal(self.kv_heads, self.queries)
        return Case(q, k, v, memory, grad, {"horizon": self.memory})


def ours(case: Case) -> Tensor:
    """`memory_attention`, which reads the ring and the segment where they lie."""
    out = memory_attention(case.q, case.k, case.v, case.memory, **case.options)
    assert isinstance(out, Tensor)
    return out


class ConcatenatedSDPA:
    """`scaled_dot_product_attention` over memory and segment concatenated, with a boolean mask: the usual way.

    The memory comes in order, and the mask is built once: both are given away free of charge.
    """

    def __init__(self, case: Case) -> None:
        assert case.memory is not None
        self.past_k, self.past_v, _ = case.memory.ordered()
        queries, past = case.q.shape[2], self.past_k.shape[2]
        self.mask = torch.ones(queries, past + queries, dtype=torch.bool).tril(past)
        self.grouped = case.q.shape[1] != case.k.shape[1]

    def __call__(self, case: Case) -> Tensor:
        k, v = torch.cat([self.past_k, case.k], 2), torch.cat([self.past_v, case.v], 2)
        return F.scaled_dot_product_attention(case.q, k, v, attn_mask=self.mask, enable_gqa=self.grouped)


def forward(attention: Attention, case: Case) -> Callable[[], Tensor]:
    """A forward pass without gradients, to be timed."""

    @torch.no_grad()
    def call() -> Tensor:
        return attention(case)

    return call


def forward_backward(attention: Attention, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward pass into q, k and v, to be timed."""
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    recorded = Case(leaves[0], leaves[1], leaves[2], case.memory, case.grad, case.options)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(recorded), leaves, case.grad)

    return call


def check(shape: Shape, dtype: torch.dtype, contenders: dict[str, Attention]) -> None:
    """Fail unless every contender's output and gradients keep the project's tolerance, at this very shape."""
    case = shape.case(dtype)
    exact, plain = run(case.to(torch.float64), "reference"), run_plain(case)
    for name, attention in contenders.items():
        found = dict(zip(("dq", "dk", "dv"), forward_backward(attention, case)(), strict=True))
        found["out"] = forward(attention, case)()
        for result, value in found.items():
            err, allowed = error(value, exact[result]), allowed_error(result, plain[result], exact[result], dtype)
            assert err <= allowed, f"{name}, {shape}, {dtype}: {result} errs by {err:.3g}, allowed {allowed:.3g}"


def matmul_rate(dtype: torch.dtype, size: int = 2048) -> Callable[[], Tensor]:
    """The machine's own matrix product, 2 * size ** 3 operations, to be timed."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return lambda: a @ b
