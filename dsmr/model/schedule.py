"""Memory schedules: how a budget of recurrent state is spread over depth.

A schedule gives every layer a horizon, the number of past tokens that its memory holds, and optionally a number of KV
heads and a choice of those tokens (`dsmr_kernels.retention`). It is written as a call,
`two_scale(layers=12, long=4096, short=512, n_long=3)`, the same in configuration files, on the command line and in
Python. The names are those of Depth-Structured Music Recurrence (arXiv 2602.19816); where the paper leaves a parameter
open, the choice here is our reading.
"""

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsmr_kernels.costing.cost import attention_flops, human_bytes, memory_bytes, steady_keys, visible_pairs
from dsmr_kernels.retention import RETENTIONS

KVHeads = int | Sequence[int | None] | None
Retention = str | Sequence[str]
NEWEST = "newest"


MOST_LAYERS = 10_000
MOST_TOKENS = 2**40  # a horizon beyond any memory, so that its bytes still fit in 64 bits


def _check_layers(layers: int) -> None:
    if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
        raise ValueError(f"a schedule needs at least 1 layer, got layers={layers!r}")
    if layers > MOST_LAYERS:
        raise ValueError(f"a schedule has at most {MOST_LAYERS:,} layers, got layers={layers!r}")


def _check_count(name: str, value: int, layers: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= layers:
        raise ValueError(f"{name} must be an integer from 0 to the {layers} layers, got {value!r}")


def _check_horizon(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")


@dataclass(frozen=True)
class MemorySchedule:
    """Horizons and KV heads, one entry a layer, the lowest layer first.

    Attributes:
        horizons: past tokens that each layer's memory holds; 0 = none.
        kv_heads: KV heads of each layer; None = as many as the model has query heads.
        text: the schedule as it is written; `parse(text)` gives the same schedule.
        retention: which past tokens each layer keeps: the "newest", or "uniform" or "random" ones of the whole piece;
            empty = all layers the newest.
    """

    horizons: tuple[int, ...]
    kv_heads: tuple[int | None, ...]
    text: str
    retention: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_layers(len(self.horizons))
        if not self.retention:
            object.__setattr__(self, "retention", (NEWEST,) * len(self.horizons))
        if len(self.retention) != len(self.horizons):
            raise ValueError(
                f"retention must have one entry for each of the {len(self.horizons)} layers, got {len(self.retention)}"
            )
        for layer, kept in enumerate(self.retention):
            if kept not in RETENTIONS:
                raise ValueError(f"retention must be one of {', '.join(RETENTIONS)}, but layer {layer} has {kept!r}")
        if len(self.kv_heads) != len(self.horizons):
            raise ValueError(
                f"kv_heads must have one entry for each of the {len(self.horizons)} layers, got {len(self.kv_heads)}"
            )
        for layer, horizon in enumerate(self.horizons):
            if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 0:
                raise ValueError(f"a horizon must be an integer >= 0, but layer {layer} has {horizon!r}")
            if horizon > MOST_TOKENS:
                raise ValueError(f"a horizon must be at most {MOST_TOKENS:,} tokens, but layer {layer} has {horizon}")
        for layer, heads in enumerate(self.kv_heads):
            if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
                raise ValueError(f"kv_heads must be an integer >= 1 or None, but layer {layer} has {heads!r}")

    def __str__(self) -> str:
        return self.text

    @property
    def layers(self) -> int:
        return len(self.horizons)

    @property
    def newest(self) -> bool:
        """Whether every layer that has a memory keeps the newest tokens: then many segments can go in one call."""
        return all(kept == NEWEST or not horizon for kept, horizon in zip(self.retention, self.horizons, strict=True))

    # Constructors, under the names that `parse` knows

    @classmethod
    def _make(
        cls, name: str, per_layer: Sequence[int], kv_heads: KVHeads, retention: Retention, /, **arguments: object
    ) -> "MemorySchedule":
        for key in ("length", "horizon", "long", "short"):
            if key in arguments:
                _check_horizon(key, arguments[key])
        heads = (kv_heads,) * len(per_layer) if kv_heads is None or isinstance(kv_heads, int) else tuple(kv_heads)
        if kv_heads is None or isinstance(kv_heads, int):
            if kv_heads is not None or name == "fhcr":  # the one name whose default is not None
                arguments["kv_heads"] = kv_heads
        else:
            arguments["kv_heads"] = list(kv_heads)
        kept = (retention,) * len(per_layer) if isinstance(retention, str) else tuple(retention)
        if retention != NEWEST:
            arguments["retention"] = retention if isinstance(retention, str) else list(retention)
        written = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return cls(tuple(per_layer), heads, f"{name}({written})", kept)

    @classmethod
    def full(
        cls, layers: int, length: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """Every layer holds the whole piece, up to `length` tokens."""
        _check_layers(layers)
        return cls._make("full", [length] * layers, kv_heads, retention, layers=layers, length=length)

    @classmethod
    def uniform(
        cls, layers: int, horizon: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """Every layer holds `horizon` tokens."""
        _check_layers(layers)
        return cls._make("uniform", [horizon] * layers, kv_heads, retention, layers=layers, horizon=horizon)

    @classmethod
    def two_scale(
        cls, layers: int, long: int, short: int, n_long: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """The lowest `n_long` layers hold `long` tokens, the others `short`: the paper's main instance."""
        _check_layers(layers)
        _check_count("n_long", n_long, layers)
        horizons = [long] * n_long + [short] * (layers - n_long)
        return cls._make(
            "two_scale", horizons, kv_heads, retention, layers=layers, long=long, short=short, n_long=n_long
        )

    @classmethod
    def reverse_two_scale(
        cls, layers: int, long: int, short: int, n_long: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """The highest `n_long` layers hold `long` tokens, the others `short`."""
        _check_layers(layers)
        _check_count("n_long", n_long, layers)
        horizons = [short] * (layers - n_long) + [long] * n_long
        return cls._make(
            "reverse_two_scale", horizons, kv_heads, retention, layers=layers, long=long, short=short, n_long=n_long
        )

    @classmethod
    def ascending(
        cls, layers: int, shortest: int, longest: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """Horizons grow evenly from `shortest` in the lowest layer to `longest` in the highest (our reading)."""
        return cls._progressive("ascending", layers, shortest, longest, kv_heads, retention)

    @classmethod
    def descending(
        cls, layers: int, shortest: int, longest: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """Horizons shrink evenly from `longest` in the lowest layer to `shortest` in the highest."""
        return cls._progressive("descending", layers, shortest, longest, kv_heads, retention)

    @classmethod
    def _progressive(
        cls, name: str, layers: int, shortest: int, longest: int, kv_heads: KVHeads, retention: Retention
    ) -> "MemorySchedule":
        _check_layers(layers)
        _check_horizon("shortest", shortest)
        _check_horizon("longest", longest)
        if shortest > longest:
            raise ValueError(f"{name} needs shortest <= longest, got shortest={shortest} and longest={longest}")
        steps = max(layers - 1, 1)
        horizons = [shortest + round((longest - shortest) * layer / steps) for layer in range(layers)]
        horizons = horizons if name == "ascending" else horizons[::-1]
        return cls._make(name, horizons, kv_heads, retention, layers=layers, shortest=shortest, longest=longest)

    @classmethod
    def alternating(
        cls, layers: int, long: int, short: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """`long` and `short` by turns, the lowest layer `long`."""
        _check_layers(layers)
        horizons = [short if layer % 2 else long for layer in range(layers)]
        return cls._make("alternating", horizons, kv_heads, retention, layers=layers, long=long, short=short)

    @classmethod
    def binary(
        cls,
        layers: int,
        horizon: int,
        carriers: Sequence[int],
        kv_heads: KVHeads = None,
        *,
        retention: Retention = NEWEST,
    ) -> "MemorySchedule":
        """The layers named in `carriers` (0 = the lowest) hold `horizon` tokens, the others none."""
        _check_layers(layers)
        for layer in carriers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
                raise ValueError(f"carriers must name layers from 0 to {layers - 1}, got {layer!r}")
        horizons = [horizon if layer in carriers else 0 for layer in range(layers)]
        return cls._make(
            "binary", horizons, kv_heads, retention, layers=layers, horizon=horizon, carriers=list(carriers)
        )

    @classmethod
    def none(cls, layers: int, kv_heads: KVHeads = None, *, retention: Retention = NEWEST) -> "MemorySchedule":
        """No layer has a memory: each segment stands alone."""
        _check_layers(layers)
        return cls._make("none", [0] * layers, kv_heads, retention, layers=layers)

    @classmethod
    def fhcr(
        cls, layers: int, length: int, kv_heads: KVHeads = 2, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """Full-Horizon Compressed Recurrence: every position is kept, up to `length`, with few KV heads."""
        _check_layers(layers)
        return cls._make("fhcr", [length] * layers, kv_heads, retention, layers=layers, length=length)

    @classmethod
    def explicit(
        cls, horizons: Sequence[int], kv_heads: KVHeads = None, *, retention: Retention = NEWEST
    ) -> "MemorySchedule":
        """A horizon for each layer, the lowest first."""
        return cls._make("explicit", list(horizons), kv_heads, retention, horizons=list(horizons))

    @classmethod
    def parse(cls, text: "str | MemorySchedule") -> "MemorySchedule":
        """Read a schedule from its text, for example "two_scale(layers=12, long=4096, short=512, n_long=3)".

        Raises:
            ValueError: if the text is not a call, or its name or an argument is unknown, missing or out of range.
        """
        if isinstance(text, MemorySchedule):
            return text
        if not isinstance(text, str):
            raise ValueError(f"a schedule must be a MemorySchedule or its text, got {text!r}")
        example = 'such as "two_scale(layers=12, long=4096, short=512, n_long=3)"'
        try:
            call = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"schedule {text!r} cannot be read: expected a call {example}") from None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError(f"schedule {text!r} cannot be read: expected a call {example}")
        constructor = CONSTRUCTORS.get(call.func.id)
        if constructor is None:
            raise ValueError(f"schedule {call.func.id!r} is unknown: expected one of {', '.join(CONSTRUCTORS)}")
        signature = inspect.signature(constructor)
        try:
            positional = [_value(argument) for argument in call.args]
            named = {keyword.arg or "**": _value(keyword.value) for keyword in call.keywords}
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ValueError(f"schedule {text!r} cannot be read: its arguments must be numbers or lists") from None
        if len(named) < len(call.keywords):
            raise ValueError(f"schedule {text!r} gives an argument twice")
        usage = f"{call.func.id}({', '.join(signature.parameters)})"
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            raise ValueError(f"schedule {text!r} does not fit {usage}: {error}") from None
        try:
            return constructor(*positional, **named)
        except TypeError as error:
            raise ValueError(f"schedule {text!r} has an argument of the wrong kind for {usage}: {error}") from None

    # Costs

    def heads(self, n_heads: int) -> tuple[int, ...]:
        """KV heads of each layer in a model with `n_heads` query heads.

        Raises:
            ValueError: if `n_heads` is not a multiple of a layer's KV heads.
        """
        for layer, heads in enumerate(self.kv_heads):
            if heads is not None and n_heads % heads:
                raise ValueError(f"the {n_heads} heads must be a multiple of kv_heads, but layer {layer} has {heads}")
        return tuple(n_heads if heads is None else heads for heads in self.kv_heads)

    def layer_bytes(
        self, *, n_heads: int, head_dim: int, bytes_per_element: int = 2, batch: int = 1, scale_bytes: int = 0
    ) -> tuple[int, ...]:
        """Bytes of recurrent state of each layer."""
        return tuple(
            memory_bytes(
                batch=batch,
                horizon=horizon,
                kv_heads=heads,
                head_dim=head_dim,
                bytes_per_element=bytes_per_element,
                scale_bytes=scale_bytes,
            )
            for horizon, heads in zip(self.horizons, self.heads(n_heads), strict=True)
        )

    def budget_bytes(
        self, *, n_heads: int, head_dim: int, bytes_per_element: int = 2, batch: int = 1, scale_bytes: int = 0
    ) -> int:
        """Bytes of recurrent state: 2 * batch * (head_dim * bytes_per_element + scale_bytes) * sum of horizon *
        kv_heads; only a memory in int8 has scales (`dsmr_kernels.quantise.SCALE_BYTES`)."""
        return sum(
            self.layer_bytes(
                n_heads=n_heads,
                head_dim=head_dim,
                bytes_per_element=bytes_per_element,
                batch=batch,
                scale_bytes=scale_bytes,
            )
        )

    def layer_attention_flops(
        self,
        *,
        n_heads: int,
        head_dim: int,
        segment_length: int,
        visibility: str = "segment",
        tokens: int | None = None,
    ) -> tuple[float, ...]:
        """Floating-point operations of each layer's attention, forward: for a whole piece of `tokens` tokens, or,
        without `tokens`, for one token once the memories are full."""

        def keys(horizon: int) -> float:
            if tokens is None:
                return steady_keys(horizon=horizon, segment_length=segment_length, visibility=visibility)
            return visible_pairs(tokens, horizon=horizon, segment_length=segment_length, visibility=visibility)

        return tuple(attention_flops(keys(horizon), heads=n_heads, head_dim=head_dim) for horizon in self.horizons)

    def attention_flops(
        self,
        *,
        n_heads: int,
        head_dim: int,
        segment_length: int,
        visibility: str = "segment",
        tokens: int | None = None,
    ) -> float:
        """Sum of `layer_attention_flops` over the layers."""
        return sum(
            self.layer_attention_flops(
                n_heads=n_heads,
                head_dim=head_dim,
                segment_length=segment_length,
                visibility=visibility,
                tokens=tokens,
            )
        )

    def describe(self, *, n_heads: int = 8, head_dim: int = 64, bytes_per_element: int = 2) -> str:
        """The schedule in a line: its text, the horizons of runs of equal layers, and its budget."""
        runs: list[list[int]] = []
        for horizon in self.horizons:
            if runs and runs[-1][1] == horizon:
                runs[-1][0] += 1
            else:
                runs.append([1, horizon])
        depth = ", ".join(f"{count} x {horizon}" for count, horizon in runs)
        budget = self.budget_bytes(n_heads=n_heads, head_dim=head_dim, bytes_per_element=bytes_per_element)
        others = sorted(set(self.retention) - {NEWEST})
        kept = "" if self.newest else f", kept by retention {' and '.join(others)}"
        return (
            f"{self.text}: {self.layers} layers, horizons from the bottom {depth}{kept}; {human_bytes(budget)} a stream"
        )


def _value(argument: ast.expr) -> object:
    """An argument as it is written; the names of `RETENTIONS` need no quotes."""
    if isinstance(argument, ast.Name) and argument.id in RETENTIONS:
        return argument.id
    if isinstance(argument, ast.List | ast.Tuple):
        return [_value(entry) for entry in argument.elts]
    return ast.literal_eval(argument)


CONSTRUCTORS: dict[str, Callable[..., MemorySchedule]] = {
    name: getattr(MemorySchedule, name)
    for name in (
        "full",
        "uniform",
        "two_scale",
        "reverse_two_scale",
        "ascending",
        "descending",
        "alternating",
        "binary",
        "none",
        "fhcr",
        "explicit",
    )
}
