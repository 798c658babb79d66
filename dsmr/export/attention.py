"""Attention over a layer's memory and the new tokens, as nodes: ONNX Runtime's operator, or the standard's own.

`InPlace` is ONNX Runtime's `GroupQueryAttention`, which appends the new keys and values to a memory of fixed size
behind those that it holds; `Growing` concatenates, multiplies and masks with operators that every runtime has.

Both see the same: what the memory holds and the call's tokens up to the query's own, with sliding visibility the
`horizon` before it. A call never goes beyond its segment, and at a segment's end the memory is cut to its horizon
(`dsmr.exported.state`), so with segment visibility everything that is there is visible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsmr.export.graph import VENDOR, Graph

Scales = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Of a layer's keys and values in int8: (kv_heads, head_dim) each."""

UNSEEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Heads:
    """A layer's shape. `window` is its horizon where visibility is sliding; `slopes` (heads,) are ALiBi's."""

    heads: int
    kv_heads: int
    head_dim: int
    horizon: int
    capacity: int
    window: int | None
    slopes: npt.NDArray[np.float32] | None


class InPlace:
    """Memories of fixed size, (1, kv_heads, capacity, head_dim), in float32, float16 or int8.

    Args:
        memory: the dtype of keys and values.
        scales: of each layer, for int8.
    """

    def __init__(self, graph: Graph, memory: str, scales: list[Scales] | None) -> None:
        self.graph, self.memory, self.scales = graph, memory, scales
        self.position = graph.input("position", "int64", [1])
        self.offset = graph.input("offset", "int64", [1])
        self._computing = "float16" if memory == "float16" else "float32"
        self._places: dict[int, tuple[str, str, str]] = {}
        self._added: dict[int, str] = {}  # ALiBi's, which all layers of a horizon share

    def _place(self, horizon: int, count: str) -> tuple[str, str, str]:
        """How much a memory of this horizon holds before the call (1,), and with it: int32, as the operator wants."""
        if horizon not in self._places:
            graph = self.graph
            held = graph.node("Min", self.position, graph.node("Add", self.offset, graph.ints(horizon)))
            total = graph.node("Add", held, count)
            last = graph.cast(graph.node("Sub", total, graph.ints(1)), "int32")
            whole = graph.node("Reshape", graph.cast(total, "int32"), graph.constant(np.zeros(0, np.int64)))
            self._places[horizon] = (held, last, whole)
        return self._places[horizon]

    def __call__(self, layer: int, shape: Heads, q: str, k: str, v: str, count: str) -> str:
        """q (1, T, heads * head_dim), k, v (1, T, kv_heads * head_dim), count (1,) = T -> as q."""
        graph = self.graph
        held, last, total = self._place(shape.horizon, count)
        size = [1, shape.kv_heads, shape.capacity, shape.head_dim]
        past = [graph.input(f"{name}.{layer}", self.memory, size) for name in ("k", "v")]
        new = [graph.output(f"{name}.{layer}.new", self.memory, size) for name in ("k", "v")]
        rows = [q, k, v]
        if self._computing != "float32":
            rows = [graph.cast(x, self._computing) for x in rows]
        if shape.slopes is not None and shape.horizon not in self._added:
            whole = alibi(graph, shape.slopes, held, count)
            self._added[shape.horizon] = graph.cast(whole, self._computing)
        added = self._added.get(shape.horizon, "")
        how: dict[str, Any] = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads}
        how["scale"] = shape.head_dim**-0.5
        if shape.window is not None:
            how["local_window_size"] = shape.window + 1  # the token itself is one of them
        scales = ["", ""]
        if self.scales is not None:
            how |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
            scales = [
                graph.constant(x[:, None], f"{name}.{layer}.scale")
                for name, x in zip(("k", "v"), self.scales[layer], strict=True)
            ]
        between = ["", "", "", added, ""]  # angles and positions, which are applied already; sinks
        inputs = (*rows, *past, last, total, *between, *scales)
        out = graph.nodes("GroupQueryAttention", *inputs, outputs=[f"attended.{layer}", *new], domain=VENDOR, **how)
        return out[0] if self._computing == "float32" else graph.cast(out[0], "float32")


class Growing:
    """Memories of as many tokens as are held, (1, kv_heads, n, head_dim), in float32; given back with the new ones."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.position = graph.input("position", "int64", [1])
        self._masks: dict[tuple[int, bytes], str] = {}

    def __call__(self, layer: int, shape: Heads, q: str, k: str, v: str, count: str) -> str:
        """As of `InPlace`."""
        graph, groups = self.graph, shape.heads // shape.kv_heads
        held_name, all_name = f"held_{shape.horizon}", f"all_{shape.horizon}"
        size: list[int | str] = [1, shape.kv_heads, held_name, shape.head_dim]
        together = []
        for name, x in (("k", k), ("v", v)):
            past = graph.input(f"{name}.{layer}", "float32", size)
            rows = graph.node("Reshape", x, graph.ints(1, -1, shape.kv_heads, shape.head_dim))
            new = graph.node("Transpose", rows, perm=[0, 2, 1, 3])
            graph.output(f"{name}.{layer}.new", "float32", [1, shape.kv_heads, all_name, shape.head_dim])
            together.append(graph.node("Concat", past, new, axis=2, name=f"{name}.{layer}.new"))
        held = graph.node("Shape", f"k.{layer}", start=2, end=3)
        rows = graph.node("Reshape", q, graph.ints(-1, shape.kv_heads, groups, shape.head_dim))
        queries = graph.node("Transpose", rows, perm=[1, 2, 0, 3])  # (kv_heads, groups, T, head_dim)
        queries = graph.node("Mul", queries, graph.constant(np.float32(shape.head_dim**-0.5)))
        keys = graph.node("Transpose", together[0], perm=[1, 0, 3, 2])  # (kv_heads, 1, head_dim, n)
        values = graph.node("Transpose", together[1], perm=[1, 0, 2, 3])
        scores = graph.node("Add", graph.node("MatMul", queries, keys), self._mask(shape, held, count))
        mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), values)
        turned = graph.node("Transpose", mixed, perm=[2, 0, 1, 3])
        return graph.node("Reshape", turned, graph.ints(1, -1, shape.heads * shape.head_dim))

    def _mask(self, shape: Heads, held: str, count: str) -> str:
        """What is added to the scores, (T, n), or with ALiBi (kv_heads, groups, T, n)."""
        slopes = b"" if shape.slopes is None else shape.slopes.tobytes() + bytes(shape.kv_heads)
        key = (shape.horizon, slopes)
        if key not in self._masks:
            graph = self.graph
            distance = distances(graph, held, count)
            seen = graph.node("LessOrEqual", distance, graph.ints(0))
            if shape.window is not None:
                near = graph.node("GreaterOrEqual", distance, graph.ints(-shape.window))
                seen = graph.node("And", seen, near)
            added = graph.constant(np.float32(0))
            if shape.slopes is not None:
                whole = alibi(graph, shape.slopes, held, count)
                groups = shape.heads // shape.kv_heads
                sizes = graph.node("Shape", distance)
                split = graph.node("Concat", graph.ints(shape.kv_heads, groups), sizes, axis=0)
                added = graph.node("Reshape", whole, split)
            self._masks[key] = graph.node("Where", seen, added, graph.constant(np.float32(UNSEEN)))
        return self._masks[key]


def distances(graph: Graph, held: str, count: str) -> str:
    """(T, held + T): how far each key lies behind (below 0) or before a query."""
    keys = steps(graph, graph.node("Add", held, count))
    queries = graph.node("Add", steps(graph, count), held)
    return graph.node(
        "Sub", graph.node("Unsqueeze", keys, graph.ints(0)), graph.node("Unsqueeze", queries, graph.ints(1))
    )


def alibi(graph: Graph, slopes: npt.NDArray[np.float32], held: str, count: str) -> str:
    """(1, heads, T, held + T): a slope times the distance."""
    distance = graph.cast(distances(graph, held, count), "float32")
    return graph.node("Mul", graph.constant(slopes.reshape(1, -1, 1, 1)), distance)


def steps(graph: Graph, count: str) -> str:
    """0, 1, ... below `count` (1,)."""
    end = graph.node("Squeeze", count, graph.ints(0))
    return graph.node("Range", graph.constant(np.int64(0)), end, graph.constant(np.int64(1)))
