"""A model in PyTorch as a `Player` plays it: whole segments of the prompt, then a stepper; arrays in and out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dsmr.generation.drawing import Allowed, Tokens, Uniform
from dsmr.generation.sampling import Sampling, draw
from dsmr.generation.stepping import Stepper, stepper
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel


@torch.no_grad()
def prefill(model: DSMRModel, tokens: Tensor, state: DSMRState) -> Tensor:
    """Show the model a prompt (B, T), one segment a call so that a long one needs no more memory.

    Returns:
        The next tokens' logits (B, V), float32, CPU. The model should be in evaluation mode.
    """
    length = model.config.segment_length
    logits = None
    for start in range(0, tokens.shape[1], length):
        segment = tokens[:, start : start + length].to(next(model.parameters()).device)
        logits = model(segment, state).logits[:, -1]
    if logits is None:
        raise ValueError("a prompt needs at least one token (a piece begins with BOS)")
    return logits.float().cpu()


class TorchEngine:
    """See `dsmr.generation.engines.Engine`. The weights are prepared when the first single token is shown."""

    def __init__(self, model: DSMRModel, state: DSMRState, dtype: str) -> None:
        self.model, self.state, self.dtype = model, state, dtype
        self._step: Stepper | None = None

    def first(self, prompts: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        logits = prefill(self.model, torch.from_numpy(prompts), self.state)
        return draw(logits, sampling, _tensor(allowed), torch.from_numpy(noise)).numpy()

    def next(self, tokens: Tokens, sampling: Sampling, allowed: Allowed, noise: Uniform) -> Tokens:
        if self._step is None:
            self._step = stepper(self.model, self.state, self.dtype)
        return self._step.next(torch.from_numpy(tokens), sampling, _tensor(allowed), torch.from_numpy(noise)).numpy()

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """The model is in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)
