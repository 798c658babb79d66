"""Stands where Triton would launch: compiles for a part that is not there, and runs the PTX on CPU tensors.

It changes the process for good, and the kernels must have been defined with TRITON_INTERPRET unset: see `conftest.py`.
"""

import functools
import itertools
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from dsmr_kernels import dispatch
from dsmr_kernels.backends import triton as backend
from dsmr_kernels.backends.triton import bias, decode, launch, step, training
from virtual_gpu.block import Block
from virtual_gpu.memory import GlobalMemory
from virtual_gpu.program import Fault, Program

_TYPES = {"u64": np.uint64, "u32": np.uint32, "f32": np.float32}
# What is late: nothing, and each kind of asynchronous work while the other is not. Late together they would meet again.
_SCHEDULES = (frozenset[str](), frozenset({"cp"}), frozenset({"wgmma"}))


@functools.cache
def _program(text: str) -> Program:
    return Program(text)


class _Driver:
    """What Triton's compiler asks a driver for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A compiled kernel that runs here; `kernel[grid](...)` as with Triton's."""

    def __init__(self, name: str, compiled: Any) -> None:
        self.name, self.shared = name, compiled.metadata.shared
        text = compiled.asm["ptx"]
        self.program = _program(text)
        self.constant = [kind == "constexpr" for kind in compiled.src.signature.values()]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self._launch(grid, arguments)

    def _launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """Run all blocks with asynchronous work as early and as late as can be; the results must agree."""
        given = [x for x, constant in zip(arguments, self.constant, strict=True) if not constant]
        given += [0] * (len(self.program.parameters) - len(given))  # scratch memory that no kernel here asks for
        storages = [x.untyped_storage() for x in given if isinstance(x, torch.Tensor)]
        memory = GlobalMemory({x.data_ptr(): x.nbytes() for x in storages if x.nbytes()})
        parameters = {
            name: _TYPES[kind](x.data_ptr() if isinstance(x, torch.Tensor) else _wrapped(x, kind))
            for (kind, name), x in zip(self.program.parameters, given, strict=True)
        }
        before, results = memory.contents(), []
        used = {instruction.parts[0] for instruction in self.program.code}
        for late in _SCHEDULES:
            if late <= used:
                memory.restore(before)
                self._run(grid, parameters, memory, late)
                results.append(memory.contents())
        for other in results[1:]:
            if not all(np.array_equal(one, two) for one, two in zip(results[0], other, strict=True)):
                raise Fault(f"{self.name} uses something asynchronous before it waits for it")

    def _run(
        self, grid: tuple[int, int, int], parameters: dict[str, Any], memory: GlobalMemory, late: frozenset[str]
    ) -> None:
        for number, place in enumerate(itertools.product(*(range(n) for n in grid)), 1):
            block = Block(self.program, parameters, memory, self.shared, grid, place, number, late)
            try:
                block.run()
            except Fault as fault:
                raise Fault(f"{self.name}, block {place}: {fault}") from fault


def _wrapped(number: float, kind: str) -> float:
    return number if kind == "f32" else int(number) & (1 << (64 if kind == "u64" else 32)) - 1


def pretend(part: str) -> None:
    """From here on the Triton backend serves CPU tensors, with kernels compiled for a part: "sm_80", "sm_90" ..."""
    compile_and_launch = triton.JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> _Compiled:
        compiled = compile_and_launch(self, *arguments, grid=grid, warmup=True, **options)
        kernel = _Compiled(self.__name__, compiled)
        names = [parameter.name for parameter in self.params]
        bound = dict(zip(names, arguments, strict=False)) | {name: options[name] for name in names if name in options}
        kernel[grid](*(bound[name] for name in names))
        return kernel

    triton.JITFunction.run = run
    triton.runtime.driver.set_active(_Driver(int(part.removeprefix("sm_"))))
    dispatch._why_no_triton = lambda: None
    backend.unsupported = lambda *call: None
    for module in (launch, bias, decode, step, training):
        module.architecture = lambda device: part
    launch.on = lambda device: launch._NOWHERE
    launch.BY_ADDRESS = False  # the tensors tell what memory there is
    decode.processors, training.processors = lambda device: 8, lambda device: 16
