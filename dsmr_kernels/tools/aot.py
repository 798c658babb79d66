"""Compile every tile configuration for every target, on any machine: registers, spills, shared memory, instructions.

    python -m dsmr_kernels.tools.aot                       # a sample of every target and kernel, under a minute
    python -m dsmr_kernels.tools.aot --full                # all of it, with every option: 90 minutes on one core
    python -m dsmr_kernels.tools.aot --target sm_90 --dim 128 --variant pieces

Needs Triton but no GPU; NVIDIA's `cuobjdump` and `nvdisasm` come with Triton's wheel. Exits with 1 if a configuration
spills, wants more shared or tensor memory than its part has, or uses no matrix instructions where the dtype has them.
"""

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dsmr_kernels.storage import write_text
from dsmr_kernels.tools.targets import TARGETS

if TYPE_CHECKING:
    from dsmr_kernels.backends.triton.configs import Config

# Kernel -> the module of the Triton backend that has it, and its name there.
TRAINING = {
    "forward": ("forward", "forward_kernel"),
    "dq": ("backward", "dq_kernel"),
    "dkv": ("backward", "dkv_kernel"),
    "dbias": ("bias", "dbias_kernel"),
}
DECODING = {
    "decode": ("decode", "decode_kernel"),
    "decode_many": ("decode", "decode_kernel"),
    "step": ("step", "step_kernel"),
}
TOGETHER = {"merge": ("splits", "merge_kernel"), "sum": ("splits", "sum_kernel")}
BY_DISTANCE = {"table": ("bias", "table_kernel"), "bucket": ("bias", "bucket_kernel")}
KERNELS = TRAINING | DECODING | TOGETHER | BY_DISTANCE
WITHOUT_PRODUCTS = ("step", *TOGETHER, *BY_DISTANCE)
# What is compiled in: the least that a call may need, the usual training call, and all options at once, without and
# with a memory in int8 (which dK and dV have no part in), and without and with a learned bias, which takes ALiBi in.
_NONE = {"SLIDING": False, "HAS_MEMORY": True, "HAS_PIECES": False, "HAS_ALIBI": False, "HAS_BIAS": False}
_NONE |= {"HAS_OFFSETS": False, "HAS_LSE_GRAD": False, "DETACH": True}
_NONE |= {"NEEDS_Q": True, "NEEDS_K": True, "NEEDS_V": True}
_NONE |= {"HAS_VISIBLE": False, "HAS_SINKS": False, "ROTATE": False, "QUANTISED": False}
_SHARED = {"DIRECT": False, "ALONE": False, "SPLIT": False}
_NONE |= _SHARED
_ALL = dict.fromkeys(_NONE, True) | _SHARED | {"DETACH": False, "HAS_BIAS": False}
_BIASED = _ALL | {"HAS_ALIBI": False, "HAS_BIAS": True}
VARIANTS = {
    "bare": _NONE,
    "pieces": _NONE | {"HAS_PIECES": True, "HAS_VISIBLE": True, "ROTATE": True},
    "all": _ALL | {"QUANTISED": False},
    "int8": _ALL,
    "split": _ALL | {"QUANTISED": False, "SPLIT": True},  # of the training call, where the grid is small
    "biased": _BIASED | {"QUANTISED": False},
    "biased8": _BIASED,
}
DIMS = (64, 128, 256)  # a table's entries; compiled with every variant
OTHER_DIMS = (16, 32, 80, 192)  # those that share an entry, narrower or padded; compiled with one variant


@dataclass(frozen=True)
class Case:
    """One kernel to compile: `variant` names what is compiled in."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    variant: str


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes on one target."""

    case: Case
    config: "Config"
    registers: int
    spilled: int  # bytes of stack (NVIDIA); vector registers and bytes of scratch (AMD)
    shared: int
    tensor_columns: int
    matrix: int
    seconds: float  # of compilation; 0 if Triton had it in its cache

    @property
    def faults(self) -> list[str]:
        """Why this configuration must not be shipped; empty if it may."""
        target, found = TARGETS[self.case.target], []
        if self.spilled > self.config.may_spill:
            found.append(f"spills {self.spilled}")
        if self.shared > target.shared:
            found.append(f"wants {self.shared} of {target.shared} bytes of shared memory")
        if self.tensor_columns > target.tensor_columns:
            found.append(f"wants {self.tensor_columns} of {target.tensor_columns} columns of tensor memory")
        if self.case.dtype != "float32" and self.case.kernel not in WITHOUT_PRODUCTS and not self.matrix:
            found.append("uses no matrix instructions")
        return found

    def row(self) -> dict[str, Any]:
        """The row of the report."""
        target = TARGETS[self.case.target]
        occupancy = target.occupancy(
            warps=self.config.warps,
            registers=self.registers,
            shared=self.shared,
            tensor_columns=self.tensor_columns,
        )
        row = asdict(self.case) | asdict(self.config)
        row |= {"registers": self.registers, "stack": self.spilled, "shared": self.shared}
        row |= {"shared_limit": target.shared, "tensor_columns": self.tensor_columns, "matrix": self.matrix}
        return row | {"occupancy": round(occupancy, 3), "seconds": round(self.seconds, 2), "faults": self.faults}


_POINTERS = dict.fromkeys(("Length", "Visible", "PieceStart", "Counters"), "*i32")
_POINTERS |= dict.fromkeys(("Position", "Offsets", "Buckets"), "*i64")
_FLOATS = ["Slopes", "Sinks", "Lse", "GradLse", "Delta", "KScale", "VScale", "Cos", "Sin", "Parts"]
_FLOATS += ["PartLse", "MoreParts", "Bias", "Table", "DBias"]
ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def _stored(case: Case) -> dict[str, str]:
    """Types of the tensors that are not in the dtype of q: partial sums, and memory in int8."""
    types = dict.fromkeys(_FLOATS, "*fp32")
    if VARIANTS[case.variant]["SPLIT"]:
        types |= dict.fromkeys(("DK", "DV", "DQ"), "*fp32") | ({"Out": "*fp32"} if case.kernel == "forward" else {})
    if VARIANTS[case.variant]["QUANTISED"]:
        types |= dict.fromkeys(("K", "V") if case.kernel.startswith("decode") else ("MemoryK", "MemoryV"), "*i8")
    return types


def compile_kernel(case: Case, config: "Config | None" = None) -> Compiled:
    """Compile one kernel as `launch` would call it: aligned pointers, contiguous tensors, all sizes at run time.

    Args:
        case: what to compile.
        config: instead of the one of the table.
    """
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dsmr_kernels.backends.triton import configs
    from dsmr_kernels.backends.triton.decode import MOST_SPLITS, SUMMED_AT_ONCE

    target, head_dim = TARGETS[case.target], case.head_dim
    module, name = KERNELS[case.kernel]
    function = getattr(importlib.import_module(f"dsmr_kernels.backends.triton.{module}"), name)
    given = VARIANTS[case.variant]
    entry = configs.named(case.kernel, given["QUANTISED"], given["HAS_BIAS"])
    if given["SPLIT"] and case.kernel in ("forward", "dq", "dkv"):
        entry += "_split"
    config = config or configs.from_table(entry, target.name, head_dim, getattr(torch, case.dtype))
    dim = configs.padded(head_dim)
    constants: dict[str, Any] = {"BM": config.bm, "BN": config.bn, "BD": dim, "HEAD_DIM": head_dim}
    constants |= {"BV": dim, "V_DIM": head_dim, "WHOLE_DIM": dim == head_dim, "WHOLE_V": dim == head_dim}
    constants |= {"BR": config.bm, "BH": dim // 2, "BHV": dim // 2}
    constants["BLOCK"] = config.bm
    rows = 1 if case.variant == "pieces" else max(config.bm, 1)  # of which decoding sums up the splits
    constants |= {"ROWS": rows, "AT_ONCE": max(1, SUMMED_AT_ONCE // (rows * dim)), "MOST": MOST_SPLITS}
    constants["UNROLLED"] = configs.unrolled(target.name)
    constants["UNIT"] = math.gcd(16, head_dim)  # the strides' unit for contiguous tensors
    constants |= {"PRECISION": "ieee" if case.dtype == "float32" else "tf32", **VARIANTS[case.variant]}
    stored = _stored(case)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name.isupper() and name not in ("Q", "K", "V", "DQ", "DK", "DV"):
            signature[name] = "constexpr"
        elif name[0].isupper():
            signature[name] = stored.get(name) or _POINTERS.get(name) or f"*{ELEMENTS[case.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name.startswith("scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            strided = name.endswith(("_batch", "_head", "_token")) and "UNIT" not in function.arg_names
            if head_dim % 16 == 0 and (strided or name in ("head_dim", "v_dim")):
                attributes[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(function.arg_names.index(name),): constants[name] for name in signature if name in constants}
    source = ASTSource(function, signature, constexprs, attributes)
    hits: list[bool] = []
    listener = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda **found: hits.append(found["cache_hit"])
    begin = time.perf_counter()
    try:
        result = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, target.warp),
            options=config.launch_options(target.name) | {"enable_fp_fusion": case.kernel != "step"},
        )
    finally:
        triton.knobs.compilation.listener = listener
    seconds = 0.0 if hits == [True] else time.perf_counter() - begin
    registers, spilled, listing = _read_nvidia(result) if target.backend == "cuda" else _read_amd(result)
    # Tiles of few queries are too small for the newest matrix instructions.
    older = bool(target.older) and case.kernel in DECODING
    older = older or (case.kernel, target.name, dim) in configs.OLDER_INSTRUCTIONS
    matrix = len(re.findall(target.older if older else target.matrix, listing))
    columns = getattr(result.metadata, "tmem_size", None) or 0
    return Compiled(case, config, registers, spilled, result.metadata.shared, columns, matrix, seconds)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_nvidia(result: Any) -> tuple[int, int, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage, listing = (
            subprocess.run([_tool(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
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


def _variants(kernel: str) -> Iterator[str]:
    """Those that compile a kernel to something else."""
    for variant, given in VARIANTS.items():
        if given["QUANTISED"] and kernel == "dkv":  # nothing is computed for memory
            continue
        without = {"step": "HAS_BIAS", "dbias": "HAS_ALIBI"}.get(kernel)
        if without is None or not given[without]:
            yield variant


def every_case() -> Iterator[Case]:
    """All that is shipped: both element sizes (float16 compiles as bfloat16 does), every width, every option."""
    for target, dtype, kernel in itertools.product(TARGETS, ("bfloat16", "float32"), KERNELS):
        if kernel in TOGETHER:
            yield from (Case(kernel, target, head_dim, dtype, "bare") for head_dim in DIMS)
            continue
        if kernel in BY_DISTANCE:  # float32 whatever q is, and of no head_dim
            yield from (Case(kernel, target, 64, dtype, variant) for variant in ("bare", "all") if dtype == "float32")
            continue
        for head_dim, variant in itertools.product(DIMS, _variants(kernel)):
            yield Case(kernel, target, head_dim, dtype, variant)
        for head_dim in OTHER_DIMS:
            yield Case(kernel, target, head_dim, dtype, "pieces")


def sample() -> Iterator[Case]:
    """A case of every target and of every kernel, of both element sizes, padded and not: seconds each."""
    kernels = list(TRAINING)
    for index, target in enumerate(TARGETS):
        yield Case(kernels[index % len(kernels)], target, (128, 64, 80)[index // 2 % 3], "bfloat16", "pieces")
    yield from (Case(kernel, "sm_90", 64, "bfloat16", "bare") for kernel in kernels)
    yield from (Case(kernel, "sm_90", 128, "bfloat16", "bare") for kernel in DECODING)
    yield from (Case(kernel, "sm_90", 64, "bfloat16", "split") for kernel in TRAINING)
    yield from (Case(kernel, "sm_90", 64, "bfloat16", "bare") for kernel in TOGETHER)
    yield Case("decode", "gfx942", 80, "bfloat16", "int8")
    yield Case("step", "sm_90", 64, "bfloat16", "int8")
    yield from (Case(kernel, "sm_90", 64, "float32", "bare") for kernel in BY_DISTANCE)
    yield Case("forward", "sm_90", 64, "bfloat16", "biased")
    yield Case("forward", "sm_89", 256, "float32", "bare")


HEAD = (
    "kernel      target  dim  dtype     variant  tile, warps, stages  registers  stack  shared, of  tensor  matrix  "
    "occupancy  seconds"
)


def line(row: dict[str, Any]) -> str:
    """A row for the terminal, under `HEAD`."""
    limit = f", ≤ {row['most_registers']}" if row["most_registers"] else ""
    tile = f"{row['bm']} x {row['bn']}, {row['warps']}, {row['stages']}{limit}"
    shared = f"{row['shared']}/{row['shared_limit'] // 1024}K"
    seconds = f"{row['seconds']:8.1f}" if row["seconds"] else "  cached"
    return (
        f"{row['kernel']:11} {row['target']:7} {row['head_dim']:3}  {row['dtype']:8}  {row['variant']:7}  {tile:19}  "
        f"{row['registers']:9} {row['stack']:6} {shared:>11} {row['tensor_columns']:7} {row['matrix']:7} "
        f"{row['occupancy']:9.0%} {seconds}  {'; '.join(row['faults'])}"
    ).rstrip()


def markdown(report: dict[str, Any]) -> str:
    """The report as a table of a line for each kernel and target: the worst of its cases."""
    rows: list[dict[str, Any]] = report["rows"]
    faulty = sum(bool(row["faults"]) for row in rows)
    lines = [
        f"Compiled without a GPU: {len(rows)} cases, {faulty} of them faulty, with Triton {report['triton']}"
        f" from kernels of source hash `{report['sources']}`, by",
        "",
        "    python -m dsmr_kernels.tools.aot --full --markdown benchmarks/results/aot.md",
        "",
        "A line is the worst of a kernel's cases on a target: every head dimension, dtype and variant. Spills are"
        " bytes, on AMD's parts registers and bytes. Occupancy is estimated from registers, shared and tensor memory.",
        "",
        "| kernel | target | cases | most registers | most spills | most shared memory, bytes | of "
        "| most tensor memory, columns | least occupancy | faults |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for kernel, target in itertools.product(KERNELS, TARGETS):
        here = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
        if not here:
            continue
        most = {name: max(row[name] for row in here) for name in ("registers", "stack", "shared", "tensor_columns")}
        faults = sorted({fault for row in here for fault in row["faults"]})
        lines.append(
            f"| {kernel} | {target} | {len(here)} | {most['registers']} | {most['stack']} | {most['shared']} "
            f"| {here[0]['shared_limit']} | {most['tensor_columns']} | {min(row['occupancy'] for row in here):.1%} "
            f"| {'; '.join(faults) or 'none'} |"
        )
    return "\n".join(lines) + "\n"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in the report."""
    names = list(TARGETS)
    place = names.index(row["target"]) if row["target"] in names else len(names)
    return place, row["dtype"], row["head_dim"], row["kernel"], row["variant"]


def merged(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """The new report with those rows of the old that are of the same sources and Triton and were not made anew."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    same = isinstance(old, dict) and all(old.get(key) == new[key] for key in ("triton", "sources"))
    for row in (old["rows"] if same else []) + new["rows"]:
        if row["seconds"] == 0.0 and _key(row) in rows:  # it was timed when it was compiled
            row = row | {"seconds": rows[_key(row)]["seconds"]}
        rows[_key(row)] = row
    return new | {"rows": [rows[key] for key in sorted(rows)]}


def _write(report: dict[str, Any], json_file: Path | None, markdown_file: Path | None) -> None:
    if json_file is not None:
        old = json.loads(json_file.read_text()) if json_file.exists() else None
        report = merged(old, report)
        write_text(json_file, json.dumps(report, indent=1) + "\n")
    if markdown_file is not None:
        write_text(markdown_file, markdown(report))


def _config(text: str) -> "Config":
    from dsmr_kernels.backends.triton.configs import Config

    bm, bn, warps, stages, *limit = (int(number) for number in text.split(","))
    return Config(bm, bn, warps, stages, *limit)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a table, and say what must not be shipped."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for all targets, without a GPU.")
    parser.add_argument("--full", action="store_true", help="every target, head_dim, dtype, kernel and variant")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one (may be given again)")
    parser.add_argument("--dim", type=int, action="append", help="only this head_dim (may be given again)")
    parser.add_argument("--dtype", choices=ELEMENTS, action="append", help="only this dtype (may be given again)")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only this one (may be given again)")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="only this one (may be given again)")
    numbers = "BM,BN,WARPS,STAGES[,REGISTERS]"
    parser.add_argument("--config", type=_config, metavar=numbers, help="instead of the table's")
    parser.add_argument("--json", type=Path, help="write every case; those of the same sources and Triton are kept")
    parser.add_argument("--markdown", type=Path, help="write a table, the worst case of each kernel and target")
    asked = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: under the interpreter nothing is compiled", file=sys.stderr)
        return 1
    import triton

    from dsmr_kernels.backends.triton.tuned import kernel_sources

    chosen = any((asked.target, asked.dim, asked.dtype, asked.kernel, asked.variant))
    filters = {"target": asked.target, "dtype": asked.dtype, "kernel": asked.kernel, "variant": asked.variant}
    cases = [
        case
        for case in (every_case() if asked.full or chosen else sample())
        if all(wanted is None or getattr(case, name) in wanted for name, wanted in filters.items())
        and (asked.dim is None or case.head_dim in asked.dim)
    ]
    if not cases:
        print("nothing fits: the head dimensions compiled are " + ", ".join(map(str, DIMS)), file=sys.stderr)
        return 2
    report: dict[str, Any] = {"triton": triton.__version__, "sources": kernel_sources(), "rows": []}
    print(HEAD)
    for number, case in enumerate(cases, 1):
        report["rows"].append(compile_kernel(case, asked.config).row())
        print(line(report["rows"][-1]), f" [{number}/{len(cases)}]", flush=True)
    if asked.config is None:  # the report is of what is shipped
        _write(report, asked.json, asked.markdown)
    faulty = sum(bool(row["faults"]) for row in report["rows"])
    print(f"{faulty} configurations must not be shipped" if faulty else f"all {len(cases)} configurations are clean")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
