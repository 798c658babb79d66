"""What a model's step should cost, layer by layer: counts and seconds of `dsmr_kernels.costing`.

A layer has three parts: "attention" (`memory_attention` itself), "projections" (norm, Q, K, V and output projections,
positions, the residual) and "ffn" (norm, both products, activation, residual). Around the layers lie "embedding" (with
the append to the memories), "head" (norm, logits, loss) and "optimizer" (clipping and AdamW). A part's products and
bytes are counted; of operators that only move data, each tensor is counted once for each time that it is read or
written by the code as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.job import Sizes
from dsmr_kernels.costing.cost import Call, Work, decode_work, linear_work, memory_bytes, memory_capacity
from dsmr_kernels.costing.predict import Ceilings, attention_seconds, plain_seconds

LAYER_PARTS = ("attention", "projections", "ffn")
AROUND = ("embedding", "head", "optimizer")
DIRECTIONS = ("forward", "backward")
# Bytes of float32 that AdamW and clipping move for a parameter: gradient read for the norm, read and written to be
# scaled; then weight, gradient and two moments read, all but the gradient written.
OPTIMIZER_BYTES = 4 * (1 + 2 + 4 + 3)
# Operators, views included, that a token alone costs in a layer: two norms, four products, heads split, keys, queries
# rotated, slots written, two stretches of the ring attended to, activation and residuals.
DECODE_OPERATORS = 100


@dataclass(frozen=True)
class LayerSeconds:
    """Predicted seconds of each part of a layer, forward and backward."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]


def parameters_of(sizes: Sizes, schedule: MemorySchedule) -> int:
    """Weights of the model, the embedding shared with the output projection."""
    d, layers = sizes.d_model, schedule.layers
    kv = sum(schedule.heads(sizes.heads))
    matrices = 10 * layers * d * d + 2 * kv * sizes.head_dim * d
    return matrices + (2 * layers + 1) * d + sizes.vocab_size * d


def training_call(sizes: Sizes, horizon: int, kv_heads: int) -> Call:
    """A layer's attention in a training step: one segment behind a full memory."""
    return _call(sizes, horizon, kv_heads, sizes.batch, sizes.segment_length, held=horizon)


def piece_call(sizes: Sizes, horizon: int, kv_heads: int, tokens: int | None = None) -> Call:
    """A layer's attention over a whole piece of `tokens` tokens in one call."""
    return _call(sizes, horizon, kv_heads, 1, sizes.piece_tokens if tokens is None else tokens, held=0)


def _call(sizes: Sizes, horizon: int, kv_heads: int, batch: int, queries: int, held: int) -> Call:
    return Call(
        queries,
        horizon,
        held=held,
        segment_length=sizes.segment_length,
        visibility=sizes.visibility,
        batch=batch,
        heads=sizes.heads,
        kv_heads=kv_heads,
        head_dim=sizes.head_dim,
        bytes_per_element=sizes.element_bytes,
    )


def _moved(elements: float, count: float, size: int = 4, calls: int = 1) -> Work:
    """`count` tensors of `elements` elements read or written by `calls` operators."""
    return Work(bytes_read=elements * count * size, calls=calls)


def _linear(sizes: Sizes, rows: int, inputs: int, outputs: int, backward: bool) -> Work:
    """A linear layer; under autocast also the copies of its weight and input in the lower precision."""
    work = linear_work(rows, inputs, outputs, bytes_per_element=sizes.element_bytes, backward=backward)
    if sizes.dtype == "float32":
        return work
    return work + _moved(inputs * outputs + rows * inputs, 1.5, calls=2)


def layer_seconds(sizes: Sizes, call: Call, ceilings: Ceilings) -> LayerSeconds:
    """One layer over the tokens of `call`."""
    forward, backward = attention_seconds(call, ceilings, sizes.dtype)
    d, rows = sizes.d_model, call.batch * call.queries
    qkv = (call.heads + 2 * call.kv_heads) * call.head_dim
    rotated, inner = rows * (call.heads + call.kv_heads) * call.head_dim, 4 * d
    seconds: dict[str, dict[str, float]] = {"forward": {"attention": forward}, "backward": {"attention": backward}}
    for direction in DIRECTIONS:
        back = direction == "backward"
        twice = 2 if back else 1
        # norm 2 tensors, residual 3; the rotation makes some ten of its input, the gather of heads two
        plain = _moved(rows * d, twice * 5, calls=2) + _moved(rotated, twice * 10, calls=8) + _moved(rows * qkv, 2)
        projections = _linear(sizes, rows, d, qkv, back) + _linear(sizes, rows, d, d, back) + plain
        plain = _moved(rows * d, twice * 5, calls=2) + _moved(rows * inner, twice + 1, sizes.element_bytes)
        ffn = _linear(sizes, rows, d, inner, back) + _linear(sizes, rows, inner, d, back) + plain
        seconds[direction]["projections"] = plain_seconds(projections, ceilings, sizes.dtype)
        seconds[direction]["ffn"] = plain_seconds(ffn, ceilings, sizes.dtype)
    return LayerSeconds(seconds["forward"], seconds["backward"])


def around_seconds(
    sizes: Sizes, schedule: MemorySchedule, rows: int, ceilings: Ceilings
) -> dict[str, dict[str, float]]:
    """Seconds of what lies around the layers, by direction ("step" for the optimiser) and part, for `rows` tokens."""
    d, words = sizes.d_model, sizes.vocab_size
    appended = 2 * rows * sum(schedule.heads(sizes.heads)) * sizes.head_dim
    norm, loss = _moved(rows * d, 2), _moved(rows * words, 4, calls=4)
    works = {
        "forward": {
            "embedding": _moved(rows * d, 2) + _moved(appended, 2, sizes.element_bytes, calls=2 * schedule.layers),
            "head": norm + _linear(sizes, rows, d, words, False) + loss,
        },
        "backward": {
            "embedding": _moved(words * d, 2) + _moved(rows * d, 3),
            "head": norm + norm + _linear(sizes, rows, d, words, True) + loss,
        },
        "step": {
            "optimizer": Work(bytes_read=OPTIMIZER_BYTES * parameters_of(sizes, schedule), calls=4 * schedule.layers)
        },
    }
    return {
        direction: {part: plain_seconds(work, ceilings, sizes.dtype) for part, work in parts.items()}
        for direction, parts in works.items()
    }


@dataclass(frozen=True)
class Predicted:
    """A step's predicted seconds: each layer's, and those around the layers by direction and part."""

    layers: tuple[LayerSeconds, ...]
    around: Mapping[str, Mapping[str, float]]

    def seconds(self, direction: str) -> float:
        """Of the whole "forward" or "backward", or of the optimiser's "step"."""
        layers = 0.0 if direction == "step" else sum(sum(getattr(layer, direction).values()) for layer in self.layers)
        return layers + sum(self.around[direction].values())

    @property
    def attention(self) -> float:
        """Of the attention of all layers, forward and backward."""
        return sum(layer.forward["attention"] + layer.backward["attention"] for layer in self.layers)


def predict_step(sizes: Sizes, schedule: MemorySchedule, kind: str, ceilings: Ceilings) -> Predicted:
    """A training step ("train") or a whole-piece call ("piece")."""
    make = training_call if kind == "train" else piece_call
    calls = [
        make(sizes, horizon, heads)
        for horizon, heads in zip(schedule.horizons, schedule.heads(sizes.heads), strict=True)
    ]
    known: dict[Call, LayerSeconds] = {}
    for call in calls:
        known.setdefault(call, layer_seconds(sizes, call, ceilings))
    around = around_seconds(sizes, schedule, calls[0].batch * calls[0].queries, ceilings)
    return Predicted(tuple(known[call] for call in calls), around)


def predict_piece(sizes: Sizes, schedule: MemorySchedule, tokens: int, ceilings: Ceilings) -> float:
    """Seconds to read a piece of `tokens` tokens and go back through it, segment by segment or in one call."""
    known: dict[tuple[int, int], LayerSeconds] = {}
    for horizon, heads in set(zip(schedule.horizons, schedule.heads(sizes.heads), strict=True)):
        known[horizon, heads] = layer_seconds(sizes, piece_call(sizes, horizon, heads, tokens), ceilings)
    around = around_seconds(sizes, schedule, tokens, ceilings)
    layers = tuple(known[key] for key in zip(schedule.horizons, schedule.heads(sizes.heads), strict=True))
    predicted = Predicted(layers, around)
    return predicted.seconds("forward") + predicted.seconds("backward")


def keys_at(position: int, horizon: int, sizes: Sizes) -> int:
    """Keys that the token at `position` of its piece sees, itself included."""
    past = horizon if sizes.visibility == "sliding" else horizon + position % sizes.segment_length
    return min(position, past) + 1


def predict_token(sizes: Sizes, schedule: MemorySchedule, position: int, ceilings: Ceilings) -> tuple[float, float]:
    """Seconds of one token alone at `position`, and how much of them attention has."""
    attention = 0.0
    # A CPU attends in float32: keys and values of two bytes are read, written as four and read again.
    passes = 5 if sizes.device == "cpu" and sizes.element_bytes == 2 else 1
    for horizon, heads in zip(schedule.horizons, schedule.heads(sizes.heads), strict=True):
        work = decode_work(_call(sizes, horizon, heads, 1, 1, held=horizon), keys_at(position, horizon, sizes))
        attention += passes * work.bytes / ceilings.copy_bytes + ceilings.attention_seconds["forward"]
    weights = parameters_of(sizes, schedule) * sizes.element_bytes
    rest = Work(bytes_read=weights, calls=DECODE_OPERATORS * schedule.layers)
    return attention + plain_seconds(rest, ceilings, sizes.dtype), attention


def held_bytes(sizes: Sizes, schedule: MemorySchedule, kind: str) -> tuple[int, ...]:
    """Bytes of each layer's memory as it is allocated for this kind of work.

    Training holds the schedule's budget exactly; decoding also has room for the segment in progress.
    """
    return tuple(
        memory_bytes(
            batch=sizes.batch if kind == "train" else 1,
            horizon=memory_capacity(horizon, sizes.segment_length, sizes.visibility) if kind == "decode" else horizon,
            kv_heads=heads,
            head_dim=sizes.head_dim,
            bytes_per_element=sizes.element_bytes,
        )
        for horizon, heads in zip(schedule.horizons, schedule.heads(sizes.heads), strict=True)
    )


def least_bytes(sizes: Sizes, schedule: MemorySchedule, kind: str) -> int:
    """Bytes that a step cannot do without: weights, and in training gradients and two moments; memories; the residual
    stream and the feed-forward layers' inner values that the backward needs; logits and their gradient."""
    weights = 4 * parameters_of(sizes, schedule)
    held = sum(held_bytes(sizes, schedule, kind))
    if kind == "decode":
        return weights + held
    rows = sizes.batch * sizes.segment_length if kind == "train" else sizes.piece_tokens
    kept = rows * (schedule.layers * (2 * 4 * sizes.d_model + 4 * sizes.d_model * sizes.element_bytes))
    return 4 * weights + held + kept + 2 * 4 * rows * sizes.vocab_size
