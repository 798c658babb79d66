"""The shapes that the benchmarks compare at, our own call, and the check that goes before every timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.parts.peers import Attention
from dsmr_kernels import KVMemory, memory_attention
from dsmr_kernels.cases import Case
from dsmr_kernels.costing.cost import attention_flops, visible_pairs
from dsmr_kernels.testing import run, run_plain
from dsmr_kernels.tolerance import allowed_error, error


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

    def case(self, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> Case:
        """Random inputs, drawn where they are used, behind a memory that has wrapped."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, tokens: int) -> Tensor:
            size = (self.batch, heads, tokens, self.head_dim)
            return torch.randn(size, generator=generator, device=device).to(dtype)

        memory = KVMemory.empty(self.batch, self.kv_heads, self.memory, self.head_dim, dtype=dtype, device=device)
        memory.append(normal(self.kv_heads, self.memory + 7), normal(self.kv_heads, self.memory + 7))
        q, grad = normal(self.heads, self.queries), normal(self.heads, self.queries)
        k, v = normal(self.kv_heads, self.queries), normal(self.kv_heads, self.queries)
        return Case(q, k, v, memory, grad, {"horizon": self.memory})


def ours(case: Case, backend: str | None = None) -> Tensor:
    """`memory_attention`, which reads the ring and the segment where they lie."""
    out = memory_attention(case.q, case.k, case.v, case.memory, **case.options, backend=backend)
    assert isinstance(out, Tensor)
    return out


def forward(attention: Attention, case: Case) -> Callable[[], Tensor]:
    """A forward pass without gradients, to be timed."""

    @torch.no_grad()
    def call() -> Tensor:
        return attention(case)

    return call


def recorded(case: Case) -> Case:
    """The case with q, k and v as leaves that take gradients."""
    q, k, v = (x.detach().requires_grad_() for x in (case.q, case.k, case.v))
    return Case(q, k, v, case.memory, case.grad, case.options)


def forward_backward(attention: Attention, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and a backward pass into q, k and v, to be timed."""
    leaves = recorded(case)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(leaves), (leaves.q, leaves.k, leaves.v), case.grad)

    return call


def backward(attention: Attention, case: Case) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass of a forward pass that has been, to be timed."""
    leaves = recorded(case)
    out = attention(leaves)

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (leaves.q, leaves.k, leaves.v), case.grad, retain_graph=True)

    return call


def corners(case: Case) -> dict[str, tuple[slice, slice, slice]]:
    """Two places to look at: the first row and KV head and the last; as slices of rows, query heads and KV heads."""
    group, last = case.q.shape[1] // case.k.shape[1], (case.q.shape[0] - 1, case.k.shape[1] - 1)
    return {
        name: (slice(row, row + 1), slice(head * group, (head + 1) * group), slice(head, head + 1))
        for name, (row, head) in (("first", (0, 0)), ("last", last))
    }


class Oracle:
    """What the results of a case must be: by the float64 reference, at two corners of the call, since rows and heads do
    not depend on each other; and how far they may lie from it, by the rule of `dsmr_kernels.tolerance`.

    Args:
        tokens: look at the first ones only; right if later ones change nothing for these, not even gradients.
    """

    def __init__(self, case: Case, tokens: int | None = None) -> None:
        self.tokens, self.dtype = tokens, case.q.dtype
        self.known = []
        for corner, (rows, heads, kv) in corners(case).items():
            memory = case.memory
            if memory is not None:
                memory = KVMemory(memory.k[rows, kv], memory.v[rows, kv], memory.length[rows], memory.position[rows])
            q, grad = (x[rows, heads, :tokens] for x in (case.q, case.grad))
            k, v = (x[rows, kv, :tokens] for x in (case.k, case.v))
            part = Case(q, k, v, memory, grad, case.options)
            places = {"out": (rows, heads), "dq": (rows, heads), "dk": (rows, kv), "dv": (rows, kv)}
            self.known.append((corner, places, run(part.to(torch.float64), "reference"), run_plain(part)))

    def hold(self, name: str, found: dict[str, Tensor]) -> dict[str, float]:
        """Fail unless the results "out", "dq", "dk" and "dv", those that are given, keep the tolerance.

        Returns:
            The largest error of each result as a share of what is allowed.
        """
        shares: dict[str, float] = {}
        for corner, places, exact, plain in self.known:
            for result, value in found.items():
                value = value[places[result]][:, :, : self.tokens]
                err = error(value, exact[result])
                allowed = allowed_error(result, plain[result], exact[result], self.dtype)
                said = f"{name}: {result} errs by {err:.3g}, allowed {allowed:.3g} ({corner} row and head)"
                assert err <= allowed, said
                shares[result] = max(shares.get(result, 0.0), err / allowed)
        return shares


def check(case: Case, name: str, attention: Attention, tokens: int | None = None) -> dict[str, float]:
    """Fail unless output and gradients of the very call that is to be timed keep the project's tolerance; see `Oracle`
    for `tokens` and what is returned."""
    found = dict(zip(("dq", "dk", "dv"), forward_backward(attention, case)(), strict=True))
    found["out"] = forward(attention, case)()
    return Oracle(case, tokens).hold(name, found)


def matmul_rate(dtype: torch.dtype, size: int = 2048, device: torch.device | str = "cpu") -> Callable[[], Tensor]:
    """The machine's own matrix product, 2 * size ** 3 operations, to be timed."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b
