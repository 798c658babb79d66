"""What the figures were measured on."""

import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from dsmr_kernels.backends.sdpa.processor import instruction_set
from dsmr_kernels.backends.sdpa.tuned import processor_name

_ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def package(name: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def describe(device: torch.device) -> dict[str, str]:
    """Device, versions, and driver and clocks as far as they can be read."""
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": package("triton"),
        "flash-attn": package("flash-attn"),
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["multiprocessors"] = str(properties.multi_processor_count)
        about["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        about |= _asked_of_the_driver(device.index or 0)
    elif device.type == "cpu":
        about |= processor()
    return about


def cores() -> int:
    """How many cores this process may use, which is fewer than the machine has where it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> dict[str, str]:
    """The processor, and what of it is in effect: the instruction set is the best that PyTorch uses here."""
    return {
        "processor": processor_name(),
        "instruction set": instruction_set(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }


def _asked_of_the_driver(index: int) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"driver": "cannot be read: there is no nvidia-smi"}
    command = [tool, f"--id={index}", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError) as error:
        return {"driver": f"cannot be read: {type(error).__name__}"}
    return dict(zip(_ASKED.split(","), (value.strip() for value in said.strip().split(",")), strict=False))


def slug(name: str) -> str:
    """A device's name as the name of a file: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"
