"""The GPUs that the kernels are compiled for: what a block may take there, and which instructions it must use.

Limits are the vendors' published ones (CUDA C++ Programming Guide, "Compute Capabilities"; AMD CDNA 3 ISA guide).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One architecture.

    Attributes:
        name: as `configs` knows it. backend, arch, warp: as Triton does; `warp` is threads of a warp or wavefront.
        shared: bytes of shared memory that one block may have. shared_unit: bytes that a multiprocessor has in all.
        reserved: bytes of shared memory that the system takes for itself from every block.
        warps, blocks: the most that a multiprocessor holds at a time.
        registers: 32-bit registers of a multiprocessor for each lane of a warp (AMD: of its four SIMD units together).
        tensor_columns: columns of tensor memory of a multiprocessor; 0 where there is none.
        matrix: pattern of the matrix instructions that its fast path uses, in the disassembly.
        older: pattern of those that it has besides, if any.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    shared_unit: int
    reserved: int
    warps: int
    blocks: int
    registers: int
    tensor_columns: int
    matrix: str
    older: str = ""

    def occupancy(self, *, warps: int, registers: int, shared: int, tensor_columns: int) -> float:
        """Share of the warps that a multiprocessor can hold that blocks like this fill, estimated; 0 if none fits."""
        held = -(-max(registers, 1) // 8) * 8  # registers are handed out to a warp eight a lane at a time
        if self.backend == "cuda":
            # Each of the four schedulers hands out its own quarter of the registers.
            fitting = [4 * (self.registers // 4 // held) // warps]
        else:
            fitting = [4 * min(self.registers // 4 // held, self.warps // 4) // warps]
        fitting += [self.warps // warps, self.blocks]
        if shared + self.reserved:
            fitting.append(self.shared_unit // (shared + self.reserved))
        if tensor_columns:
            fitting.append(self.tensor_columns // tensor_columns)
        return min(fitting) * warps / self.warps


_KIB = 1024
_NVIDIA = 65536 // 32  # registers of a multiprocessor for each lane

TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * _KIB, 164 * _KIB, _KIB, 64, 32, _NVIDIA, 0, r"\bHMMA"),
        Target("sm_89", "cuda", 89, 32, 99 * _KIB, 100 * _KIB, _KIB, 48, 24, _NVIDIA, 0, r"\bHMMA"),
        Target("sm_90", "cuda", 90, 32, 227 * _KIB, 228 * _KIB, _KIB, 64, 32, _NVIDIA, 0, r"\bHGMMA", r"\bHMMA"),
        # Data-centre Blackwell: fifth-generation tensor cores, whose accumulators lie in tensor memory.
        Target(
            "sm_100", "cuda", 100, 32, 227 * _KIB, 228 * _KIB, _KIB, 64, 32, _NVIDIA, 512, r"\bUTC\w*MMA", r"\bHMMA"
        ),
        # Workstation Blackwell has neither: it multiplies as Ada does.
        Target("sm_120", "cuda", 120, 32, 99 * _KIB, 100 * _KIB, _KIB, 48, 24, _NVIDIA, 0, r"\bHMMA"),
        Target("gfx942", "hip", "gfx942", 64, 64 * _KIB, 64 * _KIB, 0, 32, 16, 4 * 512, 0, r"v_mfma"),
    )
}
