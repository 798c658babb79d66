"""Where a model's own step spends its time and what it keeps: marks set by hooks while the step runs as always.

A mark is taken when a layer's input arrives, when its attention begins and ends, when its feed-forward layer begins; in
the backward, when the gradients of these tensors are complete. The differences are the parts of
`dsmr.profiling.cost`. What autograd saves is counted once for each storage, under the layer that saved it.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dsmr.model.attention
from dsmr.model.transformer import Block, DSMRModel

Parts = dict[tuple[str, int, str], float]
"""Seconds by direction ("forward" or "backward"), layer (-1: around the layers) and part."""


class _Clock:
    """Marks that cost next to nothing: times on a CPU, events on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds; on CUDA both events must be over."""
        return begin.elapsed_time(end) / 1e3 if self.cuda else end - begin


class Recorder:
    """Records the steps that run inside `recording`; `parts` then splits the last one."""

    def __init__(self, model: DSMRModel, device: torch.device) -> None:
        self.model, self.clock = model, _Clock(device)
        self.marks: dict[tuple[str, int, str], Any] = {}
        self.saved: dict[int, int] = {}
        self._layer = -1
        self._seen: set[int] = set()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks are in place inside, and gone after."""
        handles = []
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            handles.append(block.attention_norm.register_forward_pre_hook(self._on_input(layer, "begin")))
            handles.append(block.ffn_norm.register_forward_pre_hook(self._on_input(layer, "middle")))
        handles.append(self.model.norm.register_forward_pre_hook(self._on_input(len(self.model.blocks), "begin")))
        original = dsmr.model.attention.memory_attention
        dsmr.model.attention.memory_attention = self._around(original)
        try:
            yield
        finally:
            dsmr.model.attention.memory_attention = original
            for handle in handles:
                handle.remove()

    def mark(self, direction: str, layer: int, name: str) -> None:
        """Take the time under a name; the first of several with one name counts."""
        self.marks.setdefault((direction, layer, name), self.clock.mark())

    def start(self) -> None:
        """Forget the last step; a new one begins."""
        self.marks, self._layer = {}, -1
        self.mark("forward", -1, "begin")

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count into `saved` what autograd keeps of a forward inside: bytes by layer, -1 for what is around them. To be
        used while recording, since the hooks tell the layers apart."""
        own = [*self.model.parameters(), *self.model.buffers()]
        self.saved, self._seen, self._layer = defaultdict(int), {x.untyped_storage().data_ptr() for x in own}, -1

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.saved[self._layer if self._layer < len(self.model.blocks) else -1] += storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield

    def _on_input(self, layer: int, name: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            self._layer = layer
            self.mark("forward", layer, name)
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda grad: self.mark("backward", layer, name))

        return hook

    def _around(self, attention: Callable[..., Any]) -> Callable[..., Any]:
        def timed(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
            layer = self._layer
            self.mark("forward", layer, "attention")
            out = attention(q, k, v, *rest, **options)
            self.mark("forward", layer, "attended")
            if out.requires_grad:
                out.register_hook(lambda grad: self.mark("backward", layer, "attended"))
                for x in (q, k, v):  # whichever is reached first
                    x.register_hook(lambda grad: self.mark("backward", layer, "attention"))
            return out

        return timed

    def parts(self) -> Parts:
        """Seconds of each part of the last step, after its end was marked ("forward", -1, "end") and, if it went back,
        ("backward", -1, "end"). Their sum is the step."""
        last, marks, between = len(self.model.blocks), self.marks, self.clock.between
        parts: Parts = {}

        def split(direction: str, layer: int, outside: tuple[Any, Any], middle: tuple[Any, Any]) -> None:
            inner = between(*_attention_marks(marks, direction, layer))
            parts[direction, layer, "attention"] = inner
            parts[direction, layer, "projections"] = between(*outside) - inner
            parts[direction, layer, "ffn"] = between(*middle)

        begins = [marks["forward", layer, "begin"] for layer in range(last + 1)]
        parts["forward", -1, "embedding"] = between(marks["forward", -1, "begin"], begins[0])
        parts["forward", -1, "head"] = between(begins[last], marks["forward", -1, "end"])
        for layer in range(last):
            middle = marks["forward", layer, "middle"]
            split("forward", layer, (begins[layer], middle), (middle, begins[layer + 1]))
        if ("backward", -1, "end") in marks:
            ends = [marks["backward", layer, "begin"] for layer in range(last + 1)]
            parts["backward", -1, "head"] = between(marks["forward", -1, "end"], ends[last])
            parts["backward", -1, "embedding"] = between(ends[0], marks["backward", -1, "end"])
            for layer in range(last):
                middle = marks["backward", layer, "middle"]
                split("backward", layer, (middle, ends[layer]), (ends[layer + 1], middle))
        return parts


def _attention_marks(marks: dict[tuple[str, int, str], Any], direction: str, layer: int) -> tuple[Any, Any]:
    """Begin and end of a layer's attention: a backward meets them in the other order."""
    begin, end = marks[direction, layer, "attention"], marks[direction, layer, "attended"]
    return (begin, end) if direction == "forward" else (end, begin)
