"""Attention of other people's models, read: where its projections lie, and what it does with them.

One reader for each layout gives the same `HostAttention`, of which a `DSMRAttention` is made. What that layer cannot do
is refused here in a sentence that says what it is, so that nothing carries over silently changed. Modules of other
packages are known by the names of their classes: nothing is imported for them that is not there already.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsmr.model.altered import is_hooked

Projection = tuple[Tensor, Tensor | None]
"""A weight (out_features, in_features), and a bias (out_features,) or None."""

LLAMAS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
KNOWN = (
    "nn.MultiheadAttention, the attention of a Llama, Mistral, Qwen2, Qwen3 or GPT-2 of Hugging Face Transformers, or "
    "c_attn, c_proj and n_head as nanoGPT has them"
)
REPRESENTABLE = ("default", "linear", "llama3")  # rotary embeddings that are angles in proportion to the position
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)  # the latter is in `nn.MultiheadAttention`
NANO = {"c_attn", "c_proj", "attn_dropout", "resid_dropout"}


@dataclass(frozen=True)
class HostAttention:
    """What a host's attention is.

    Attributes:
        name: as a sentence calls it.
        q, k, v, out: its projections. Query head h reads KV head h // (n_heads / n_kv_heads).
        norms: weights (head_dim,) of the RMS norms of queries and of keys, and their eps.
        scale: of the scores; None = head_dim ** -0.5.
        rope: the arguments `rope_base`, `rotary_dim`, `rope_frequencies` of `DSMRAttention`; None = it places nothing.
        window: tokens that a query sees at most, itself included; None = all.
        dropout: of its output.
    """

    name: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q: Projection
    k: Projection
    v: Projection
    out: Projection
    norms: tuple[Tensor, Tensor, float] | None = None
    scale: float | None = None
    rope: Mapping[str, Any] | None = None
    window: int | None = None
    dropout: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """Of `DSMRAttention`, all but whom it sees."""
        biased = [bias is not None for _, bias in (self.q, self.k, self.v, self.out)]
        if len(set(biased[:3])) > 1 or (biased[3] and not biased[0]):
            raise ValueError(
                f"{self.name} has biases of (q, k, v, out) = {tuple(biased)}, but a layer has them all, or those of q, "
                "k and v, or none"
            )
        return {
            "d_model": self.q[0].shape[1],
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "bias": True if biased[3] else "qkv" if biased[0] else False,
            "qk_norm": self.norms is not None,
            **({} if self.norms is None else {"norm_eps": self.norms[2]}),
            "dropout": self.dropout,
            "scale": self.scale,
            "position": "none" if self.rope is None else "rope",
            **(self.rope or {}),
        }

    def fitting(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """`options`, if none of them is another than what the weights were made for."""
        own = self.arguments()
        for name in ("d_model", "n_heads", "n_kv_heads", "head_dim", "bias", "qk_norm"):
            if name in options and options[name] not in (None, own[name]):
                raise ValueError(
                    f"{name} is {own[name]!r} in {self.name}, which was trained with it: {options[name]!r}"
                )
        fixed = dict.fromkeys(self.rope or {}) | {"rope_base": 10000.0} if self.rope else {}
        given = {name: value for name, value in options.items() if name not in own or value is not None}
        return (fixed if options.get("position", own["position"]) != own["position"] else {}) | given

    def check_horizon(self, horizon: int, visibility: str) -> None:
        """`ValueError` if a layer with this horizon saw more than the window of the host."""
        if self.window is not None and (visibility != "sliding" or horizon > self.window - 1):
            raise ValueError(
                f"{self.name} has a sliding window of {self.window} tokens, the query's own included: visibility must "
                f'be "sliding" and the horizon at most {self.window - 1}, got {visibility!r} and {horizon}'
            )

    @torch.no_grad()
    def copy_into(self, layer: Any) -> None:
        """Give `layer`, a `DSMRAttention` made with `arguments`, these weights; it goes where they lie."""
        layer.to(device=self.q[0].device, dtype=self.q[0].dtype)
        layer.qkv.weight.copy_(torch.cat([weight for weight, _ in (self.q, self.k, self.v)]))
        layer.out.weight.copy_(self.out[0])
        if layer.qkv.bias is not None:
            layer.qkv.bias.copy_(torch.cat([bias for _, bias in (self.q, self.k, self.v) if bias is not None]))
        if self.out[1] is not None:
            layer.out.bias.copy_(self.out[1])
        learnt = {weight.requires_grad for weight, _ in (self.q, self.k, self.v)}
        if len(learnt) > 1:
            raise ValueError(f"{self.name} has some of its projections of q, k and v frozen: all or none can be")
        layer.qkv.requires_grad_(learnt.pop())
        layer.out.requires_grad_(self.out[0].requires_grad)
        biases = {bias.requires_grad for _, bias in (self.q, self.k, self.v) if bias is not None}
        if len(biases) > 1:
            raise ValueError(f"{self.name} has some of its biases of q, k and v frozen: all or none can be")
        if layer.qkv.bias is not None:  # frozen apart from the weights, or learnt alone
            layer.qkv.bias.requires_grad_(biases.pop())
        if self.out[1] is not None:
            layer.out.bias.requires_grad_(self.out[1].requires_grad)
        for norm, weight in zip((layer.q_norm, layer.k_norm), (self.norms or ())[:2], strict=False):
            norm.weight.copy_(weight)
            norm.requires_grad_(weight.requires_grad)


def is_known(module: nn.Module) -> bool:
    """Whether there is a reader for such a module; it may still refuse this one."""
    return _reader(module) is not None


def read_attention(module: nn.Module, *, transposed: bool = False) -> HostAttention:
    """What the attention of another model is.

    Args:
        transposed: the caller sees to inputs (tokens, batch, width), where `nn.MultiheadAttention` has them so.

    Raises:
        TypeError: if there is no reader for such a module, or its projections are no plain ones.
        ValueError: if it does what a `DSMRAttention` cannot do.
    """
    reader = _reader(module)
    if reader is None:
        raise TypeError(f"the projections of a {type(module).__name__} cannot be read: what can is {KNOWN}")
    if isinstance(module, nn.MultiheadAttention) and not (module.batch_first or transposed):
        raise ValueError(
            "nn.MultiheadAttention(batch_first=False) takes (tokens, batch, width), but this layer (batch, tokens, "
            "width): set batch_first = True where its inputs are so; replace_attention sees to it"
        )
    for name, part in module.named_modules():
        if is_hooked(part, learning=True):
            which = f"{name} of {type(module).__name__}" if name else type(module).__name__
            raise ValueError(f"{which} has hooks, or a forward of its own, which nobody would call any more")
    with torch.enable_grad():  # parts of a frozen weight are frozen, and of another are not, whatever the mode outside
        return reader(module)


def _reader(module: nn.Module) -> Callable[[Any], HostAttention] | None:
    if type(module) is nn.MultiheadAttention:  # a subclass may do something else
        return _multihead
    name = type(module).__name__
    if type(module).__module__.startswith("transformers."):
        return _llama if name in LLAMAS else _gpt2 if name == "GPT2Attention" else None
    return _nano if all(hasattr(module, part) for part in ("c_attn", "c_proj", "n_head")) else None


def _refuse(name: str, options: Mapping[str, tuple[Any, str]]) -> None:
    """`ValueError` for the first of the options that is set; with each stands what to do, or why not."""
    for option, (value, advice) in options.items():
        if value:
            raise ValueError(f"{name} has {option} ({value}), which a DSMRAttention cannot have: {advice}")


NO_WEIGHTS = "the attention weights that it drops are never held; set it to 0, dropout of the output carries over"


def _plain(name: str, part: str, module: nn.Module) -> Projection:
    """The weights of a projection that does nothing else, (out_features, in_features) whatever its kind; an adapter in
    its place may have the same name."""
    kind = type(module)
    if kind not in LINEARS and not (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")):
        raise TypeError(
            f"{part} of {name} must be a plain projection, got {kind.__module__}.{kind.__name__}; merge adapters first"
        )
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if kind not in LINEARS:  # a Conv1D holds its weight the other way round
        weight = weight.T
    return weight, bias if isinstance(bias, Tensor) else None


def _thirds(weight: Tensor, bias: Tensor | None, sizes: list[int]) -> list[Projection]:
    """q, k and v of a fused projection."""
    biases = bias.split(sizes) if bias is not None else [None] * len(sizes)
    return list(zip(weight.split(sizes), biases, strict=True))


def _multihead(module: nn.MultiheadAttention) -> HostAttention:
    name, width = "nn.MultiheadAttention", module.embed_dim
    _refuse(
        name,
        {
            "dropout": (module.dropout, NO_WEIGHTS),
            "add_bias_kv": (module.bias_k is not None, "a key that is no token"),
            "add_zero_attn": (module.add_zero_attn, "a key that is no token"),
            "kdim or vdim": ((module.kdim, module.vdim) != (width, width), "it is made for cross-attention"),
        },
    )
    out = _plain(name, "out_proj", module.out_proj)
    q, k, v = _thirds(module.in_proj_weight, module.in_proj_bias, [width] * 3)
    return HostAttention(name, module.num_heads, module.num_heads, module.head_dim, q, k, v, out)


def _check_transformers(name: str, module: Any) -> None:
    config = module.config
    _refuse(
        name,
        {
            "is_causal=False": (not module.is_causal, "it is made for cross-attention, or looks ahead"),
            "attn_logit_softcapping": (getattr(config, "attn_logit_softcapping", None), "scores are not capped"),
            "attention dropout": (
                module.attn_dropout.p if hasattr(module, "attn_dropout") else module.attention_dropout,
                NO_WEIGHTS,
            ),
        },
    )


def _llama(module: Any) -> HostAttention:
    name = type(module).__name__
    _check_transformers(name, module)
    q, k, v, out = (_plain(name, part, getattr(module, part)) for part in ("q_proj", "k_proj", "v_proj", "o_proj"))
    dim, norms = module.head_dim, None
    if hasattr(module, "q_norm"):
        norms = module.q_norm.weight, module.k_norm.weight, float(module.q_norm.variance_epsilon)
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(module.config, "sliding_window", 0)
    return HostAttention(
        name,
        q[0].shape[0] // dim,
        k[0].shape[0] // dim,
        dim,
        q,
        k,
        v,
        out,
        norms=norms,
        scale=float(module.scaling),
        rope=_rope(name, module.config),
        window=window or None,
    )


def _rope(name: str, config: Any) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    if kind not in REPRESENTABLE:
        raise ValueError(
            f"{name} has a rotary embedding of type {kind!r}, and a layer can take over {', '.join(REPRESENTABLE)}: "
            "angles in proportion to the position"
        )
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = {"rope_base": float(parameters["rope_theta"])}
    turned = int(dim * parameters.get("partial_rotary_factor", 1.0))
    rotary |= {"rotary_dim": turned} if turned != dim else {}
    if kind == "default":
        return rotary
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # there, since the module is one of its own

    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert factor == 1
    return rotary | {"rope_frequencies": tuple(frequencies.tolist())}


def _gpt2(module: Any) -> HostAttention:
    name = type(module).__name__
    _check_transformers(name, module)
    (fused, bias), (out, out_bias) = (_plain(name, part, getattr(module, part)) for part in ("c_attn", "c_proj"))
    q, k, v = _thirds(fused, bias, [module.embed_dim] * 3)
    return HostAttention(
        name,
        module.num_heads,
        module.num_heads,
        module.head_dim,
        q,
        k,
        v,
        (out, out_bias),
        scale=float(module.scaling),
        dropout=module.resid_dropout.p,
    )


def _nano(module: Any) -> HostAttention:
    name = type(module).__name__
    others = {child for child, _ in module.named_children()} - NANO
    others |= {own for own, _ in module.named_parameters(recurse=False)}
    _refuse(name, {"more parts than nanoGPT's": (sorted(others), f"what can be read is {', '.join(sorted(NANO))}")})
    dropped = getattr(module, "attn_dropout", None)
    after = getattr(module, "resid_dropout", None)
    if type(after) not in (nn.Dropout, nn.Identity, type(None)):
        raise TypeError(f"resid_dropout of {name} must be an nn.Dropout, got {type(after).__name__}")
    for option in (getattr(dropped, "p", 0), getattr(module, "dropout", 0) if dropped is None else 0):
        _refuse(name, {"attention dropout": (option, NO_WEIGHTS)})
    fused, bias = _plain(name, "c_attn", module.c_attn)
    out = _plain(name, "c_proj", module.c_proj)
    width, heads = fused.shape[1], module.n_head
    if fused.shape[0] != 3 * width or width % heads:
        raise ValueError(
            f"c_attn of {name} must go from a width, a multiple of n_head = {heads}, to three times that width, got "
            f"{width} to {fused.shape[0]}"
        )
    q, k, v = _thirds(fused, bias, [width] * 3)
    return HostAttention(name, heads, heads, width // heads, q, k, v, out, dropout=getattr(after, "p", 0.0))
