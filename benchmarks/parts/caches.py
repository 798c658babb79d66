"""What people keep past keys and values in, beside our ring: made full, then given new tokens."""

import importlib.util
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from benchmarks.parts.peers import Missing
from dsmr_kernels import KVMemory


class Cache(ABC):
    """A full cache of `held` tokens that takes in new ones and drops as many of the oldest.

    Args:
        memory: full; what it holds is copied, and it is never changed.
        ordered: `keys` gives the tokens oldest first.
    """

    ordered = True

    def __init__(self, memory: KVMemory) -> None:
        self.k, self.v, _ = memory.ordered()

    @abstractmethod
    def append(self, k: Tensor, v: Tensor) -> None:
        """Take in new tokens, k and v (batch, kv_heads, n, head_dim)."""

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens held, (batch, kv_heads, held, head_dim) each."""
        return self.k, self.v


class Ring(Cache):
    """Ours."""

    ordered = False

    def __init__(self, memory: KVMemory) -> None:
        self.memory = memory.clone()

    def append(self, k: Tensor, v: Tensor) -> None:
        self.memory.append(k, v)

    def held(self) -> tuple[Tensor, Tensor]:
        return self.memory.k, self.memory.v


class Concatenation(Cache):
    """`torch.cat`, and a slice of the newest, which is copied so that the old tensor can be freed."""

    def append(self, k: Tensor, v: Tensor) -> None:
        held = self.k.shape[2]
        self.k, self.v = (torch.cat([old, new], 2)[:, :, -held:] for old, new in ((self.k, k), (self.v, v)))


class Rolled(Cache):
    """`torch.roll`, and the new tokens written at the end."""

    def append(self, k: Tensor, v: Tensor) -> None:
        tokens = k.shape[2]
        self.k, self.v = self.k.roll(-tokens, 2), self.v.roll(-tokens, 2)
        self.k[:, :, -tokens:], self.v[:, :, -tokens:] = k, v


class HuggingFaceSliding(Cache):
    """The layer of transformers' cache for sliding windows; it counts the token to come as one of them."""

    def __init__(self, memory: KVMemory) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise Missing("not installed: pip install 'dsmr[bench]' (transformers)")
        from transformers.cache_utils import DynamicSlidingWindowLayer

        k, v, _ = memory.ordered()
        self.layer: Any = DynamicSlidingWindowLayer(sliding_window=k.shape[2] + 1)
        self.layer.update(k, v)

    def append(self, k: Tensor, v: Tensor) -> None:
        self.layer.update(k, v)

    def held(self) -> tuple[Tensor, Tensor]:
        return self.layer.keys, self.layer.values


CACHES: dict[str, type[Cache]] = {
    "ours": Ring,
    "torch.cat and slice": Concatenation,
    "torch.roll": Rolled,
    "Hugging Face, sliding window layer": HuggingFaceSliding,
}
