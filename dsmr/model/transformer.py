"""The DSMR Transformer: pre-norm blocks, each with attention over its own memory. Reads like the paper's figure.

tokens -> embedding -> [ x + attention(norm(x), memory) -> x + ffn(norm(x)) ] * layers -> norm -> logits
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, save_tensors, write_json
from dsmr.console.rounding import as_now
from dsmr.console.schema import check_fields
from dsmr.console.seal import check_seal
from dsmr.model.altered import weight_of
from dsmr.model.attention import DSMRAttention, side_by_side
from dsmr.model.config import DSMRConfig
from dsmr.model.positions import Rotary, token_positions
from dsmr.model.recall import Recall
from dsmr.model.state import DSMRState
from dsmr_kernels import KVMemory, MemorySnapshot

SMALL = 2**22  # parameters whose memory is not worth a look at the file first


@dataclass
class DSMROutput:
    """logits (B, T, vocab_size); loss, if targets were given: a scalar, or (B, T) with reduction="none"; the state."""

    logits: Tensor
    loss: Tensor | None
    state: DSMRState


class FeedForward(nn.Module):
    """Two layers with GELU, or the gated form with SiLU (Shazeer, 2020)."""

    def __init__(self, config: DSMRConfig) -> None:
        super().__init__()
        gated = config.ffn == "swiglu"
        self.up = nn.Linear(config.d_model, config.inner * (2 if gated else 1), bias=False)
        self.down = nn.Linear(config.inner, config.d_model, bias=False)
        self.gated = gated

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, -1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """One layer: attention over memory and segment, then the feed-forward layer, each normed before and added after."""

    def __init__(self, config: DSMRConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, bias=False)
        self.attention = DSMRAttention(
            config.d_model,
            config.n_heads,
            horizon=config.schedule.horizons[layer],
            n_kv_heads=config.schedule.heads(config.n_heads)[layer],
            position=config.position,
            segment_length=config.segment_length,
            visibility=config.visibility,
            rope_base=config.rope_base,
            retention=config.schedule.retention[layer],
            sample=layer,
        )
        self.ffn_norm = nn.LayerNorm(config.d_model, bias=False)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.compiled = False

    def forward(
        self,
        x: Tensor,
        memory: KVMemory | MemorySnapshot,
        place: Rotary | Tensor | None,
        labels: tuple[Tensor, Tensor] | None,
        piece_start: Tensor | None,
        segment_offset: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d_model) -> x of the next layer, and the new k and v; arguments as of `DSMRAttention.attend`."""
        self.attention.check_memory(memory, x.shape[0], segment_offset)
        compiled = self.compiled and self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        before, after = _compiled() if compiled else (Block.before, Block.after)
        q, k, v = before(self, x, place, labels, memory.dtype)
        found = self.attention.look(q, k, v, memory, piece_start=piece_start, segment_offset=segment_offset)
        return after(self, x, found), k, v

    def before(
        self, x: Tensor, place: Rotary | Tensor | None, labels: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer before attention: x -> q, k and v, as of `DSMRAttention.project`."""
        return self.attention.project(self.attention_norm(x), place, labels, dtype)

    def after(self, x: Tensor, found: Tensor) -> Tensor:
        """The layer after attention: x and what attention found, (B, Hq, T, head_dim) -> x of the next layer."""
        out = self.attention.out
        x = x + self.dropout(out(side_by_side(found, out)))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`Block.before` and `Block.after`, compiled: once for all layers that are alike. What lies between, attention over
    a memory that is written in place, stays as it is."""
    return torch.compile(Block.before, dynamic=False), torch.compile(Block.after, dynamic=False)


def _within(piece_start: Tensor | None, part: slice) -> Tensor | None:
    """`piece_start` of a part of the call, as a call of its own has it."""
    if piece_start is None or part.start == 0:
        return piece_start if piece_start is None else piece_start[:, part]
    return piece_start[:, part] - part.start


def _check_held(config: DSMRConfig, path: Path) -> None:
    """`UserError` if `path` holds far fewer numbers than such a model has: said before memory is taken for it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return  # reading it says what is wrong with it
    if config.parameters > max(2 * held, SMALL):  # else the names and shapes are compared, which says more
        raise UserError(
            f"{path} does not fit its config.json: that is a model of {config.parameters:,} parameters, and {held:,} "
            "are there"
        )


class DSMRModel(nn.Module):
    """A Transformer that reads whole pieces, segment by segment, with a memory horizon for every layer.

    Args:
        config: its shape and meaning.
        checkpoint_layers: keep only each layer's input for the backward, which computes the layer once more (Chen et
            al., 2016): about a third more time for the activations of one layer instead of all. Gradients stay the
            same: each layer computes again from a snapshot of its memory.
        compile_layers: in training, let `torch.compile` fuse what each layer does before and after its attention; needs
            a compiler where the model trains. Results differ by rounding only, and evaluation stays as it is.
    """

    def __init__(self, config: DSMRConfig, *, checkpoint_layers: bool = False, compile_layers: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_layers = checkpoint_layers
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.recall = Recall(config.recall, config.d_model) if config.recall else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.schedule.layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        for block in self._blocks():
            block.compiled = compile_layers
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights; what is added to the residual stream is scaled down with depth (Radford et al., 2019)."""
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("attention.out.weight", "ffn.down.weight"))
                nn.init.normal_(parameter, std=std / (2 * len(self.blocks)) ** 0.5 if residual else std)
        if self.recall is not None:  # equal labels should match from the start
            for block in self._blocks():
                block.attention.match_equal_inputs()

    def new_state(
        self,
        batch: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        aligned: bool = False,
        apart: bool = False,
    ) -> DSMRState:
        """The state of `batch` streams that have seen nothing.

        Args:
            dtype: of keys and values; default: what the projections come out in (autocast's dtype where it is on).
            aligned: every call will begin with a segment, so the memories hold exactly the schedule's budget;
                otherwise each has room for the segment in progress too, and calls of any size give the same outputs.
            apart: for training: layers that keep a random sample keep another in each row, so that nothing can be
                learnt of one sample. Otherwise a row's results do not depend on its place in the batch.
        """
        memories = [block.attention.new_memory(batch, device, dtype, aligned, apart) for block in self._blocks()]
        shape = (batch, self.config.recall)
        recent = torch.zeros(shape, dtype=torch.int64, device=device or weight_of(self.embedding).device)
        return DSMRState(memories, recent, aligned=aligned)

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block

    def forward(
        self,
        tokens: Tensor,
        state: DSMRState | None = None,
        *,
        targets: Tensor | None = None,
        piece_start: Tensor | None = None,
        segment_offset: Tensor | None = None,
        reduction: str = "mean",
    ) -> DSMROutput:
        """Read the next tokens of every stream.

        Args:
            tokens: (B, T) int64, any T; a call longer than a segment is a whole-piece pass. It is read segment by
                segment where a layer keeps others than the newest tokens.
            state: from `new_state` or the last call, updated in place; None = streams that have seen nothing.
            targets: (B, T) int64, the token after each; -100 = no target.
            piece_start: (B, T) int32, for each token the index in this call of its piece's first token; negative = the
                piece began before the call. None = all tokens belong to the pieces in progress.
            segment_offset: (B,) int64, how far each row is into its segment, for rows whose segments do not begin
                together, such as texts that are padded on the left; whoever gives it counts on from call to call.
                None = all are as far as the state is.
            reduction: "mean" over the targets, or "none" for the loss of each (0 where there is no target).

        Raises:
            ValueError: if shapes or the state do not fit.
        """
        if tokens.dim() != 2:
            raise ValueError(f"tokens must have shape (batch, tokens), got {tuple(tokens.shape)}")
        if state is None:
            state = self.new_state(tokens.shape[0])
        if state.batch != tokens.shape[0]:
            raise ValueError(f"the state holds {state.batch} streams, but tokens has {tokens.shape[0]} rows")
        if len(state) != len(self.blocks):
            raise ValueError(f"the state holds {len(state)} layers, but the model has {len(self.blocks)}")
        for name, given in (("targets", targets), ("piece_start", piece_start)):
            if given is not None and given.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens, {tuple(tokens.shape)}, got {tuple(given.shape)}"
                )
        if reduction not in ("mean", "none"):
            raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
        if state.aligned and state.offset:
            raise ValueError(
                f"an aligned state takes calls that begin with a segment, but it is {state.offset} tokens into one; "
                "use new_state(..., aligned=False) for calls of any size"
            )
        if segment_offset is not None and (state.aligned or not self.config.schedule.newest):
            raise ValueError(
                "segment_offset of each row needs a state that is not aligned, and a schedule that keeps the newest "
                f"tokens, but this one is {self.config.schedule}"
            )
        if state.offset >= self.config.segment_length:
            length = self.config.segment_length
            raise ValueError(f"the state is {state.offset:,} tokens into a segment, but the model's have {length:,}")
        parts = self._parts(tokens.shape[1], state.offset)
        read = [self._read(tokens[:, part], state, _within(piece_start, part), segment_offset) for part in parts]
        x = read[0] if len(read) == 1 else torch.cat(read, 1)
        logits = self.head(self.norm(x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
            loss = loss.view(targets.shape) if reduction == "none" else loss
        return DSMROutput(logits, loss, state)

    def _parts(self, tokens: int, offset: int) -> list[slice]:
        """What is read at once: everything, unless what a segment remembers is not known before the last is over."""
        if self.config.schedule.newest or not tokens:
            return [slice(0, tokens)]
        length = self.config.segment_length
        ends = [0, *range(length - offset, tokens, length), tokens]
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    def _read(
        self, tokens: Tensor, state: DSMRState, piece_start: Tensor | None, segment_offset: Tensor | None
    ) -> Tensor:
        """The layers: tokens (B, T) -> (B, T, d_model), before the last norm; the state takes the tokens in."""
        memories = state.memories
        positions = token_positions(state.position, tokens.shape[1], piece_start)
        blocks = list(self._blocks())
        place = blocks[0].attention.place(positions)
        x = self.embedding(tokens)
        before, labels = state.recent, None
        if self.recall is not None:
            labels = self.recall(torch.cat([self.embedding(before), x], 1), positions)
        x = self.dropout(x)
        where = (piece_start, state.offset if segment_offset is None else segment_offset)
        again = self.checkpoint_layers and torch.is_grad_enabled()
        new = []
        for block, memory in zip(blocks, memories, strict=True):
            if again:
                given = x, memory.snapshot(), place, labels, *where
                x, k, v = checkpoint(block, *given, use_reentrant=False, **as_now())
            else:
                x, k, v = block(x, memory, place, labels, *where)
            new.append((k, v))
        state.recent = torch.cat([before, tokens], 1)[:, tokens.shape[1] :]
        state.take(new, piece_start, self.config.segment_length, later=torch.is_grad_enabled())
        return x

    def generate(self, prompt: Any, **options: Any) -> Iterator[int]:
        """Continue `prompt` (token ids) token by token, without end unless told; see `dsmr.generation.stream`."""
        from dsmr.generation.player import stream

        return stream(self, prompt, **options)

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        `state_dict`: the weights where the model itself holds but a part of them, such as one rank of several.
        """
        held = self.state_dict() if state_dict is None else state_dict
        weights = {name: tensor.detach().contiguous() for name, tensor in held.items()}
        if self.config.tie_embeddings:
            del weights["head.weight"]
        save_tensors(Path(directory) / "model.safetensors", weights, {"format": "pt"})
        write_json(Path(directory) / "config.json", self.config.to_dict(), sealed=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], device: torch.device | str = "cpu") -> "DSMRModel":
        """Read what `save_pretrained` wrote; `UserError` if it is missing, damaged or of another shape."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(directory) / "model.safetensors"
        values = read_json(Path(directory) / "config.json")
        try:
            if isinstance(values, dict):
                check_fields(values, DSMRConfig, Path(directory) / "config.json")
            config = DSMRConfig.from_dict(values)
            _check_held(config, path)
            model = cls(config)
        except (ValueError, TypeError, AttributeError, RuntimeError, MemoryError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{Path(directory) / 'config.json'} does not describe a DSMR model: {error}") from error
        try:
            weights = load_file(path, device=str(device))
            check_seal(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as a model's weights: {error}") from error
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if model.config.tie_embeddings:
            del expected["head.weight"]
        for name in sorted(set(expected) | set(weights)):
            if name not in weights or name not in expected or weights[name].shape != expected[name]:
                found = tuple(weights[name].shape) if name in weights else "nothing"
                wanted = tuple(expected[name]) if name in expected else "nothing"
                raise UserError(f"{path} does not fit its config.json: {name} has {found}, expected {wanted}")
        model.load_state_dict(weights, strict=False)
        return model.to(device)
