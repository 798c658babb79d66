"""The same weights under another schedule: what a trained model loses by less memory, before anything is trained anew.

Horizons are taken as they are, since no weight depends on them. Fewer KV heads come from more by merging: the
projections of the heads that become one are averaged (Ainslie et al., GQA, 2023, section 2.1), and a query head goes on
asking the merged head that its own became.
"""

import dataclasses

import torch
from torch import Tensor

from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel


@torch.no_grad()
def with_schedule(model: DSMRModel, schedule: MemorySchedule | str) -> DSMRModel:
    """A copy of `model` whose memories follow `schedule`.

    Raises:
        ValueError: if the schedule has another number of layers, or a layer would get KV heads that its own cannot be
            merged into (more of them, or no divisor).
    """
    schedule = MemorySchedule.parse(schedule)
    own = model.config.schedule
    if schedule.layers != own.layers:
        raise ValueError(f"the schedule has {schedule.layers} layers, but the model has {own.layers}")
    heads = model.config.n_heads
    before, after = own.heads(heads), schedule.heads(heads)
    for layer, (had, wanted) in enumerate(zip(before, after, strict=True)):
        if had % wanted:
            raise ValueError(
                f"layer {layer} has {had} KV heads, which cannot be merged into {wanted}: choose a divisor"
            )
    weight = next(model.parameters())
    other = DSMRModel(dataclasses.replace(model.config, schedule=schedule)).to(weight.device, weight.dtype)
    values = dict(model.state_dict())
    for layer, (had, wanted) in enumerate(zip(before, after, strict=True)):
        if had != wanted:
            name = f"blocks.{layer}.attention.qkv.weight"
            values[name] = _merged(values[name], heads, had, wanted)
    other.load_state_dict(values)
    return other.train(model.training)


def _merged(qkv: Tensor, heads: int, had: int, wanted: int) -> Tensor:
    """Projection ((heads + 2 had) * head_dim, d_model) -> ((heads + 2 wanted) * head_dim, d_model)."""
    head_dim = qkv.shape[0] // (heads + 2 * had)
    q, k, v = qkv.split([heads * head_dim, had * head_dim, had * head_dim])
    k, v = (x.unflatten(0, (wanted, had // wanted, head_dim)).mean(1).flatten(0, 1) for x in (k, v))
    return torch.cat([q, k, v])
