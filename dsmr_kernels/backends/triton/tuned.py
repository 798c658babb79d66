"""Reads configurations that were measured on one machine and written to a file by `dsmr_kernels.tools.tune`.

A file serves the machine that it was made on and nothing else: the GPU's name, the versions of torch and Triton and the
kernels' sources must be what they were. Whatever does not fit is refused in one sentence.
"""

import hashlib
import importlib
import inspect
import os
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch

from dsmr_kernels.backends.triton.configs import DTYPES, Config
from dsmr_kernels.measured import read_measured

FORMAT = 1
Key = tuple[str, int, str]  # kernel, padded head_dim, dtype without "torch."


@dataclass(frozen=True)
class Tuned:
    """What a file holds: the architecture as `configs` names it, and the configurations that differ from the table."""

    architecture: str
    entries: dict[Key, Config]


# Forwards for Hopper that are asked for: no configuration is measured with them, and Gluon may be missing.
APART = ("descriptors", "hopper", "stretches")


def _sources() -> dict[str, str]:
    """What is compiled, by name: all that a module of this room decorates for Triton, but for those apart."""
    room = __name__.rpartition(".")[0]
    names = [module.name for module in pkgutil.iter_modules(importlib.import_module(room).__path__)]
    found = {"RUNTIME": repr(importlib.import_module(f"{room}.primitives").RUNTIME)}
    for module in (importlib.import_module(f"{room}.{name}") for name in names if name not in APART):
        for name, value in vars(module).items():
            function = getattr(value, "fn", None)  # where Triton's decorator leaves it
            if inspect.isfunction(function) and function.__module__ == module.__name__:  # not one that was imported
                found[f"{module.__name__}.{name}"] = inspect.getsource(function)
    return found


def kernel_sources() -> str:
    """A hash of what is compiled: what was measured of other kernels, or seen in their machine code, says nothing."""
    digest = hashlib.sha256()
    for name, source in sorted(_sources().items()):
        digest.update(name.encode() + b"\0" + source.encode() + b"\0")
    return digest.hexdigest()[:16]


def this_machine() -> dict[str, str]:
    """What a file must agree with."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": kernel_sources(),
    }


_WORDS = {"device": "for", "torch": "with torch", "triton": "with Triton", "sources": "with kernels of source hash"}


def read(path: str | os.PathLike[str], machine: dict[str, str] | None = None, architecture: str | None = None) -> Tuned:
    """Read a file and check that it was made here.

    Args:
        path: the file.
        machine: what it must agree with; default `this_machine()`.
        architecture: of the GPU that will run, as `configs` names it; default: whatever the file says.

    Raises:
        ValueError: in one sentence, if the file is missing, damaged, or was made for something else.
    """
    machine = this_machine() if machine is None else machine
    again = "python -m dsmr_kernels.tools.tune"
    tuned = read_measured(path, "tuned configurations", FORMAT, machine, _WORDS, again, _tuned)
    if architecture not in (None, tuned.architecture):
        raise ValueError(f"tuned configurations {path} are for {tuned.architecture}, this GPU is {architecture}")
    return tuned


def _tuned(content: dict[str, Any]) -> Tuned:
    return Tuned(str(content["architecture"]), dict(_entry(entry) for entry in content["entries"]))


def _entry(entry: dict[str, Any]) -> tuple[Key, Config]:
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    if entry["dtype"] not in names:
        raise ValueError(f"dtype must be one of {', '.join(names)}, got {entry['dtype']!r}")
    numbers = [entry[name] for name in ("padded_head_dim", "bm", "bn", "warps", "stages")]
    dim, bm, bn, warps, stages = numbers
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"sizes, warps and stages must be positive integers, got {numbers}")
    if any(number & (number - 1) for number in (dim, bm, bn, warps)) or min(bm, bn) < 16 or warps > 32 or stages > 8:
        raise ValueError(
            f"tiles must be powers of two of at least 16, warps of at most 32, stages at most 8, got {numbers[1:]}"
        )
    registers = entry["most_registers"]
    if not isinstance(registers, int) or (registers and not 32 <= registers <= 255):
        raise ValueError(f"most_registers must be 0 or an integer from 32 to 255, got {registers!r}")
    return (str(entry["kernel"]), dim, entry["dtype"]), Config(bm, bn, warps, stages, registers)
