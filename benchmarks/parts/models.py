"""Models of one size to train beside each other: ours, ours with its memory concatenated, and x-transformers' XL.

Every contender is made with a batch of random tokens and filled memories, and then trains on it a step at a time:
forward, backward, gradient clipping, AdamW. Their numbers cannot agree (other models), so what is compared first is
what makes the comparison fair: the number of parameters, and a finite loss that falls. Ours is also held against its
own reference backend, and the concatenating one against ours.
"""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.parts.peers import Missing
from dsmr.console.devices import autocast
from dsmr.corpus.streams import Batch
from dsmr.model.config import DSMRConfig
from dsmr.model.positions import Rotary, token_positions
from dsmr.model.transformer import DSMRModel
from dsmr.training.captured import CapturedStep
from dsmr.training.compiling import missing_compiler
from dsmr.training.update import clip_gradients
from dsmr_kernels.tolerance import allowed_error, error

SAME_SIZE = 0.02  # of the parameters
CLIPPING = "the clipping of gradients"  # how a profile calls it


@dataclass(frozen=True)
class Sizes:
    """Of a model and of one training step."""

    layers: int
    width: int
    heads: int
    segment: int
    memory: int
    batch: int
    vocabulary: int = 746
    dtype: torch.dtype = torch.float32
    on: str = "cpu"

    def __str__(self) -> str:
        return (
            f"{self.layers} layers, width {self.width}, {self.heads} heads, batch {self.batch}, segments of "
            f"{self.segment}, memory {self.memory:,}"
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self.on)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.segment

    @property
    def schedules(self) -> dict[str, str]:
        """By name, what a sweep compares; a quarter of the layers is long, short is a quarter of the memory."""
        layers, memory = f"layers={self.layers}", self.memory
        return {
            "full": f"full({layers}, length={memory})",
            "two_scale": f"two_scale({layers}, long={memory}, short={memory // 4}, n_long={max(self.layers // 4, 1)})",
            "uniform": f"uniform({layers}, horizon={memory // 4})",
            "none": f"none({layers})",
            "fhcr": f"fhcr({layers}, length={memory}, kv_heads=2)",
        }

    def config(self, schedule: str) -> DSMRConfig:
        """Of our model."""
        return DSMRConfig(
            self.vocabulary,
            self.schedules.get(schedule, schedule),  # type: ignore[arg-type]
            d_model=self.width,
            n_heads=self.heads,
            segment_length=self.segment,
        )


class Loss(Protocol):
    """A model with its memory: reads a segment, remembers it, gives the mean loss."""

    @property
    def model(self) -> nn.Module: ...

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor: ...


class Ours:
    """`DSMRModel` with a schedule; its state holds exactly the schedule's horizons."""

    def __init__(
        self, sizes: Sizes, schedule: str, compiled: bool = False, checkpoint: bool = False, replayed: bool = False
    ) -> None:
        if compiled:
            _needs_compiler(sizes)
        if replayed and sizes.device.type != "cuda":
            raise Missing("CUDA graphs need a GPU")
        self.replayed = replayed
        self.model = DSMRModel(sizes.config(schedule), checkpoint_layers=checkpoint, compile_layers=compiled)
        self.model.to(sizes.device)
        self.state = self.model.new_state(sizes.batch, dtype=sizes.dtype, aligned=True)

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        loss = self.model(tokens, self.state, targets=targets).loss
        assert loss is not None
        return loss


class Concatenated:
    """The same model, written as it is without this package: past keys and values are concatenated in front of the
    segment's, attended to by `scaled_dot_product_attention` with a mask, and cut to the horizon."""

    def __init__(self, sizes: Sizes, schedule: str) -> None:
        self.model = DSMRModel(sizes.config(schedule)).to(sizes.device)
        self.dtype, self.seen = sizes.dtype, 0
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * sizes.layers

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        model, (batch, count) = self.model, tokens.shape
        seen = torch.full((batch,), self.seen, device=tokens.device)
        head_dim, base = model.config.head_dim, model.config.rope_base
        place = Rotary.at(token_positions(seen, count, None), head_dim, base)
        x = model.embedding(tokens)
        for layer, block in enumerate(model.blocks):
            attention: Any = block.attention
            sizes = [heads * head_dim for heads in (attention.n_heads, attention.n_kv_heads, attention.n_kv_heads)]
            parts = attention.qkv(block.attention_norm(x)).split(sizes, -1)  # type: ignore[operator]
            q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)
            q, k, v = place(q).to(self.dtype), place(k).to(self.dtype), v.to(self.dtype)
            if (past := self.past[layer]) is not None:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            horizon, keys = attention.horizon, k.shape[2]
            self.past[layer] = (k[:, :, max(keys - horizon, 0) :].detach(), v[:, :, max(keys - horizon, 0) :].detach())
            mask = torch.ones(count, keys, dtype=torch.bool, device=x.device).tril(keys - count)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
            x = x + attention.out(y.transpose(1, 2).flatten(2).to(x.dtype))
            x = x + block.ffn(block.ffn_norm(x))  # type: ignore[operator]
        self.seen += count
        return F.cross_entropy(model.head(model.norm(x)).flatten(0, 1).float(), targets.flatten())


class XTransformersXL:
    """x-transformers' decoder with Transformer-XL memory: hidden states, projected to keys and values in every step."""

    def __init__(self, sizes: Sizes, compiled: bool = False) -> None:
        if compiled:
            _needs_compiler(sizes)
        if importlib.util.find_spec("x_transformers") is None:
            raise Missing("not installed: pip install 'dsmr[bench]' (x-transformers)")
        from x_transformers import Decoder, TransformerWrapper

        layers = Decoder(
            dim=sizes.width,
            depth=sizes.layers,
            heads=sizes.heads,
            attn_dim_head=sizes.width // sizes.heads,
            rotary_pos_emb=True,
            attn_flash=True,
        )
        self.model: Any = TransformerWrapper(
            num_tokens=sizes.vocabulary,
            max_seq_len=sizes.segment,
            max_mem_len=sizes.memory,
            tie_embedding=True,
            use_abs_pos_emb=False,
            attn_layers=layers,
        ).to(sizes.device)
        self.run: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.memories: Any = None

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits, self.memories = self.run(tokens, mems=self.memories, return_mems=True)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


CONTENDERS: dict[str, Callable[[Sizes], Loss]] = {
    "ours, two_scale": lambda sizes: Ours(sizes, "two_scale"),
    "ours, full": lambda sizes: Ours(sizes, "full"),
    "ours concatenated, full": lambda sizes: Concatenated(sizes, "full"),
    "x-transformers, XL memory": XTransformersXL,
}
VARIANTS: dict[str, Callable[[Sizes], Loss]] = {  # of the same, by `python -m benchmarks.training_step` alone
    "ours, two_scale, compiled": lambda sizes: Ours(sizes, "two_scale", compiled=True),
    "ours, full, compiled": lambda sizes: Ours(sizes, "full", compiled=True),
    "x-transformers, XL memory, compiled": lambda sizes: XTransformersXL(sizes, compiled=True),
    "ours, two_scale, checkpointed": lambda sizes: Ours(sizes, "two_scale", checkpoint=True),
    "ours, full, checkpointed": lambda sizes: Ours(sizes, "full", checkpoint=True),
    "ours, two_scale, replayed": lambda sizes: Ours(sizes, "two_scale", replayed=True),
    "ours, full, replayed": lambda sizes: Ours(sizes, "full", replayed=True),
}


def _needs_compiler(sizes: Sizes) -> None:
    if (reason := missing_compiler(sizes.device)) is not None:
        raise Missing(reason)


class Training:
    """A contender that learns the same random batch again and again, its memory full from the first step on."""

    def __init__(self, sizes: Sizes, make: Callable[[Sizes], Loss], backend: str | None = None) -> None:
        torch.manual_seed(0)
        self.sizes, self.contender = sizes, make(sizes)
        self.parameters = sum(parameter.numel() for parameter in self.contender.model.parameters())
        if backend is not None:
            for block in self.contender.model.blocks:  # type: ignore[union-attr]
                block.attention.backend = backend
        if sizes.dtype == torch.float64:
            self.contender.model.double()
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(sizes.vocabulary, (sizes.batch, sizes.segment + 1), generator=generator).to(sizes.device)
        self.tokens, self.targets = drawn[:, :-1], drawn[:, 1:]
        self.optimizer = torch.optim.AdamW(self.contender.model.parameters(), lr=1e-3, fused=True)
        self.captured = self._captured() if isinstance(self.contender, Ours) and self.contender.replayed else None
        with torch.no_grad():
            for _ in range(-(-sizes.memory // sizes.segment)):
                self._loss()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        """Ours as `dsmr train` has it, a peer as its users would write it."""
        narrow = self.sizes.dtype if self.sizes.dtype.itemsize < 4 else torch.float32
        if isinstance(self.contender, Ours) or narrow == torch.float32:
            return autocast(self.sizes.device, narrow)
        return torch.autocast(self.sizes.device.type, dtype=narrow)

    def _captured(self) -> CapturedStep:
        """The step as `dsmr train --graph` takes it."""
        assert isinstance(self.contender, Ours)
        return CapturedStep(self.contender.model, self.contender.state, self.optimizer, 1.0, self._autocast)

    def _loss(self) -> Tensor:
        with self._autocast():
            return self.contender(self.tokens, self.targets)

    def loss_and_gradients(self) -> tuple[Tensor, Tensor]:
        """Of a step that does not learn: the loss, and all gradients in a row."""
        loss = self._loss()
        gradients = torch.autograd.grad(loss, list(self.contender.model.parameters()))
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    def __call__(self) -> Tensor:
        """One step; the loss before it."""
        if self.captured is not None:
            within = torch.full_like(self.tokens, -1, dtype=torch.int32)  # the pieces began before
            return torch.tensor(
                self.captured(Batch(self.tokens, self.targets, within, (), self.tokens.numel()), 1e-3)[0]
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()
        with record_function(CLIPPING):
            clip_gradients(self.contender.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


class ReferenceStep:
    """Loss and gradients of our model with a schedule, by the reference backend in float64, and how far another way of
    computing them may lie from these: the rule of `dsmr_kernels.tolerance`, with the reference backend in the model's
    own precision as what plain PyTorch makes."""

    def __init__(self, sizes: Sizes, schedule: str) -> None:
        def made(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            own = replace(sizes, dtype=dtype)
            return Training(own, lambda own: Ours(own, schedule), "reference").loss_and_gradients()

        self.exact, self.plain, self.dtype = made(torch.float64), made(sizes.dtype), sizes.dtype

    def hold(self, name: str, training: Training) -> None:
        """Fail unless the loss and the gradients of `training` keep the tolerance."""
        found = training.loss_and_gradients()
        for result, value, exact, plain in zip(("loss", "dq"), found, self.exact, self.plain, strict=True):
            what = "the loss" if result == "loss" else "a gradient"
            err, allowed = error(value, exact), allowed_error(result, plain, exact, self.dtype)
            assert err <= allowed, f"{name}: {what} errs by {err:.3g}, allowed {allowed:.3g}"


def check_learning(name: str, training: Training, parameters: int) -> None:
    """Fail unless the model has nearly as many parameters as ours and its loss is finite and falls."""
    apart = abs(training.parameters / parameters - 1)
    assert apart <= SAME_SIZE, f"{name}: {training.parameters:,} parameters, ours has {parameters:,}"
    losses = [float(training()) for _ in range(2)]
    assert all(map(math.isfinite, losses)), f"{name}: the loss is {losses}"
    assert losses[-1] < losses[0], f"{name}: the loss does not fall: {losses}"
