"""Tile sizes, warps and pipeline stages by architecture, head dimension and dtype: fixed, so that runs reproduce.

The choice is deterministic and needs no tuning. `python -m dsmr_kernels.aot` compiles every entry for every target
without a GPU and shows what it takes; an entry that spills registers is not kept, but for one: the forward in float32
at head_dim 256 on sm_89 spills 16 bytes whatever the tile.
"""

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
    256: _FLOAT32[256],
}
_CDNA_FLOAT32 = {
    64: {"forward": Config(32, 32, 4, 1), "dq": Config(32, 32, 4, 1), "dkv": Config(32, 32, 4, 1)},
    128: {"forward": Config(16, 32, 4, 1), "dq": Config(16, 32, 4, 1), "dkv": Config(16, 32, 4, 1)},
    256: {"forward": Config(16, 16, 4, 1), "dq": Config(16, 16, 4, 1), "dkv": Config(16, 16, 4, 1)},
}
TABLE = {"sm_80": _AMPERE, "sm_89": _ADA, "sm_90": _HOPPER, "gfx942": _CDNA, "default": _ADA, "gfx": _CDNA}
_INTERPRETER = Config(16, 16, 4, 1)  # small, so that tests of few tokens have several blocks


def choose(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel: "forward", "dq" or "dkv"."""
    if architecture == "interpreter":
        return _INTERPRETER
    amd = architecture.startswith("gfx")
    if dtype == torch.float32:
        sizes = _CDNA_FLOAT32 if amd else _ADA_FLOAT32 if architecture == "sm_89" else _FLOAT32
    else:
        sizes = TABLE.get(architecture, TABLE["gfx" if amd else "default"])
    return sizes[max(64, padded(head_dim))][kernel]


# Decoding: padded head_dim -> Config, for up to 16 stacked queries (a group's heads times the new tokens) and for more.
# Reading the ring is what takes the time, so a block is what keeps enough loads under way.
_DECODE = {
    64: (Config(16, 64, 4, 3), Config(32, 64, 4, 2)),
    128: (Config(16, 64, 4, 3), Config(32, 64, 4, 2)),
    256: (Config(16, 32, 4, 3), Config(32, 32, 8, 2)),
}
_CDNA_DECODE = {
    64: (Config(16, 64, 4, 1), Config(32, 64, 4, 1)),
    128: (Config(16, 64, 4, 1), Config(32, 64, 4, 1)),
    256: (Config(16, 32, 4, 1), Config(32, 32, 4, 1)),
}
_DECODE_FLOAT32 = {
    64: (Config(16, 32, 4, 1), Config(16, 32, 4, 1)),
    128: (Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
    256: (Config(16, 16, 8, 1), Config(16, 16, 8, 1)),
}


def choose_decode(architecture: str, head_dim: int, dtype: torch.dtype, stacked: int) -> Config:
    """The configuration of `decode_kernel` for `stacked` queries a KV head; `bm` is how many of them a tile takes."""
    if architecture == "interpreter":
        return _INTERPRETER
    half_precision = _CDNA_DECODE if architecture.startswith("gfx") else _DECODE
    sizes = _DECODE_FLOAT32 if dtype == torch.float32 else half_precision
    return sizes[max(64, padded(head_dim))][stacked > 16]


# What one step of `combine_kernel` takes in of the splits (bm), and one of `step_kernel` of the rows (bm) and of half a
# head (bn): both wait for memory, whatever the part.
COMBINE = Config(16, 0, 4, 1)
STEP_ELEMENTS = 1024


def choose_step(head_dim: int, rows: int) -> Config:
    """The configuration of `step_kernel` for `rows` heads times tokens."""
    half = padded(head_dim) // 2
    return Config(max(1, min(1 << (rows - 1).bit_length(), STEP_ELEMENTS // half)), half, 4, 1)
