"""Compile every tile configuration for every target, on any machine: registers, spills, shared memory, instructions.

    python -m dsmr_kernels.aot                       # all of it, a few minutes
    python -m dsmr_kernels.aot --target sm_90 --dim 128

Needs Triton but no GPU; NVIDIA's `cuobjdump` comes with Triton's wheel. Exits with 1 if a configuration spills, wants
more shared memory than its part has, or uses no matrix instructions where the dtype has them.
"""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A part to compile for: its name in `configs`, Triton's, shared memory of a block, and its matrix instructions."""

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    matrix: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, r"\bHMMA"),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, r"\bHMMA"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, r"\bHGMMA"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, r"v_mfma"),
    )
}
KERNELS = ("forward", "dq", "dkv", "decode", "decode_many", "decode_int8", "combine", "step", "step_int8")
WITHOUT_PRODUCTS = ("combine", "step", "step_int8")


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one target."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    config: Any
    registers: int
    spilled: int  # bytes of stack (NVIDIA); vector registers and bytes of scratch (AMD)
    shared: int
    matrix: int
    seconds: float

    @property
    def faults(self) -> list[str]:
        """Why this configuration must not be shipped; empty if it may."""
        limit, found = TARGETS[self.target].shared, []
        if self.spilled:
            found.append(f"spills {self.spilled}")
        if self.shared > limit:
            found.append(f"wants {self.shared} of {limit} bytes of shared memory")
        if self.dtype != "float32" and self.kernel not in WITHOUT_PRODUCTS and not self.matrix:
            found.append("uses no matrix instructions")
        return found


_POINTERS = {"Length": "*i32", "Visible": "*i32", "Position": "*i64", "PieceStart": "*i32", "Slopes": "*fp32"}
_FLOATS = dict.fromkeys(("Lse", "Delta", "KScale", "VScale", "Cos", "Sin", "Parts"), "*fp32")
_ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


# The usual captured step: lengths as the caller limits them, several splits.
DECODING = {"HAS_VISIBLE": True, "DIRECT": False, "ROTATE": True}


def _kernel_of(kernel: str, target: Target, head_dim: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """The function called `kernel` and its configuration."""
    from dsmr_kernels.backends.triton import backward, configs, decode, forward, step

    if kernel.startswith("decode"):
        stacked = 17 if kernel == "decode_many" else 16
        return decode.decode_kernel, configs.choose_decode(target.name, head_dim, dtype, stacked)
    if kernel == "combine":
        return decode.combine_kernel, configs.COMBINE
    if kernel.startswith("step"):
        return step.step_kernel, configs.choose_step(head_dim, 1 << 16)
    function = {"forward": forward.forward_kernel, "dq": backward.dq_kernel, "dkv": backward.dkv_kernel}[kernel]
    return function, configs.choose(kernel, target.name, head_dim, dtype)


def _stored_types(kernel: str) -> dict[str, str]:
    """Element types of the tensors that are not in the dtype of q: partial sums, and memory in int8."""
    types = {"Out": "*fp32"} if kernel.startswith("decode") else {}
    if kernel == "decode_int8":
        types |= {"K": "*i8", "V": "*i8"}
    return types | ({"MemoryK": "*i8", "MemoryV": "*i8"} if kernel == "step_int8" else {})


def compile_kernel(kernel: str, target: Target, head_dim: int, dtype: str, options: dict[str, bool]) -> Compiled:
    """Compile one kernel as `launch` would call it: aligned pointers, contiguous tensors, all sizes at run time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dsmr_kernels.backends.triton import configs

    function, config = _kernel_of(kernel, target, head_dim, getattr(torch, dtype))
    dim = configs.padded(head_dim)
    constants: dict[str, Any] = {"BM": config.bm, "BN": config.bn, "BD": dim, "WHOLE_DIM": dim == head_dim, **options}
    constants |= {"HEAD_DIM": head_dim, "UNIT": math.gcd(16, head_dim)}  # the strides' unit for contiguous tensors
    constants["PRECISION"] = "ieee" if dtype == "float32" else "tf32"
    constants |= DECODING | {"QUANTISED": kernel.endswith("int8"), "BS": config.bm, "BR": config.bm, "BH": config.bn}
    stored = _stored_types(kernel)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name.isupper() and name not in ("Q", "K", "V", "DQ", "DK", "DV"):
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = stored.get(name) or _POINTERS.get(name) or _FLOATS.get(name) or f"*{_ELEMENTS[dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            strided = name.endswith(("_batch", "_head", "_token")) and "UNIT" not in function.arg_names
            if strided or (name == "head_dim" and head_dim % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(function.arg_names.index(name),): constants[name] for name in signature if name in constants}
    source = ASTSource(function, signature, constexprs, attributes)
    begin = time.perf_counter()
    result = triton.compile(
        source,
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={
            "num_warps": config.warps,
            "num_stages": config.stages,
            "enable_fp_fusion": not kernel.startswith("step"),
        },
    )
    seconds = time.perf_counter() - begin
    registers, spilled, listing = _read_nvidia(result) if target.backend == "cuda" else _read_amd(result)
    # A tile of fewer than 64 queries is too small for Hopper's own matrix instructions.
    matrix = len(
        re.findall(r"\bHG?MMA" if kernel.startswith("decode") and target.arch == 90 else target.matrix, listing)
    )
    shared = result.metadata.shared
    return Compiled(kernel, target.name, head_dim, dtype, config, registers, spilled, shared, matrix, seconds)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(result: Any) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", usage))
    return registers, max(int(count) for count in re.findall(r"STACK:(\d+)", usage)), listing


def _read_amd(result: Any) -> tuple[int, int, str]:
    listing = result.asm["amdgcn"]
    registers = max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", listing))
    # Scalar registers may spill into vector registers, which costs next to nothing; memory is what must stay unused.
    spilled = sum(
        int(count) for count in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", listing)
    )
    return registers, spilled, listing


# The usual call, and the one with everything in it.
PLAIN = {"SLIDING": False, "HAS_MEMORY": True, "HAS_PIECES": True, "HAS_ALIBI": False, "DETACH": True}
FULL = {"SLIDING": True, "HAS_MEMORY": True, "HAS_PIECES": True, "HAS_ALIBI": True, "DETACH": False}


def main() -> int:
    """Compile, print a table, and say what must not be shipped."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for all targets, without a GPU.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one (may be given again)")
    parser.add_argument("--dim", type=int, action="append", help="only this head_dim (may be given again)")
    parser.add_argument("--dtype", choices=_ELEMENTS, action="append", help="only this dtype (may be given again)")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one (may be given again)")
    parser.add_argument("--full", action="store_true", help="with ALiBi and sliding visibility compiled in")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: under the interpreter nothing is compiled", file=sys.stderr)
        return 1
    faulty = 0
    print(
        "kernel      target  dim  dtype     queries x keys, warps, stages  registers  spilled  shared  matrix  seconds"
    )
    for name in arguments.target or TARGETS:
        for head_dim in arguments.dim or (64, 80, 128, 256):
            for dtype in arguments.dtype or ("bfloat16", "float32"):
                for kernel in arguments.kernel or KERNELS:
                    options = FULL if arguments.full else PLAIN
                    found = compile_kernel(kernel, TARGETS[name], head_dim, dtype, options)
                    c = found.config
                    tile = f"{c.bm} x {c.bn}, {c.warps}, {c.stages}"
                    faults = "; ".join(found.faults)
                    faulty += bool(faults)
                    print(
                        f"{kernel:11} {name:7} {head_dim:3}  {dtype:8}  {tile:28} {found.registers:9} "
                        f"{found.spilled:8} {found.shared:7} {found.matrix:7} {found.seconds:7.1f}  {faults}",
                        flush=True,
                    )
    print(f"{faulty} configurations must not be shipped" if faulty else "all configurations are clean")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
