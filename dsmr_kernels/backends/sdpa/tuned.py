"""Which engine makes a pass: the one of the table in `processor`, or what `dsmr_kernels.tools.tune` measured and wrote.

The environment variable DSMR_TUNED_CPU names such a file. It serves the processor, the instruction set, the version of
PyTorch and the engines that it was made with and nothing else; whatever does not fit is refused in one sentence.
"""

import functools
import hashlib
import importlib
import inspect
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from dsmr_kernels.backends.sdpa.processor import EVERYWHERE, Choice, Engine, Key, Pass, from_table, instruction_set
from dsmr_kernels.measured import read_measured

FORMAT = 1
VARIABLE = "DSMR_TUNED_CPU"
AGAIN = "python -m dsmr_kernels.tools.tune --device cpu"
_WORDS = {
    "processor": "for",
    "instruction_set": "with",
    "torch": "with torch",
    "sources": "with engines of source hash",
}


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


@functools.cache
def this_machine() -> dict[str, str]:
    """What a file must agree with."""
    digest = hashlib.sha256()
    for name in ("plan", "flash", "products", "workers"):
        digest.update(inspect.getsource(importlib.import_module(f"dsmr_kernels.backends.sdpa.{name}")).encode())
    return {
        "processor": processor_name(),
        "instruction_set": instruction_set(),
        "torch": torch.__version__,
        "sources": digest.hexdigest()[:16],
    }


def read(path: str | os.PathLike[str], machine: dict[str, str] | None = None) -> dict[Key, Choice]:
    """Read a file and check that it was made here.

    Args:
        path: the file.
        machine: what it must agree with; default `this_machine()`.

    Raises:
        ValueError: in one sentence, if the file is missing, damaged, or was made for something else.
    """
    machine = this_machine() if machine is None else machine
    return read_measured(path, "tuned engines", FORMAT, machine, _WORDS, AGAIN, _entries)


def _entries(content: dict[str, Any]) -> dict[Key, Choice]:
    return dict(_entry(entry) for entry in content["entries"])


def _entry(entry: dict[str, Any]) -> tuple[Key, Choice]:
    names = {str(dtype).removeprefix("torch."): dtype for dtype, _ in EVERYWHERE}
    for name in ("dtype", "computed_in"):
        if entry[name] not in names:
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {entry[name]!r}")
    dtype, of, choice = names[entry["dtype"]], entry["pass"], Choice(entry["engine"], names[entry["computed_in"]])
    if (dtype, of) not in EVERYWHERE:
        raise ValueError(f"pass must be forward or backward, got {of!r}")
    if choice.engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, got {choice.engine!r}")
    if choice not in candidates(dtype, of):
        raise ValueError(f"{choice.engine} cannot make the {of} of {entry['dtype']} in {entry['computed_in']}")
    return (dtype, of), choice


def candidates(dtype: torch.dtype, of: str) -> list[Choice]:
    """What can make a pass over inputs of `dtype`: in this dtype, or wider where it is a narrow one."""
    if dtype == torch.float64:  # more than the kernel's log-sum-exp holds
        return [Choice("products", dtype)]
    wider = [dtype] if dtype == torch.float32 else [dtype, torch.float32]
    flash = [Choice("flash", computed_in) for computed_in in wider] if of == "forward" else []
    # The range of float16 is too small for a pivot.
    return flash + [Choice("products", computed_in) for computed_in in wider if computed_in != torch.float16]


def from_environment() -> dict[Key, Choice]:
    """What the file that DSMR_TUNED_CPU names says; nothing if it names none.

    Raises:
        ValueError: in one sentence, if it cannot be used; with DSMR_TUNED_FALLBACK=1 that is a warning.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return {}
    try:
        return read(path)
    except ValueError as error:
        if os.environ.get("DSMR_TUNED_FALLBACK") != "1":
            raise
        warnings.warn(f"{error}; the fixed table is used", stacklevel=2)
        return {}


_measured: dict[Key, Choice] | None = None  # None: nobody has asked yet whether there is a file


def use(entries: Mapping[Key, Choice] | None) -> None:
    """Let these stand in the table's place; None: read the file that DSMR_TUNED_CPU names, if any, at the next call."""
    global _measured
    _measured = None if entries is None else dict(entries)


def choose(dtype: torch.dtype, of: Pass) -> Choice:
    """Who makes a pass over inputs of `dtype`.

    Raises:
        ValueError: in one sentence, if DSMR_TUNED_CPU names a file that cannot be used here.
    """
    global _measured
    if _measured is None:
        _measured = from_environment()
    return _measured.get((dtype, of)) or from_table(dtype, of)
