"""What a user would write instead: attention over memory and segment concatenated, by PyTorch and FlashAttention.

Every peer is made from a case and called with it. It takes the memory oldest first (the ring is put in order for it,
free of charge, when it is made), concatenates for itself in every call, and shows the mask of segment visibility with a
full memory in the form that its kernel likes best. Masks are made once, when the peer is made. A peer that cannot run
here raises `Missing` with what is needed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmr_kernels.cases import Case

Attention = Callable[[Case], Tensor]


class Missing(Exception):
    """Why a peer cannot run on this machine, and what would let it."""


class Concatenating:
    """What the peers share: the memory in order, and the concatenation of each call."""

    def __init__(self, case: Case) -> None:
        assert case.memory is not None
        self.past_k, self.past_v, held = case.memory.ordered()
        assert bool(held.all()), "the peers know no partly filled memory"
        self.queries, self.past = case.q.shape[2], self.past_k.shape[2]
        self.grouped = case.q.shape[1] != case.k.shape[1]

    def keys(self, case: Case) -> tuple[Tensor, Tensor]:
        """k and v (B, Hkv, M + T, D)."""
        return torch.cat([self.past_k, case.k], 2), torch.cat([self.past_v, case.v], 2)

    def mask(self, case: Case) -> Tensor:
        """(T, M + T), true where a query sees a key: all of the memory, and the segment causally."""
        return torch.ones(self.queries, self.past + self.queries, dtype=torch.bool, device=case.q.device).tril(
            self.past
        )


class WrittenOut(Concatenating):
    """The masked softmax, every score in memory."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.hidden = ~self.mask(case)

    def __call__(self, case: Case) -> Tensor:
        k, v = self.keys(case)
        group = case.q.shape[1] // k.shape[1]
        if self.grouped:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = (case.q @ k.transpose(-1, -2)) * case.q.shape[-1] ** -0.5
        return scores.masked_fill_(self.hidden, -torch.inf).softmax(-1) @ v


class MaskedSDPA(Concatenating):
    """`scaled_dot_product_attention` with a boolean mask: the usual way. PyTorch picks the kernel."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.seen = self.mask(case)

    def __call__(self, case: Case) -> Tensor:
        k, v = self.keys(case)
        return F.scaled_dot_product_attention(case.q, k, v, attn_mask=self.seen, enable_gqa=self.grouped)


class CudnnSDPA(MaskedSDPA):
    """The same, by cuDNN, which knows no causal mask that ends at the bottom right but does take masks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        _needs_gpu(case, "cuDNN attention")

    def __call__(self, case: Case) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().__call__(case)


class CausalSDPA(Concatenating):
    """`scaled_dot_product_attention` without a mask tensor: with the memory full, segment visibility is causal
    attention aligned at the bottom right, which the flash and efficient kernels know."""

    kernel = "FLASH_ATTENTION"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from torch.nn.attention.bias import causal_lower_right

        _needs_gpu(case, "the flash and efficient kernels for a causal mask at the bottom right")
        self.seen = causal_lower_right(self.queries, self.past + self.queries)

    def __call__(self, case: Case) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        k, v = self.keys(case)
        with sdpa_kernel(getattr(SDPBackend, self.kernel)):
            return F.scaled_dot_product_attention(case.q, k, v, attn_mask=self.seen, enable_gqa=self.grouped)


class EfficientSDPA(CausalSDPA):
    """The same by the memory-efficient kernel."""

    kernel = "EFFICIENT_ATTENTION"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if self.grouped:
            raise Missing("the efficient kernel takes as many KV heads as query heads")


class Flex(Concatenating):
    """FlexAttention, compiled, with the equivalent block mask, made once."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        import torch._functorch.config as compiler
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        _needs_gpu(case, "compiled FlexAttention with a backward")
        compiler.donated_buffer = False  # else a backward cannot be repeated, and so not be timed
        past = self.past

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key <= query + past

        self.blocks = create_block_mask(seen, None, None, self.queries, past + self.queries, device=str(case.q.device))
        torch._dynamo.reset()  # else the shapes of a run add up to its limit of recompilations
        self.attention: Any = torch.compile(flex_attention, dynamic=False)

    def __call__(self, case: Case) -> Tensor:
        k, v = self.keys(case)
        return self.attention(case.q, k, v, block_mask=self.blocks, enable_gqa=self.grouped)


class FlashAttention(Concatenating):
    """The flash-attn package, which aligns its causal mask at the bottom right."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        if importlib.util.find_spec("flash_attn") is None:
            raise Missing("not installed: pip install flash-attn --no-build-isolation")
        from flash_attn import flash_attn_func

        _needs_gpu(case, "flash-attn")
        self.attention = flash_attn_func

    def __call__(self, case: Case) -> Tensor:
        k, v = self.keys(case)
        out: Tensor = self.attention(*(x.transpose(1, 2) for x in (case.q, k, v)), causal=True)
        return out.transpose(1, 2)


def _needs_gpu(case: Case, what: str) -> None:
    if case.q.device.type != "cuda":
        raise Missing(f"{what} needs a GPU")


PEERS: dict[str, Callable[[Case], Attention]] = {
    "SDPA flash, causal": CausalSDPA,
    "SDPA efficient, causal": EfficientSDPA,
    "SDPA cuDNN, boolean mask": CudnnSDPA,
    "SDPA, boolean mask": MaskedSDPA,
    "FlexAttention, block mask": Flex,
    "FlashAttention": FlashAttention,
    "written out": WrittenOut,
}
