"""Attention computes in the dtype of its inputs: who writes it in operators switches autocast off around them."""

import contextlib

import torch


def without_autocast(device: str) -> contextlib.AbstractContextManager[None]:
    """A context in which operators on a kind of device compute in the dtype of what they are given."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
