"""What a CPU multiplies fast, and the one table that follows from it: which engine makes a pass, and in which dtype.

Where a processor has no products of a narrow dtype PyTorch makes them element by element, up to twenty times slower
than in float32: there attention computes in float32 and rounds its results, unless a kernel is as fast without. So it
does everywhere for a row that a new piece cuts, see `GRAIN` in `products`. What was measured on one machine may stand
in the table's place, see `tuned`.
"""

import functools
import os
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch

Pass = Literal["forward", "backward"]
Engine = Literal["flash", "products"]


class Choice(NamedTuple):
    """Who makes a pass, and in which dtype it is computed. `flash` does where it serves the call; "products" do
    otherwise, in the dtype of the backward's choice."""

    engine: Engine
    dtype: torch.dtype


Key = tuple[torch.dtype, Pass]

# What a processor multiplies fast beyond float32, the best first: the name, and the flag by which PyTorch knows it.
_NARROW = (("AMX", "amx_bf16"), ("AVX-512 BF16", "avx512_bf16"), ("ARM BF16", "bf16"))
# Which of them oneDNN may not use when it is held to an instruction set of this name.
_HELD_SHORT = {
    "AMX": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
            "AVX512_CORE_FP16"),
    "AVX-512 BF16": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    "AVX-512": ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
}  # fmt: skip

_BF16, _F16, _F32, _F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# On every processor. In float64 the kernel's log-sum-exp, in float32, would not do.
EVERYWHERE: Mapping[Key, Choice] = {
    (_F64, "forward"): Choice("products", _F64),
    (_F64, "backward"): Choice("products", _F64),
    (_F32, "forward"): Choice("flash", _F32),
    (_F32, "backward"): Choice("products", _F32),
    (_BF16, "forward"): Choice("flash", _F32),
    (_BF16, "backward"): Choice("products", _F32),
    (_F16, "forward"): Choice("flash", _F32),  # the range of float16 is too small for a pivot
    (_F16, "backward"): Choice("products", _F32),
}
# What differs where there is more, by the name that `instruction_set` gives.
BEYOND: Mapping[str, Mapping[Key, Choice]] = {
    "AMX": {(_BF16, "forward"): Choice("flash", _BF16), (_BF16, "backward"): Choice("products", _BF16)},
    # PyTorch's kernel is no faster in bfloat16 than in float32 here.
    "AVX-512 BF16": {(_BF16, "forward"): Choice("products", _BF16), (_BF16, "backward"): Choice("products", _BF16)},
    "ARM BF16": {(_BF16, "forward"): Choice("products", _BF16), (_BF16, "backward"): Choice("products", _BF16)},
    # That kernel converts whole blocks here, and is as fast as in float32 without the casts.
    "AVX-512": {(_BF16, "forward"): Choice("flash", _BF16)},
}


@functools.cache
def instruction_sets() -> frozenset[str]:
    """What the processor has and PyTorch uses: ATEN_CPU_CAPABILITY may hold it to less."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    else:  # before PyTorch 2.12
        asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
        found = {name for name, question in asked.items() if getattr(torch.cpu, question)()}
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        found = {name for name in found if not name.startswith(("avx512", "amx", "avx10"))}
    return frozenset(found)


def instruction_set() -> str:
    """The best that is in effect, by name: "AMX", "AVX-512 BF16", "AVX-512", "AVX2", "ARM BF16" or what PyTorch calls
    it. What the variables of the environment hold PyTorch and oneDNN short of does not count."""
    held, sets = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), instruction_sets()
    for name, flag in _NARROW:
        if flag in sets and held not in _HELD_SHORT.get(name, ()):
            return name
    plain: str = torch.backends.cpu.get_cpu_capability()
    if plain.startswith("AVX512"):
        return "AVX2" if held in _HELD_SHORT["AVX-512"] else "AVX-512"
    return plain


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, rather than converting each element of it."""
    return instruction_set() in [name for name, _ in _NARROW]


def from_table(dtype: torch.dtype, of: Pass) -> Choice:
    """Who makes a pass over inputs of `dtype` on this processor."""
    key = (dtype, of)
    return BEYOND.get(instruction_set(), {}).get(key) or EVERYWHERE[key]
