"""Models of one size that decode token by token: ours in each precision, and what people use instead.

Each decoder is made with a context of tokens that it has read, checked against its own forward pass over the whole
sequence, and then asked for one more token at a time. All weights are random: they do not change the work.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsmr.generation.stepping import PlainStep, stepper
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel

LAYERS, WIDTH, HEADS, VOCABULARY, SEGMENT = 8, 512, 8, 512, 512
SCHEDULE = MemorySchedule.two_scale(layers=LAYERS, long=2048, short=512, n_long=2)
FEED_FORWARD = 4 * WIDTH
CHECKED = 6  # tokens
# Of the largest logit: float32 is held to 1e-4 absolute; reduced weights change every logit a little.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.05}


class Decoder(Protocol):
    parameters: int

    def step(self, token: int) -> Tensor:
        """Show one more token; the next one's logits (VOCABULARY,)."""


def config(segment_length: int = SEGMENT) -> DSMRConfig:
    """The model of the comparison: 25 million parameters."""
    return DSMRConfig(VOCABULARY, SCHEDULE, d_model=WIDTH, n_heads=HEADS, segment_length=segment_length)


class Ours:
    """`dsmr.generation.stepping` in a precision; "plain" is the model called token by token. `memory` is the dtype of
    keys and values; the context is read before they are brought into it."""

    def __init__(
        self, context: Tensor, precision: str, model: DSMRModel | None = None, memory: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        self.model = (model or DSMRModel(config())).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.state = self.model.new_state(1)
        with torch.no_grad():
            self.model(context[None], self.state)
        self.state = self.state.to(dtype=memory)
        self._precision = precision
        self._step = self._stepper()

    def _stepper(self) -> Any:
        if self._precision == "plain":
            return PlainStep(self.model, self.state)
        return stepper(self.model, self.state, self._precision)

    def set_forward(self, tokens: int) -> None:
        """Be `tokens` further on in the piece, with what is remembered as it is."""
        for memory in self.state.memories:
            memory.position += tokens
        self._step = self._stepper()  # it counts for itself

    def step(self, token: int) -> Tensor:
        return self._step(torch.tensor([token]))[0]

    def whole(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens[None]).logits[0]


class XTransformers:
    """x-transformers' decoder with its key-value cache, called as its own `generate` calls it."""

    def __init__(self, context: Tensor) -> None:
        from x_transformers import Decoder as Layers
        from x_transformers import TransformerWrapper

        torch.manual_seed(0)
        layers = Layers(
            dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, rotary_pos_emb=True, attn_flash=True
        )
        self.model = TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=1 << 16, use_abs_pos_emb=False, attn_layers=layers
        ).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.heard = context[None]
        with torch.no_grad():
            _, self.cache = self.model(self.heard, return_intermediates=True)

    def step(self, token: int) -> Tensor:
        self.heard = torch.cat([self.heard, torch.tensor([[token]])], 1)
        with torch.no_grad():
            logits, self.cache = self.model(self.heard, return_intermediates=True, cache=self.cache)
        return logits[0, -1]

    def whole(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens[None])[0]


class HuggingFaceLlama:
    """transformers' Llama with its dynamic cache; the gated feed-forward layer has as many parameters as ours."""

    def __init__(self, context: Tensor) -> None:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * FEED_FORWARD // 3,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": 1 << 16,
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
        }
        self.model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.cache = DynamicCache()
        with torch.no_grad():
            self.model(context[None], past_key_values=self.cache, use_cache=True)

    def step(self, token: int) -> Tensor:
        with torch.no_grad():
            out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True)
        return out.logits[0, -1]

    def whole(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(tokens[None]).logits[0]


@dataclass(frozen=True)
class Contender:
    """A decoder by name; `needs` are the packages that it takes beside PyTorch."""

    name: str
    make: Callable[[Tensor], Any]
    tolerance: float
    needs: tuple[str, ...] = ()
    ours: bool = False

    @property
    def missing(self) -> str | None:
        """How to get it, where it is not installed."""
        if all(importlib.util.find_spec(package) is not None for package in self.needs):
            return None
        return f"{self.name} is not installed: pip install 'dsmr[bench]'"


def _ours(precision: str, memory: torch.dtype = torch.float32) -> Callable[[Tensor], Ours]:
    return lambda context: Ours(context, precision, memory=memory)


def _exported(weights: str, memory: str) -> Callable[[Tensor], Any]:
    def make(context: Tensor) -> Any:
        from benchmarks.parts.onnx_decoders import OursExported

        return OursExported(context, weights, memory)

    return make


def _llama(weights: str) -> Callable[[Tensor], Any]:
    def make(context: Tensor) -> Any:
        from benchmarks.parts.onnx_decoders import OnnxLlama

        return OnnxLlama(context, weights)

    return make


ONNX = ("onnx", "onnxruntime")
CONTENDERS = (
    Contender("dsmr int8", _ours("int8"), TOLERANCE["int8"], ours=True),
    Contender("dsmr int8, memory bfloat16", _ours("int8", torch.bfloat16), TOLERANCE["int8"], ours=True),
    Contender("dsmr int8, memory int8", _ours("int8", torch.int8), TOLERANCE["int8"], ours=True),
    Contender("dsmr bfloat16", _ours("bfloat16"), TOLERANCE["bfloat16"], ours=True),
    Contender("dsmr float32", _ours("float32"), TOLERANCE["float32"], ours=True),
    Contender("dsmr, plain calls", _ours("plain"), TOLERANCE["float32"], ours=True),
    Contender("dsmr export int8, memory int8", _exported("int8", "int8"), TOLERANCE["int8"], ONNX, ours=True),
    Contender("dsmr export int8", _exported("int8", "float32"), TOLERANCE["int8"], ONNX, ours=True),
    Contender("dsmr export float32", _exported("float32", "float32"), TOLERANCE["float32"], ONNX, ours=True),
    Contender("ONNX Runtime Llama int8", _llama("int8"), TOLERANCE["int8"], (*ONNX, "transformers")),
    Contender("ONNX Runtime Llama", _llama("float32"), 1e-3, (*ONNX, "transformers")),
    Contender("Hugging Face Llama", HuggingFaceLlama, 1e-3, ("transformers",)),
    Contender("x-transformers", XTransformers, 1e-3, ("x_transformers",)),
)


def ready(contender: Contender, context: Tensor) -> Any:
    """The decoder behind `context`, after its next tokens agreed with its own pass over the whole sequence."""
    decoder = contender.make(context)
    tokens = torch.randint(VOCABULARY, (CHECKED,), generator=torch.Generator().manual_seed(1))
    made = torch.stack([decoder.step(int(token)).clone() for token in tokens])
    whole = decoder.whole(torch.cat([context, tokens]))[-CHECKED:]
    err = float((made - whole).abs().max())
    allowed = contender.tolerance * (1 if contender.tolerance < 0.01 else float(whole.abs().max()))
    assert err <= allowed, f"{contender.name}: token by token differs from the whole pass by {err:.3g} > {allowed:.3g}"
    return decoder


def random_context(tokens: int) -> Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
