"""One token's whole forward pass, as `DSMRModel.forward` computes it, without what only training and long calls need.

The residual stream is a float32 row for each stream, each product reads its weights once in the precision asked for,
and keys and values go straight into the rings. Nothing is concatenated, and what is allocated are single rows.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmr.generation.sampling import Sampling, draw
from dsmr.generation.stepping.rings import Rings
from dsmr.generation.stepping.weights import Product, product
from dsmr.model.altered import is_hooked
from dsmr.model.attention import DSMRAttention
from dsmr.model.positions import Rotary, token_positions
from dsmr.model.recall import Recall
from dsmr.model.state import DSMRState
from dsmr.model.transformer import Block, DSMRModel, FeedForward

EPS = 1e-5  # of a model's norms, PyTorch's own default
TURNS = 256  # tokens whose rotary angles are computed at a time


@dataclass(frozen=True)
class Layer:
    """One block, its weights prepared. `qkv` are the products of each input that differs, see `Step._project`,
    and where their results go."""

    attention: DSMRAttention
    attention_norm: Tensor
    qkv: tuple[tuple[Product, slice], ...]
    out: Product
    ffn_norm: Tensor
    up: Product
    down: Product
    gated: bool
    projected: Tensor  # (B, (Hq + 2 Hkv) * D) float32, scratch


def attentions(model: DSMRModel) -> list[DSMRAttention]:
    """The attention of every layer, the lowest first."""
    return [block.attention for block in blocks(model)]


def blocks(model: DSMRModel) -> Iterator[Block]:
    for block in model.blocks:
        assert isinstance(block, Block)
        yield block


def altered(model: DSMRModel) -> str | None:
    """The name of the first module that has to be called, since the weights that a step reads do not say all that it
    does, as an adapter or where it has hooks; None if there is none. Weights that are parametrised say it."""
    for name, module in model.named_modules():
        if "parametrizations" not in name.split(".") and (is_hooked(module) or not _is_read(module)):
            return name or type(module).__name__
    return None


def _is_read(module: nn.Module) -> bool:
    """Whether a step does what the module's forward does."""
    forward = type(module).forward
    if isinstance(module, DSMRModel):  # of one's own, with more methods, is welcome
        return forward is DSMRModel.forward and type(module)._read is DSMRModel._read
    if isinstance(module, nn.Linear):
        return forward is nn.Linear.forward and module.bias is None
    if isinstance(module, nn.LayerNorm):
        plain = module.weight is not None and module.bias is None and module.eps == EPS
        return forward is nn.LayerNorm.forward and plain
    if isinstance(module, nn.Embedding):
        return forward is nn.Embedding.forward and module.max_norm is None
    return type(module) in (Block, DSMRAttention, FeedForward, Recall, nn.Dropout, nn.ModuleList)


def _slices(sizes: list[int]) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise([0, *itertools.accumulate(sizes)])]


class Step:
    """Shows a model one more token of every stream and updates `state` in place.

    Args:
        precision: of the layers' matrices: "float32", "bfloat16" or "int8", see `stepping.weights`. They are copied:
            a step does not notice when the model learns on.
        rings: over the memories of `state`.
    """

    def __init__(self, model: DSMRModel, state: DSMRState, rings: Rings, precision: str) -> None:
        self.config, self.state, self.rings, self.precision = model.config, state, rings, precision
        self.recall = model.recall
        self.embedding = model.embedding.weight.detach().float()
        self.norm = model.norm.weight.detach().float()
        self.head = product(model.head.weight, "float32")
        self.layers = [self._layer(block) for block in blocks(model)]
        self._turns_from = -TURNS  # the first position whose rotary angles are in `_turns`
        self._turns: Rotary
        one_row_on_a_cpu = state.batch == 1 and self.embedding.device.type == "cpu"
        self._without_onednn = precision == "bfloat16" and one_row_on_a_cpu  # see `BFloat16Product`

    def _layer(self, block: Block) -> Layer:
        attention, weight = block.attention, block.attention.qkv.weight
        q_size, kv_size = attention.n_heads * attention.head_dim, attention.n_kv_heads * attention.head_dim
        if self.recall is not None:
            parts = [q_size, kv_size, kv_size]
        elif attention.position == "sinusoidal":
            parts = [q_size + kv_size, kv_size]
        else:
            parts = [q_size + 2 * kv_size]
        with torch.inference_mode(False):  # it is written to in whatever mode a step comes
            projected = self.embedding.new_empty(self.state.batch, weight.shape[0])
        return Layer(
            attention,
            block.attention_norm.weight.detach().float(),
            tuple((product(weight[some], self.precision), some) for some in _slices(parts)),
            product(block.attention.out.weight, self.precision),
            block.ffn_norm.weight.detach().float(),
            product(block.ffn.up.weight, self.precision),
            product(block.ffn.down.weight, self.precision),
            block.ffn.gated,
            projected,
        )

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens (B,) int64 -> the next ones' logits (B, vocab_size), float32; the next call overwrites them."""
        if tokens.shape != (self.state.batch,):
            raise ValueError(f"tokens must have shape ({self.state.batch},), one a stream, got {tuple(tokens.shape)}")
        if not self._without_onednn:
            return self._forward(tokens)
        enabled = torch._C._get_mkldnn_enabled()  # `torch.backends.mkldnn.flags` would also set, and warn of, TF32
        torch._C._set_mkldnn_enabled(False)
        try:
            return self._forward(tokens)
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    def next(self, tokens: Tensor, sampling: Sampling, allowed: Tensor | None, noise: Tensor) -> Tensor:
        """See `dsmr.generation.stepping.Stepper`."""
        return draw(self(tokens), sampling, allowed, noise)

    def _forward(self, tokens: Tensor) -> Tensor:
        positions = token_positions(self.rings.positions, 1, None)
        place = self._place(positions)
        labels = self._labels(tokens, positions)
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            x.add_(layer.out(self._attend(index, layer, self._normed(x, layer.attention_norm), place, labels)))
            x.add_(self._feed_forward(layer, self._normed(x, layer.ffn_norm)))
        self.rings.advance()
        return self.head(self._normed(x, self.norm))

    def _place(self, positions: Tensor) -> Rotary | Tensor | None:
        """What `DSMRAttention.place` gives for `positions` (B, 1). Rotary angles are made for many tokens at a time
        where the host knows the position."""
        attention, known = self.layers[0].attention, self.rings.known_position
        if attention.position != "rope" or known is None:
            return attention.place(positions)
        if not self._turns_from <= known < self._turns_from + TURNS:
            self._turns_from = known - known % TURNS
            tokens = torch.arange(self._turns_from, self._turns_from + TURNS, device=positions.device)
            ahead = attention.place(tokens[None])
            assert isinstance(ahead, Rotary)
            self._turns = ahead
        at = known - self._turns_from
        return Rotary(self._turns.cos[:, :, at : at + 1], self._turns.sin[:, :, at : at + 1])

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, eps=EPS)

    def _labels(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """The labels of query and key, (B, d_model) each, where the model has them; notes the token for the next."""
        if self.recall is None:
            return None
        recent = torch.cat([self.state.recent, tokens[:, None]], 1)
        self.state.recent.copy_(recent[:, 1:])
        heard = F.embedding(recent, self.embedding).to(self.recall.project.weight.dtype)
        q_label, k_label = self.recall(heard, positions)
        return q_label[:, 0].float(), k_label[:, 0].float()

    def _project(
        self, layer: Layer, x: Tensor, place: Rotary | Tensor | None, labels: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """(B, (Hq + 2 Hkv) * D): queries, keys and values side by side."""
        moved = x + place[:, 0] if isinstance(place, Tensor) else x
        if labels is not None:
            inputs = [moved + labels[0], moved + labels[1], x]
        else:
            inputs = [moved, x][: len(layer.qkv)]
        for (take, some), source in zip(layer.qkv, inputs, strict=True):
            layer.projected[:, some] = take(source)
        return layer.projected

    def _attend(
        self,
        index: int,
        layer: Layer,
        x: Tensor,
        place: Rotary | Tensor | None,
        labels: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention before its output projection: (B, Hq * D)."""
        heads = self._project(layer, x, place, labels).unflatten(-1, (-1, layer.attention.head_dim))
        turn = place if isinstance(place, Rotary) else None
        return self.rings.attend(index, heads, turn).flatten(1)

    def _feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        inner = layer.up(x)
        if layer.gated:
            gate, inner = inner.chunk(2, -1)
            return layer.down(F.silu(gate) * inner)
        return layer.down(F.gelu(inner))
