"""Putting a memory into every attention of a model that is there already, or saying which could not have one.

All layers are read first; only if every one of them can be replaced is any. Weights are copied, so a model with
horizons longer than its text computes what it computed.
"""

import functools
from typing import Any

from torch import nn

from dsmr.integrations.hosts.calls import MultiheadAttention, TransformersAttention, generate
from dsmr.model.hosts import HostAttention, is_known, read_attention
from dsmr.model.recurrent import RecurrentAttention
from dsmr.model.schedule import MemorySchedule

CROSS = (nn.TransformerDecoderLayer, nn.Transformer)


def replace_attention(
    model: nn.Module,
    schedule: str | MemorySchedule,
    *,
    segment_length: int | None = None,
    visibility: str | None = None,
    backend: str | None = None,
    position: str | None = None,
) -> list[RecurrentAttention]:
    """Replace each attention of `model`, in place, by one with the horizon that `schedule` gives it.

    The model is then called as before, without a cache; inside `with stream(model, batch):` its layers remember. Known
    are the modules of `DSMRAttention.from_attention`, wherever they stand: in models of Transformers, in
    `nn.TransformerEncoder` with a causal mask, in blocks of one's own. An optimiser or an EMA is made afterwards: the
    parameters are new ones, under other names.

    Args:
        schedule: of as many layers as the model has attention modules, in the order of `model.modules()`. KV heads,
            where it names any, must be those that the model has.
        segment_length: as of `DSMRAttention`.
        visibility: "segment", or "sliding", which is what a model with sliding windows gets unless told; a schedule
            then only narrows them.
        position: of the layers, where the model's own is not to be seen from its attention: "rope", "alibi", ...

    Returns:
        The new layers, in order.

    Raises:
        ValueError: if the schedule does not fit, or any module that attends cannot be replaced: all are listed, each
            with why, and the model is as it was.
    """
    schedule = MemorySchedule.parse(schedule)
    problems: list[str] = []
    found = _attention(model, problems)
    hosts = _read(found, problems)
    if found and schedule.layers != len(found):
        problems.append(f"the schedule has {schedule.layers} layers, but the model has {len(found)}: {schedule}")
    if not found and not problems:
        problems.append("it has no attention that is known")
    layers: list[Any] = []
    if not problems:
        windowed = any(host.window is not None for host in hosts.values())
        options = {
            "segment_length": segment_length,
            "visibility": visibility or ("sliding" if windowed else "segment"),
            "backend": backend,
            **({} if position is None else {"position": position}),
        }
        for layer, (name, host) in enumerate(hosts.items()):
            try:
                layers.append(_made(found[name], host, schedule, layer, options))
            except ValueError as error:
                problems.append(f"{name}: {error}")
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ValueError(f"{type(model).__name__} is left as it was, since not all of it can be replaced:{listed}")
    for name, layer in zip(hosts, layers, strict=True):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "use_cache"):  # of its own in what `generate` goes by
        generation.use_cache = False
    if any(isinstance(layer, TransformersAttention) for layer in layers) and hasattr(model, "generate"):
        model.__dict__["generate"] = functools.partial(generate, model)
    return layers


def _attention(model: nn.Module, problems: list[str]) -> dict[str, nn.Module]:
    """Modules that attend, by name and in order; what cannot be replaced for where it stands goes to `problems`."""
    found: dict[str, nn.Module] = {}
    places: dict[int, str] = {}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        problems.append(f"{type(model).__name__} has cross-attention: decoders alone can have memories")
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CROSS):
            problems.append(f"{name or 'the model'} ({type(module).__name__}) has cross-attention")
        if isinstance(module, RecurrentAttention):
            problems.append(f"{name or 'the model'} has a memory already")
        elif is_known(module):
            if id(module) in places:
                problems.append(f"{name} is {places[id(module)]} once more, and a memory is of one layer only")
            places.setdefault(id(module), name)
            found[name] = module
        elif _attends(module) and not any(name.startswith(f"{place}.") for place in found):
            problems.append(f"{name or 'the model'} ({type(module).__name__}) attends in a way that is not known")
    if "" in found:
        problems.append("the model is itself an attention: use RecurrentAttention.from_attention")
    return found


def _attends(module: nn.Module) -> bool:
    """Whether a module calls itself attention, and is not what is built around one that is known."""
    inner = [part for part in module.modules() if is_known(part) or isinstance(part, RecurrentAttention)]
    return "attention" in type(module).__name__.lower() and not inner


def _read(found: dict[str, nn.Module], problems: list[str]) -> dict[str, HostAttention]:
    hosts = {}
    for name, module in found.items():
        try:
            hosts[name] = read_attention(module, transposed=True)
            hosts[name].arguments()
        except (TypeError, ValueError) as error:
            problems.append(f"{name}: {error}")
    return hosts


def _made(
    module: nn.Module, host: HostAttention, schedule: MemorySchedule, layer: int, options: dict[str, Any]
) -> RecurrentAttention:
    asked = schedule.kv_heads[layer]
    if asked is not None and asked != host.n_kv_heads:
        raise ValueError(f"the schedule asks for {asked} KV heads, but the model has {host.n_kv_heads}")
    horizon = schedule.horizons[layer]
    if host.window is not None and options["visibility"] == "sliding":
        horizon = min(horizon, host.window - 1)  # a window counts the query itself
    if isinstance(module, nn.MultiheadAttention):
        kind: Any = MultiheadAttention
    else:
        kind = TransformersAttention if type(module).__module__.startswith("transformers.") else RecurrentAttention
    more = {"retention": schedule.retention[layer], "sample": layer}
    new = kind.from_host(host, horizon=horizon, **options, **more).train(module.training)
    if kind is not RecurrentAttention:
        new.remember(host, module)
    return new
