"""Decoders in ONNX Runtime: ours as it is exported, and a Llama with ONNX Runtime's own attention and a growing cache.

The Llama is written as ONNX Runtime's tools for language models write one: `GroupQueryAttention` turns queries and keys
and appends to a cache that is bound in place and has room for all that will be heard, norms are fused with the residual
stream, and weights are float32 or eight bits in blocks of 128. Its weights are those of `HuggingFaceLlama`, whose pass
over the whole sequence it is checked against.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor

from benchmarks.parts.decoders import HEADS, LAYERS, VOCABULARY, WIDTH, HuggingFaceLlama, Ours
from dsmr.export.attention import Scales
from dsmr.export.build import Precision, build, numbers
from dsmr.export.calibrate import scale_of
from dsmr.export.graph import LAST, VENDOR, Graph
from dsmr.export.weights import product
from dsmr.exported.about import About
from dsmr.exported.model import open_session
from dsmr.exported.reading import BoundReader, read_all
from dsmr.exported.state import Stream

HEAD_DIM = WIDTH // HEADS
ROOM = 4096  # tokens heard behind the context, at most
EPSILON = 1e-6  # of transformers' Llama


def session_of(graph: ModelProto, about: About | None = None) -> Any:
    """A session with as many threads as PyTorch has."""
    import onnxruntime

    threads = torch.get_num_threads()
    if about is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(graph.SerializeToString())
            return open_session(path, about, threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


class OursExported:
    """`dsmr export` of the model of the comparison; an int8 memory has scales of the context's keys and values."""

    def __init__(self, context: Tensor, weights: str, memory: str) -> None:
        self._ours = ours = Ours(context, "plain")
        self.parameters, config = ours.parameters, ours.model.config
        scales: list[Scales] | None = None
        if memory == "int8":
            rings = [(one.k[0].abs().amax(1), one.v[0].abs().amax(1)) for one in ours.state.memories]
            scales = [(scale_of(k), scale_of(v)) for k, v in rings]
        about = About(
            vocab_size=config.vocab_size,
            head_dim=config.head_dim,
            segment_length=config.segment_length,
            visibility=config.visibility,
            recall=config.recall,
            horizons=config.schedule.horizons,
            kv_heads=config.schedule.heads(config.n_heads),
            weights=weights,
            memory=memory,
            portable=False,
            fingerprint="",
            tokenizer_hash="",
            made_with={},
        )
        graph = build(ours.model, Precision(weights, memory), scales, "of a benchmark")
        stream = Stream(about)
        self._read = BoundReader(session_of(graph, about), stream)
        read_all(self._read, stream, context.numpy())

    def step(self, token: int) -> Tensor:
        return torch.from_numpy(self._read(np.array([token], np.int64)))

    def whole(self, tokens: Tensor) -> Tensor:
        return self._ours.whole(tokens)


class OnnxLlama:
    """See the module's docstring."""

    def __init__(self, context: Tensor, weights: str) -> None:
        self._peer = HuggingFaceLlama(context[:1])
        self.parameters = self._peer.parameters
        room = len(context) + ROOM
        self._session = session_of(llama(self._peer.model, weights, room))
        self._io, self._heard = self._session.io_binding(), 0
        self._last, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._logits = np.zeros((1, VOCABULARY), np.float32)
        self._cache = [np.zeros((1, HEADS, room, HEAD_DIM), np.float32) for _ in range(2 * LAYERS)]
        self._bind(self._io.bind_input, "last", self._last)
        self._bind(self._io.bind_input, "total", self._total)
        self._bind(self._io.bind_output, "logits", self._logits)
        for number, array in enumerate(self._cache):
            self._bind(self._io.bind_input, f"cache.{number}", array)
            self._bind(self._io.bind_output, f"cache.{number}.new", array)
        self._show(context.numpy()[None])

    @staticmethod
    def _bind(where: Any, name: str, array: npt.NDArray[Any]) -> None:
        where(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _show(self, tokens: npt.NDArray[np.int64]) -> Tensor:
        self._heard += tokens.shape[1]
        self._last[0], self._total[...] = self._heard - 1, self._heard
        self._bind(self._io.bind_input, "tokens", tokens)
        self._session.run_with_iobinding(self._io)
        return torch.from_numpy(self._logits[0])

    def step(self, token: int) -> Tensor:
        return self._show(np.array([[token]], np.int64))

    def whole(self, tokens: Tensor) -> Tensor:
        return self._peer.whole(tokens)


def llama(model: Any, weights: str, room: int) -> ModelProto:
    """A Llama of transformers as a graph for one stream, whose cache has `room` for so many tokens."""
    graph = Graph()
    tokens, last, total = graph.input("tokens", "int64", [1, "T"]), *_counts(graph)
    angles = np.arange(room)[:, None] * 10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    cos, sin = (graph.constant(wave(angles).astype(np.float32), wave.__name__) for wave in (np.cos, np.sin))
    embedding = graph.constant(numbers(model.model.embed_tokens.weight), "embedding")
    x, added = graph.node("Gather", embedding, tokens), ""
    size = [1, HEADS, room, HEAD_DIM]
    for layer, block in enumerate(model.model.layers):

        def times(source: str, *matrices: Any, layer: int = layer) -> str:
            together = np.concatenate([numbers(matrix.weight) for matrix in matrices])
            return product(graph, source, together, f"{layer}.{len(matrices)}.{source}", weights, portable=False)

        x, normed = _normed(graph, x, added, block.input_layernorm.weight)
        attention = block.self_attn
        qkv = times(normed, attention.q_proj, attention.k_proj, attention.v_proj)
        names = [f"cache.{2 * layer + part}" for part in range(2)]
        cache = [graph.input(name, "float32", size) for name in names]
        new = [graph.output(f"{name}.new", "float32", size) for name in names]
        how = {"num_heads": HEADS, "kv_num_heads": HEADS, "do_rotary": 1, "scale": HEAD_DIM**-0.5}
        given = (qkv, "", "", *cache, last, total, cos, sin)
        out, *_ = graph.nodes("GroupQueryAttention", *given, outputs=[f"out.{layer}", *new], domain=VENDOR, **how)
        x, normed = _normed(graph, x, times(out, attention.o_proj), block.post_attention_layernorm.weight)
        gate, up = graph.nodes(
            "Split", times(normed, block.mlp.gate_proj, block.mlp.up_proj), outputs=2, axis=-1, num_outputs=2
        )
        inner = graph.node("Mul", graph.node("Mul", gate, graph.node("Sigmoid", gate)), up)
        added = times(inner, block.mlp.down_proj)
    _, normed = _normed(graph, x, added, model.model.norm.weight)
    row = graph.node("Squeeze", graph.slice(normed, -1, LAST, axis=1), graph.ints(1))
    graph.node("Gemm", row, embedding, transB=1, name="logits")
    graph.output("logits", "float32", [1, VOCABULARY])
    return graph.model("the Llama of a benchmark")


def _counts(graph: Graph) -> tuple[str, str]:
    return graph.input("last", "int32", [1]), graph.input("total", "int32", [])


def _normed(graph: Graph, x: str, added: str, weight: Tensor) -> tuple[str, str]:
    """x plus what a sub-layer added, and its root-mean-square norm, in one operator where there is something added."""
    scale = graph.constant(numbers(weight), f"norm.{x}.{added}")
    if not added:
        return x, graph.node("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=EPSILON, stash_type=1)
    outputs = [f"normed.{added}", "", "", f"sum.{added}"]
    graph.nodes("SkipSimplifiedLayerNormalization", x, added, scale, outputs=outputs, domain=VENDOR, epsilon=EPSILON)
    return outputs[3], outputs[0]
