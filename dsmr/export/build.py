"""The model as one ONNX graph: it reads the next tokens of one stream, one or a chunk of a prompt, and gives the logits
of the next. Reads like `dsmr.model.transformer`.

    tokens      (1, T) int64, of one segment
    position    (1,) int64, tokens of the piece before them
    offset      (1,) int64, tokens since the segment began; not in a portable graph, whose memories say it
    recent      (1, recall) int64, the tokens before them, where the model labels its keys
    k.N, v.N    layer N's memory, which comes back as k.N.new, v.N.new with the tokens in it
    logits      (1, vocab_size) float32
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from dsmr.export.attention import Growing, Heads, InPlace, Scales, steps
from dsmr.export.graph import LAST, VENDOR, Graph
from dsmr.export.weights import product
from dsmr.model.attention import DSMRAttention
from dsmr.model.transformer import Block, DSMRModel, Recall

EPSILON = 1e-5  # of `torch.nn.LayerNorm`


@dataclass(frozen=True)
class Precision:
    """How an export computes: `weights` "float32" or "int8", `memory` "float32", "float16" or "int8", `portable`
    with the standard's own operators alone."""

    weights: str = "float32"
    memory: str = "float32"
    portable: bool = False


def build(model: DSMRModel, precision: Precision, scales: list[Scales] | None, about: str) -> ModelProto:
    """The graph of `model`; `scales` are those of an int8 memory."""
    return _Builder(model, precision, scales).build(about)


def numbers(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    """A weight as float32."""
    return tensor.detach().float().cpu().numpy()


class _Builder:
    def __init__(self, model: DSMRModel, precision: Precision, scales: list[Scales] | None) -> None:
        self.model, self.config, self.precision = model, model.config, precision
        self.graph = graph = Graph()
        self.tokens = graph.input("tokens", "int64", [1, "T"])
        self.attention = Growing(graph) if precision.portable else InPlace(graph, precision.memory, scales)
        self.row = graph.node("Squeeze", self.tokens, graph.ints(0))  # (T,)
        self.count = graph.node("Shape", self.row)  # (1,)
        places = steps(graph, self.count)
        self.positions = graph.node("Add", self.attention.position, places)  # (T,)
        self.places = graph.node("Unsqueeze", places, graph.ints(0))  # (1, T), in the call
        self.embedding = graph.constant(numbers(model.embedding.weight), "embedding")

    def build(self, about: str) -> ModelProto:
        graph = self.graph
        x = graph.node("Gather", self.embedding, self.tokens)  # (1, T, d_model)
        labels = None if self.model.recall is None else self._labels(self.model.recall)
        cos, sin = self._angles() if self.config.position == "rope" else ("", "")
        place = self._sinusoids() if self.config.position == "sinusoidal" else ""
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            x = self._block(layer, block, x, cos, sin, place, labels)
        last = graph.node("Squeeze", graph.slice(x, -1, LAST, axis=1), graph.ints(1))
        normed = self._normed(last, self.model.norm.weight, "norm")
        if self.config.tie_embeddings:
            graph.node("Gemm", normed, self.embedding, transB=1, name="logits")
        else:
            graph.node("MatMul", normed, graph.constant(numbers(self.model.head.weight).T, "head"), name="logits")
        graph.output("logits", "float32", [1, self.config.vocab_size])
        return graph.model(about)

    def _block(
        self, layer: int, block: Block, x: str, cos: str, sin: str, place: str, labels: tuple[str, str] | None
    ) -> str:
        graph, attention = self.graph, block.attention
        normed = self._normed(x, block.attention_norm.weight, f"blocks.{layer}.attention_norm")
        q, k, v = self._project(layer, attention, normed, place, labels)
        if cos:
            q = self._turned(q, attention.n_heads, cos, sin)
            k = self._turned(k, attention.n_kv_heads, cos, sin)
        shape = Heads(
            attention.n_heads,
            attention.n_kv_heads,
            attention.head_dim,
            attention.horizon,
            attention.horizon + self.config.segment_length,
            attention.horizon if attention.visibility == "sliding" else None,
            None if attention.slopes is None else numbers(attention.slopes),
        )
        attended = self.attention(layer, shape, q, k, v, self.count)
        x = graph.node("Add", x, self._product(attended, attention.out.weight, f"blocks.{layer}.out"))
        normed = self._normed(x, block.ffn_norm.weight, f"blocks.{layer}.ffn_norm")
        inner = self._product(normed, block.ffn.up.weight, f"blocks.{layer}.up")
        if block.ffn.gated:
            gate, inner = graph.nodes("Split", inner, outputs=2, axis=-1, num_outputs=2)
            inner = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), inner)
        else:
            inner = graph.node("Gelu", inner)
        return graph.node("Add", x, self._product(inner, block.ffn.down.weight, f"blocks.{layer}.down"))

    def _product(self, x: str, weight: torch.Tensor, name: str) -> str:
        return product(self.graph, x, numbers(weight), name, self.precision.weights, self.precision.portable)

    def _normed(self, x: str, weight: torch.Tensor, name: str) -> str:
        scale = self.graph.constant(numbers(weight), name)
        return self.graph.node("LayerNormalization", x, scale, axis=-1, epsilon=EPSILON)

    def _project(
        self, layer: int, attention: DSMRAttention, x: str, place: str, labels: tuple[str, str] | None
    ) -> tuple[str, str, str]:
        """Queries, keys and values, (1, T, heads * head_dim) each."""
        graph, weight = self.graph, attention.qkv.weight
        sizes = [n * attention.head_dim for n in (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)]
        if not place and labels is None:
            together = self._product(x, weight, f"blocks.{layer}.qkv")
            q, k, v = graph.nodes("Split", together, graph.ints(*sizes), outputs=3, axis=-1)
            return q, k, v
        moved = graph.node("Add", x, place) if place else x
        sources = [moved, moved, x]
        if labels is not None:
            sources = [graph.node("Add", moved, label) for label in labels] + [x]
        q, k, v = (
            self._product(source, part, f"blocks.{layer}.{name}")
            for source, part, name in zip(sources, weight.split(sizes), ("q", "k", "v"), strict=True)
        )
        return q, k, v

    def _waves(self, dim: int, base: float) -> tuple[str, str]:
        """cos and sin (T, dim / 2) of the tokens' angles, taken in float64 as the model takes them: a stream plays on
        for ever."""
        graph = self.graph
        rates = base ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
        wide = graph.node("Unsqueeze", graph.cast(self.positions, "float64"), graph.ints(1))
        angles = graph.node("Mul", wide, graph.constant(rates.numpy()))
        return graph.cast(graph.node("Cos", angles), "float32"), graph.cast(graph.node("Sin", angles), "float32")

    def _angles(self) -> tuple[str, str]:
        cos, sin = self._waves(self.config.head_dim, self.config.rope_base)
        if self.precision.portable:  # beside (T, heads, head_dim / 2)
            return self.graph.node("Unsqueeze", cos, self.graph.ints(1)), self.graph.node(
                "Unsqueeze", sin, self.graph.ints(1)
            )
        return cos, sin

    def _sinusoids(self) -> str:
        cos, sin = self._waves(self.config.d_model, 10000.0)
        return self.graph.node("Concat", sin, cos, axis=-1)

    def _turned(self, x: str, heads: int, cos: str, sin: str) -> str:
        """x (1, T, heads * head_dim), the halves of each head turned."""
        graph, dim = self.graph, self.config.head_dim
        if not self.precision.portable:
            return graph.node("RotaryEmbedding", x, self.places, cos, sin, domain=VENDOR, num_heads=heads)
        split = graph.node("Reshape", x, graph.ints(-1, heads, dim))
        first, second = graph.nodes("Split", split, outputs=2, axis=-1, num_outputs=2)

        def times(one: str, other: str) -> str:
            return graph.node("Mul", one, other)

        low = graph.node("Sub", times(first, cos), times(second, sin))
        high = graph.node("Add", times(first, sin), times(second, cos))
        return graph.node("Reshape", graph.node("Concat", low, high, axis=-1), graph.ints(1, -1, heads * dim))

    def _labels(self, recall: Recall) -> tuple[str, str]:
        """Labels of queries and of keys, (T, d_model) each; see `Recall`."""
        graph = self.graph
        recent = graph.input("recent", "int64", [1, recall.tokens])
        row = graph.node("Squeeze", recent, graph.ints(0))
        embedded = graph.node("Gather", self.embedding, graph.node("Concat", row, self.row, axis=0))
        before = graph.node("Sub", self.attention.position, graph.ints(1))
        moments = graph.node("Concat", before, self.positions, axis=0)  # (1 + T,)
        heard = []
        for back in range(recall.tokens):
            tokens = graph.slice(embedded, recall.tokens - 1 - back, -back if back else LAST)
            heard.append(self._where(graph.node("GreaterOrEqual", moments, graph.ints(back)), tokens))
        together = graph.node("Concat", *heard, axis=-1)
        labels = graph.node("MatMul", together, graph.constant(numbers(recall.project.weight).T, "recall"))
        labels = self._normed(labels, recall.norm.weight, "recall_norm")
        begun = graph.node("Greater", self.positions, graph.ints(0))
        return graph.slice(labels, 1, LAST), self._where(begun, graph.slice(labels, 0, -1))

    def _where(self, kept: str, rows: str) -> str:
        """rows (n, d_model), those that are not `kept` (n,) as zeros."""
        factor = self.graph.node("Unsqueeze", self.graph.cast(kept, "float32"), self.graph.ints(1))
        return self.graph.node("Mul", rows, factor)
