"""Tile sizes, warps and pipeline stages by architecture, head dimension and dtype: fixed, so that runs reproduce.

The choice is deterministic and needs no tuning. `python -m dsmr_kernels.aot` compiles every entry for every target
without a GPU and shows what it takes; an entry that spills registers is not kept, but for one: the forward in float32
at head_dim 256 on sm_89 spills 16 bytes whatever the tile.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

HEAD_DIMS = (16, 256)  # the least and the greatest that the kernels serve
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Config:
    """One kernel's launch: queries and keys of a tile, warps, software-pipelining stages."""

    bm: int
    bn: int
    warps: int
    stages: int


def padded(head_dim: int) -> int:
    """The head dimension that is held in registers: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


# architecture -> padded head_dim -> kernel -> Config; "default" and "gfx" serve parts that are not named. Each entry is
# the largest tile tried that is clean with every option compiled in. Hopper takes two warpgroups of matrix units,
# parts with less shared memory or fewer registers narrower tiles. Float32 runs in exact arithmetic, for checking: its
# tiles are small everywhere.
_AMPERE = {
    64: {"forward": Config(128, 64, 4, 2), "dq": Config(128, 64, 8, 2), "dkv": Config(32, 128, 8, 2)},
    128: {"forward": Config(64, 64, 8, 2), "dq": Config(64, 64, 8, 2), "dkv": Config(32, 64, 8, 2)},
    256: {"forward": Config(64, 32, 8, 2), "dq": Config(64, 32, 8, 2), "dkv": Config(32, 64, 8, 1)},
}
_ADA = {  # as Ampere, with less shared memory
    64: _AMPERE[64],
    128: _AMPERE[128],
    256: {"forward": Config(64, 32, 8, 2), "dq": Config(64, 32, 8, 1), "dkv": Config(32, 32, 8, 2)},
}
_HOPPER = {
    64: {"forward": Config(128, 128, 8, 2), "dq": Config(128, 64, 8, 2), "dkv": Config(64, 128, 8, 2)},
    128: {"forward": Config(128, 64, 8, 3), "dq": Config(128, 64, 8, 2), "dkv": Config(32, 128, 8, 2)},
    256: {"forward": Config(128, 32, 8, 2), "dq": Config(64, 32, 8, 2), "dkv": Config(16, 64, 8, 2)},
}
_CDNA = {
    64: {"forward": Config(128, 64, 4, 1), "dq": Config(64, 64, 4, 1), "dkv": Config(64, 64, 4, 1)},
    128: {"forward": Config(128, 64, 4, 1), "dq": Config(64, 64, 4, 1), "dkv": Config(32, 64, 4, 1)},
    256: {"forward": Config(64, 32, 4, 1), "dq": Config(32, 16, 4, 1), "dkv": Config(32, 32, 4, 1)},
}
_FLOAT32 = {
    64: {"forward": Config(16, 32, 4, 1), "dq": Config(32, 32, 4, 1), "dkv": Config(32, 32, 4, 1)},
    128: {"forward": Config(32, 16, 8, 1), "dq": Config(16, 16, 4, 1), "dkv": Config(32, 32, 8, 1)},
    256: {"forward": Config(16, 32, 8, 1), "dq": Config(16, 16, 8, 1), "dkv": Config(16, 16, 4, 1)},
}
_ADA_FLOAT32 = {
    64: {**_FLOAT32[64], "forward": Config(16, 16, 4, 1)},
    128: {**_FLOAT32[128], "forward": Config(16, 16, 8, 1)},
    256: {**_FLOAT32[256], "forward": Config(16, 16, 8, 2)},
}
_CDNA_FLOAT32 = {
    64: {"forward": Config(32, 32, 4, 1), "dq": Config(32, 32, 4, 1), "dkv": Config(32, 32, 4, 1)},
    128: {"forward": Config(16, 32, 4, 1), "dq": Config(16, 32, 4, 1), "dkv": Config(16, 32, 4, 1)},
    256: {"forward": Config(16, 16, 4, 1), "dq": Config(16, 16, 4, 1), "dkv": Config(16, 16, 4, 1)},
}
TABLE = {"sm_80": _AMPERE, "sm_89": _ADA, "sm_90": _HOPPER, "gfx942": _CDNA, "default": _ADA, "gfx": _CDNA}
FLOAT32_TABLE = {"sm_89": _ADA_FLOAT32, "gfx": _CDNA_FLOAT32, "default": _FLOAT32}
_INTERPRETER = Config(16, 16, 4, 1)  # small, so that tests of few tokens have several blocks

_asked: dict[tuple[str, int, str], Config] | None = None  # by `use_tuned`; None: not decided yet
_trial: dict[str, Config] = {}  # by `trying`: kernel -> Config


def choose(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel: "forward", "dq" or "dkv".

    The table's, unless the environment variable DSMR_TUNED or `use_tuned` names a file of measured ones.
    """
    return _trial.get(kernel) or _choose(kernel, architecture, head_dim, dtype)


@functools.cache
def _choose(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    if architecture == "interpreter":
        return _INTERPRETER
    path = os.environ.get("DSMR_TUNED")
    if _asked is None and path:
        use_tuned(path, architecture=architecture, fallback=os.environ.get("DSMR_TUNED_FALLBACK") == "1")
    tuned = (_asked or {}).get((kernel, padded(head_dim), str(dtype).removeprefix("torch.")))
    return tuned or from_table(kernel, architecture, head_dim, dtype)


def from_table(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The table's configuration of a kernel."""
    tables = FLOAT32_TABLE if dtype == torch.float32 else TABLE
    sizes = tables.get(architecture, tables["gfx" if architecture.startswith("gfx") else "default"])
    return sizes[max(64, padded(head_dim))][kernel]


def use_tuned(
    path: str | os.PathLike[str] | None,
    *,
    architecture: str | None = None,
    fallback: bool = False,
    machine: dict[str, str] | None = None,
) -> None:
    """Use the configurations that `python -m dsmr_kernels.tune` wrote to `path`; None: the table again, whatever
    the environment says.

    Args:
        path: the file.
        architecture: of the GPU that will run, as the table names it; default: whatever the file says.
        fallback: warn and use the table where the file cannot be used, rather than raise.
        machine: what the file must agree with, for tests; default: this machine.

    Raises:
        ValueError: in one sentence, if the file is missing, damaged or was made for something else.
    """
    from dsmr_kernels.backends.triton import tuned

    global _asked
    entries: dict[tuple[str, int, str], Config] = {}
    if path is not None:
        try:
            found = tuned.read(path, machine)
            if architecture not in (None, found.architecture):
                raise ValueError(
                    f"tuned configurations {path} are for {found.architecture}, this GPU is {architecture}"
                )
            entries = found.entries
        except ValueError as error:
            if not fallback:
                raise
            warnings.warn(f"{error}; the fixed table is used", stacklevel=2)
    _asked = entries
    _choose.cache_clear()


@contextlib.contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Launch `kernel` with `config` inside the block: for `dsmr_kernels.tune`."""
    _trial[kernel] = config
    try:
        yield
    finally:
        del _trial[kernel]
