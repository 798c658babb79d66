"""In which dtype a CPU multiplies fast: the one table that the choice of arithmetic asks.

Where a processor has no products of a narrow dtype PyTorch makes them element by element, some twenty times slower than
in float32: there attention computes in float32 and rounds its results.
"""

import functools

import torch

# dtype -> the instruction sets that multiply it, as `torch.cpu.get_capabilities` names them.
PRODUCTS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),  # the last is ARM's
    torch.float16: ("amx_fp16", "avx512_fp16"),
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


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype to compute what comes in `dtype`."""
    if dtype in PRODUCTS and not instruction_sets().intersection(PRODUCTS[dtype]):
        return torch.float32
    return dtype
