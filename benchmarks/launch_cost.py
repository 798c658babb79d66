"""What a call costs the host before the GPU has anything to do, with a driver that does nothing.

    python -m benchmarks.launch_cost

Kernels are compiled for an H100 and launched by Triton's own launcher on a libcuda that is made here and returns at
once, on CPU tensors that nobody reads. It needs a C compiler and Triton for NVIDIA's parts, and says so where they are
missing. Not counted is asking which device is current, which takes about a microsecond a launch. Beside a forward with
its backward stands its floor: what PyTorch takes, in turn with it, for a node that keeps and makes the same tensors and
computes nothing.
"""

import ctypes
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FLOOR = "of which PyTorch's, for an empty node"
_STUB = """
typedef unsigned long long address;
#define NOTHING(name) int name() { return 0; }
NOTHING(cuCtxGetCurrent) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuDeviceGet)
NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuFuncSetAttribute) NOTHING(cuFuncSetCacheConfig) NOTHING(cuGetErrorString)
NOTHING(cuModuleGetFunction) NOTHING(cuModuleLoadData) NOTHING(cuLaunchKernelEx) NOTHING(cuLaunchKernel)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }
int cuDriverGetVersion(int *value) { *value = 13000; return 0; }
int cuFuncGetAttribute(int *value) { *value = 1024; return 0; }
int cuPointerGetAttribute(address *value, int what, address of) { *value = of; return 0; }
"""


def why_not() -> str | None:
    """Why it cannot be measured here; None if it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "unset TRITON_INTERPRET: under the interpreter nothing is launched"
    if shutil.which("cc") is None:
        return "there is no C compiler (cc)"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


def idle_gpu(folder: Path) -> None:
    """From here on Triton launches into nothing, and the Triton backend serves CPU tensors, for this process."""
    library, source = folder / "libcuda.so.1", folder / "stub.c"
    source.write_text(_STUB)
    command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found under its name by whoever asks for it later
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    from dsmr_kernels import api, border, dispatch
    from dsmr_kernels.backends import triton as backend
    from dsmr_kernels.backends.triton import decode, launch, step, training

    class Idle(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(Idle())
    stand_ins: dict[Any, dict[str, Any]] = {
        api: {"may_look": lambda tensor: False},
        border: {"may_look": lambda tensor: False},  # as on a GPU
        dispatch: {"_why_no_triton": lambda: None},
        backend: {"unsupported": lambda *call: None},
        launch: {"on": lambda device: launch._NOWHERE},
        decode: {"processors": lambda device: 132},
        training: {"processors": lambda device: 132},
    }
    for module in (launch, decode, step, training):
        stand_ins.setdefault(module, {})["architecture"] = lambda device: "sm_90"
    for module, names in stand_ins.items():
        for name, value in names.items():
            setattr(module, name, value)


def microseconds(*given: Callable[[], object], calls: int = 100, rounds: int = 45) -> list[float]:
    """Of one call of each: the medians of rounds of calls in turn, since other programs take time, too."""
    found: list[list[float]] = [[] for _ in given]
    for _ in range(rounds):
        for call, times in zip(given, found, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begin) / calls * 1e6)
    return [statistics.median(times) for times in found]


class _Empty(torch.autograd.Function):
    """PyTorch's own part of a recorded call: a node that takes the same tensors, keeps and makes room for the same and
    computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, _, lse = ctx.saved_tensors
        torch.empty_like(lse)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def measure() -> dict[str, float]:
    """Microseconds of each call; after `idle_gpu`."""
    from dsmr_kernels import KVMemory, append_rotated, decode_attention, memory_attention
    from dsmr_kernels.cases import filled_memory, random_case

    case = random_case(
        batch=1, heads=8, kv_heads=2, queries=32, capacity=64, seen=[90], horizon=64, head_dim=64, dtype=torch.bfloat16
    )
    leaves = q, k, v = case.q.requires_grad_(), case.k.requires_grad_(), case.v.requires_grad_()
    options: dict[str, Any] = {"horizon": 64, "segment_length": 32, "backend": "triton"}
    token = tuple(x.detach()[:, :, :1] for x in leaves)
    memory = case.memory
    assert memory is not None

    def forward() -> object:
        return memory_attention(q, k, v, memory, **options)

    def both() -> object:
        out = memory_attention(q, k, v, memory, **options)
        return torch.autograd.grad(out, leaves, case.grad)

    def empty() -> object:
        return torch.autograd.grad(_Empty.apply(q, k, v), leaves, case.grad)

    def step(memory: KVMemory = memory) -> object:
        return decode_attention(
            append_rotated(token[0], token[1], token[2], memory, backend="triton"), memory, backend="triton"
        )

    for call in (forward, both, step) * 3:  # what is found out once
        with torch.set_grad_enabled(call is both):
            call()
    found = {}
    found["forward and backward"], found[FLOOR] = microseconds(both, empty)
    with torch.no_grad():
        long = filled_memory(1, 2, 4096, 64, [9000], dtype=torch.bfloat16)  # which is read in splits
        for _ in range(3):
            step(long)
        names = "forward", "decode step", "decode step, split"
        found |= dict(zip(names, microseconds(forward, step, lambda: step(long)), strict=True))
    return found


def main() -> int:
    """Measure, and print a line a call."""
    if reason := why_not():
        print(f"cannot be measured here: {reason}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        idle_gpu(Path(folder))
        found = measure()
        for name in sorted(found, key=lambda name: (name.startswith("decode"), found[name])):
            print(f"{name:{len(FLOOR)}} {found[name]:7.1f} µs")
        print(f"forward and backward over its floor: {found['forward and backward'] / found[FLOOR]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
