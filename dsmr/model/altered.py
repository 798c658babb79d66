"""Modules that other libraries have altered: adapters in their place, hooks, forwards of their own.

Where a module is not as it was made, its weight no longer says what it does, and it has to be called.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

RECORDER = "transformers.utils.output_capturing"
"""Whose hooks stay for good on a model that was once asked for hidden states, and then do nothing."""


def as_made(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call `module`, also where it learns, is to call a `kind` with the module's own weights, no more."""
    return type(module).forward is kind.forward and not is_hooked(module, learning=True)


def is_hooked(module: nn.Module, learning: bool = False) -> bool:
    """Whether more happens than the forward of its class where it is called, or, `learning`, in its backward."""
    return "forward" in module.__dict__ or any(
        getattr(hook, "__module__", None) != RECORDER for hook in _hooks(module, learning)
    )


def _hooks(module: nn.Module, learning: bool) -> Iterator[object]:
    kept = [module._forward_hooks, module._forward_pre_hooks]
    if learning:
        kept += [module._backward_hooks, module._backward_pre_hooks]
    for hooks in kept:
        yield from hooks.values()


def weight_of(module: nn.Module) -> Tensor:
    """A tensor that lies where the module's weights do, of the dtype that it computes in: an adapter may have no
    `weight` itself, one of eight bits is stored so and computed in more, and what PyTorch has quantised has no tensor
    at all, takes float32 and lies on the CPU."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0, dtype=torch.float32, device="cpu")
