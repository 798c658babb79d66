"""Compile the forwards with tensor descriptors for Hopper, on any machine: registers, spills, shared memory and the
instructions that they are about.

    python -m dsmr_kernels.tools.hopper                            # every candidate, about ten seconds each
    python -m dsmr_kernels.tools.hopper --only "2 consumers"

Needs Triton with Gluon (3.6 or newer) but no GPU. Exits with 1 if a tile of the table spills, wants more shared memory
than there is, or does without the matrix instructions or the copies by descriptor.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsmr_kernels.tools.aot import ELEMENTS, _read_nvidia
from dsmr_kernels.tools.targets import TARGETS

if TYPE_CHECKING:
    from dsmr_kernels.backends.triton.bulk import Tile

_TARGET = TARGETS["sm_90"]
# Bytes of stack: scalars, which Triton 3.6 keeps there at head_dim 128, and nothing in the loop over whole blocks.
_MAY_SPILL = 64


@dataclass(frozen=True)
class Compiled:
    """What one kernel takes. `registers` are those at its start; `limits` those that its warps then ask for."""

    registers: int
    limits: tuple[int, ...]
    spilled: int
    shared: int
    matrix: int
    copies: int
    seconds: float

    @property
    def faults(self) -> list[str]:
        """Why it must not be shipped; empty if it may."""
        found = [f"spills {self.spilled}"] if self.spilled > _MAY_SPILL else []
        if self.shared > _TARGET.shared:
            found.append(f"wants {self.shared} of {_TARGET.shared} bytes of shared memory")
        if not self.matrix:
            found.append("uses no matrix instructions")
        if not self.copies:
            found.append("copies nothing by descriptor")
        return found


def compile_tile(tile: "Tile", head_dim: int, dtype: str = "bfloat16") -> Compiled:
    """Compile one forward as `bulk.forward` would launch it behind a memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from dsmr_kernels.backends.triton.descriptors import descriptor_kernel
    from dsmr_kernels.backends.triton.hopper import hopper_kernel

    kernel: Any = hopper_kernel if tile.consumers else descriptor_kernel
    block, element = [1, 1, tile.bn, head_dim], ELEMENTS[dtype]
    layout = f",{gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)!r}" if tile.consumers else ""
    types = dict.fromkeys(("K", "V", "MemoryK", "MemoryV"), f"tensordesc<{element}{block}{layout}>")
    types |= {"Q": f"*{element}", "Out": f"*{element}", "Lse": "*fp32", "Length": "*i32", "Position": "*i64"}
    types |= {"scale_log2": "fp32"}
    constants: dict[str, Any] = {"UNIT": 16, "HAS_MEMORY": True, "BN": tile.bn, "D": head_dim, "HEAD_DIM": head_dim}
    constants |= {"BM": tile.bm, "STAGES": tile.stages, "CONSUMERS": tile.consumers, "OVERLAP": tile.overlap}
    constants |= {"PINGPONG": tile.pingpong, "SPECIALISED": tile.specialised}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in constants:
            values[(index,)] = constants[name]
        elif name in ("Q", "Out", "Lse"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": 4} if tile.consumers else {"num_warps": 8, "num_stages": tile.stages}
    source = (GluonASTSource if tile.consumers else ASTSource)(kernel, signature, values, attributes)
    begin = time.perf_counter()
    result = triton.compile(source, target=GPUTarget(_TARGET.backend, _TARGET.arch, _TARGET.warp), options=options)
    seconds = time.perf_counter() - begin
    registers, spilled, listing = _read_nvidia(result)
    limits = tuple(sorted({int(x) for x in re.findall(r"setmaxnreg\S+\s+(\d+)", result.asm["ptx"])}))
    counts = [len(re.findall(pattern, listing)) for pattern in (_TARGET.matrix, r"\bUTMALDG")]
    return Compiled(registers, limits, spilled, result.metadata.shared, counts[0], counts[1], seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", help="one candidate; may be given again (default: all)")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("nothing is compiled under TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    import triton

    from dsmr_kernels.backends.triton import bulk

    if unknown := [name for name in given.only or [] if name not in bulk.CANDIDATES]:
        print(f"--only must be of {', '.join(bulk.CANDIDATES)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    print(
        f"Triton {triton.__version__}\n{'':43} dim  registers (asked for)  stack  shared/227K  HGMMA  UTMALDG  seconds"
    )
    bad = False
    for name in given.only or bulk.CANDIDATES:
        tile = bulk.CANDIDATES[name]
        for head_dim in tile.head_dims:
            found = compile_tile(tile, head_dim)
            asked = f"{found.registers} ({', '.join(map(str, found.limits))})"
            served = " serves" if bulk.TABLE[head_dim] == tile else ""
            print(
                f"{name:43} {head_dim:3}  {asked:21} {found.spilled:6} {found.shared:12} {found.matrix:6} "
                f"{found.copies:8} {found.seconds:8.1f}{served}  {'; '.join(found.faults)}".rstrip(),
                flush=True,
            )
            bad = bad or bool(served and found.faults)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
