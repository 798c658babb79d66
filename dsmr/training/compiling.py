"""Whether `torch.compile` can work here: asked before a training that wants it begins, and answered in a sentence."""

import os
import shutil
import sys

import torch

from dsmr.console.words import one_line


def missing_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot make code for `device` on this machine; None where it can, which is tried."""
    if device.type == "cpu":
        named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(named) is None:
            return f"there is no C++ compiler: '{named}' is not installed (the environment variable CXX names another)"
    try:
        torch.compile(_tried, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of whatever kind the compiler's tools raise
        return f"torch.compile fails here: {one_line(error)}"
    return None


def _tried(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
