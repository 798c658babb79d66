"""Modules that other libraries have altered: adapters in their place, hooks, forwards of their own.

Where a module is not as it was made, its weight no longer says what it does, and it has to be called.
"""

import torch
from torch import Tensor, nn


def as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call `module` is to call a `kind` with the module's own weights, and nothing else."""
    return type(module).forward is kind.forward and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether more happens than the forward of its class where it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def weight_of(module: nn.Module) -> Tensor:
    """A tensor that lies where the module's weights do and has their dtype: an adapter may have no `weight` itself, and
    what PyTorch has quantised has no parameters, takes float32 and lies on the CPU."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(module.parameters(), None)
    return torch.empty(0, dtype=torch.float32, device="cpu") if weight is None else weight
