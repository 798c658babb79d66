"""A schedule in a model's configuration: put there, to be saved with the model, and read as what each layer does.

A schedule can only narrow what a layer sees: where the model has a sliding window of its own in a layer, the nearer of
the two bounds holds. What a layer's memory cannot take the place of is refused here, before anything is computed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from dsmr.model.schedule import MemorySchedule

ATTENTION = "dsmr"  # the name of the attention implementation
KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Plan:
    """What the layers of a model remember.

    Attributes:
        horizons: tokens before its own that a query of each layer sees.
        segment_length: tokens of a segment, all of whose queries see the same past; None = every query sees exactly its
            own horizon.
    """

    horizons: tuple[int, ...]
    segment_length: int | None


def set_schedule(
    model: PreTrainedModel | PreTrainedConfig, schedule: str | MemorySchedule, *, segment_length: int | None = None
) -> None:
    """Give a model its memory schedule. It is kept in the configuration as `dsmr`, and saved with the model.

    Args:
        model: a decoder of Transformers, or its configuration.
        schedule: of as many layers as the model, with the newest tokens kept; KV heads, where it names any, must be
            those that the model has.
        segment_length: None: a query sees exactly the `horizon` tokens before it ("sliding"). L: segments of L tokens,
            counted from each row's text; all queries of one see the same past, `horizon` tokens before the segment, as
            a `DSMRModel` does.

    Raises:
        ValueError: if the schedule does not fit the model, or a layer of the model cannot have such a memory.
    """
    config = _decoder(model)
    settings = {"schedule": str(MemorySchedule.parse(schedule)), "segment_length": segment_length}
    _plan(config, settings)
    config.dsmr = settings


def get_schedule(model: PreTrainedModel | PreTrainedConfig) -> MemorySchedule:
    """The schedule that `set_schedule` gave the model, also after it was saved and loaded.

    Raises:
        ValueError: if it has none.
    """
    return _parsed(_settings(_decoder(model))["schedule"])


def plan_of(config: PreTrainedConfig) -> Plan:
    """What the layers of a model with this configuration remember.

    Raises:
        ValueError: if no schedule was set, or it does not fit.
    """
    config = _decoder(config)
    return _plan(config, _settings(config))


def _decoder(model: PreTrainedModel | PreTrainedConfig) -> PreTrainedConfig:
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(f"a model or a configuration of transformers is needed, got {type(model).__name__}")
    return config.get_text_config(decoder=True)


def _settings(config: PreTrainedConfig) -> dict[str, Any]:
    settings = getattr(config, "dsmr", None)
    if settings is None:
        raise ValueError("this model has no memory schedule yet: call set_schedule(model, ...) first")
    return settings


_parsed = lru_cache(maxsize=64)(MemorySchedule.parse)


def _plan(config: PreTrainedConfig, settings: dict[str, Any]) -> Plan:
    schedule, segment_length = _parsed(settings["schedule"]), settings["segment_length"]
    if segment_length is not None and (
        isinstance(segment_length, bool) or not isinstance(segment_length, int) or segment_length < 1
    ):
        raise ValueError(f"segment_length must be None or an integer >= 1, got {segment_length!r}")
    _check_model(config)
    kinds, windows = get_layer_types_and_kwargs(config)
    if schedule.layers != len(kinds):
        raise ValueError(f"the schedule has {schedule.layers} layers, but the model has {len(kinds)}: {schedule}")
    if not schedule.newest:
        raise ValueError(f"a model of transformers keeps the newest tokens only, but the schedule says {schedule}")
    _check_heads(config, schedule)
    horizons = []
    for layer, (kind, more, horizon) in enumerate(zip(kinds, windows, schedule.horizons, strict=True)):
        if kind not in KINDS:
            raise ValueError(f"layers must be one of {', '.join(KINDS)} to have a horizon, but layer {layer} is {kind}")
        window = more.get("sliding_window")
        if window is not None and segment_length is not None:
            raise ValueError(
                f"segment_length must be None, since layer {layer} has a sliding window of its own ({window} tokens)"
            )
        horizons.append(horizon if window is None else min(horizon, window - 1))  # a window counts the query itself
    return Plan(tuple(horizons), segment_length)


def _check_model(config: PreTrainedConfig) -> None:
    name = f"a {config.model_type} model"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{name} with cross-attention cannot have memory horizons: decoders alone can")
    if not getattr(config, "is_causal", True):
        raise ValueError(f"{name} that attends in both directions cannot have memory horizons")
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise ValueError(f"{name} whose layers share keys and values cannot have a horizon for each of them")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{name} with capped scores (attn_logit_softcapping) cannot have memory horizons")


def _check_heads(config: PreTrainedConfig, schedule: MemorySchedule) -> None:
    for layer, (asked, own) in enumerate(zip(schedule.kv_heads, config.per_layer_config, strict=True)):
        there = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        if asked is not None and asked != there:
            raise ValueError(
                f"the schedule asks for {asked} KV heads in layer {layer}, but the model has {there}, and a schedule "
                "cannot change a model that is trained"
            )
