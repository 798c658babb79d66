"""Hypothesis draws calls of `memory_attention` from the whole argument space; every backend is tested with them."""

from typing import Any

import torch
from attention_cases import pieces
from hypothesis import strategies as st

from dsmr_kernels.cases import Case, random_case

LAYOUTS = ("contiguous", "tokens before heads", "padded head_dim", "last dimension strided")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values at other strides."""
    if layout == "tokens before heads":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded head_dim":
        return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]
    if layout == "last dimension strided":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def _piece_starts(draw: st.DrawFn, batch: int, tokens: int) -> torch.Tensor:
    rows = []
    for _ in range(batch):
        row, start = [], draw(st.sampled_from([-1, 0]))
        for token in range(tokens):
            start = token if token and draw(st.integers(0, 9)) == 0 else start
            row.append(start)
        rows.append(row)
    return pieces(*rows)


@st.composite
def attention_calls(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    head_dims: tuple[int, ...] = (1, 8, 10),
    most_tokens: int = 40,
    most_heads: int = 6,
    more: bool = False,
) -> Case:
    """Any call: sizes, memory, visibility, pieces, ALiBi, bias, layouts; at most `most_heads` rows times heads.

    With `more` also a memory in int8, values of another width, offsets of the rows' own, learned sinks, a gradient of
    the log-sum-exp, and gradients that nobody asks for.
    """
    kv_heads = draw(st.integers(1, 2))
    group = draw(st.integers(1, min(3, most_heads // kv_heads)))
    heads = kv_heads * group
    batch = draw(st.integers(1, max(1, min(3, most_heads // heads))))
    tokens = draw(st.integers(1, most_tokens))
    queries = draw(st.integers(0, tokens))
    length = draw(st.none() | st.integers(1, 20) | st.just(1 << 40))
    options = {
        "horizon": draw(st.integers(0, 40) | st.just(1 << 40)),
        "segment_length": length,
        "segment_offset": draw(st.integers(0, min(length or 20, 20) - 1) | st.just((length or 1 << 40) - 1)),
        "visibility": draw(st.sampled_from(["segment", "sliding"])),
        "detach_segments": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["piece_start"] = _piece_starts(draw, batch, tokens)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    biased = draw(st.booleans())
    extras: dict[str, Any] = {}
    if more:
        extras["stored"] = draw(st.sampled_from([None, torch.int8]))
        extras["v_head_dim"] = draw(st.none() | st.sampled_from([16, 24, 40]))
        extras["learning"] = draw(st.sampled_from(["q", "k", "v", "qk", "kv", "qkv"])) + "b" * biased
        extras["lse_gradient"] = extras["learning"] != "v" and draw(st.booleans())  # of v lse does not depend
        if draw(st.booleans()):
            logits = st.lists(st.sampled_from([-50.0, -1.0, 0.0, 2.0, 50.0]), min_size=heads, max_size=heads)
            options["sinks"] = torch.tensor(draw(logits))
            extras["learning"] += "s"
        if draw(st.booleans()):
            most = min(length or 20, 20) - 1
            options["segment_offset"] = torch.tensor(
                draw(st.lists(st.integers(0, most), min_size=batch, max_size=batch))
            )
    case = random_case(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        tokens=tokens,
        head_dim=draw(st.sampled_from(head_dims)),
        capacity=draw(st.integers(0, 30)),
        seen=draw(st.none() | st.lists(st.integers(0, 70), min_size=batch, max_size=batch)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 1000)),
        biased=biased,
        **extras,
        **options,
    )
    for name in ("q", "k", "v", "grad"):
        setattr(case, name, laid_out(getattr(case, name), draw(st.sampled_from(LAYOUTS))))
    return case
