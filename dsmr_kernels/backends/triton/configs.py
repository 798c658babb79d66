"""Tile sizes, warps and pipeline stages by architecture, head dimension and dtype: fixed, so that runs reproduce.

The choice is deterministic and needs no tuning. `python -m dsmr_kernels.tools.aot` compiles every entry for every
target without a GPU and shows what it takes; an entry that spills registers is kept only where a GPU showed it to be
the faster. Behind each entry stands why it is not another: as far as compiling tells, or, on Hopper, as measured; a GPU
at hand tells more (`python -m dsmr_kernels.tools.tune`).

The kernels' loops, but for dK and dV up to head_dim 64, recompute addresses rather than hold them (`disable_licm`): the
accumulators leave no registers for what would be hoisted, and it spills.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

HEAD_DIMS = (16, 256)  # the least and the greatest that the kernels serve
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INT8 = ("forward_int8", "dq_int8", "decode_int8")
DECODING = ("decode", "decode_many", "step")
TOGETHER = ("merge", "sum")
BY_DISTANCE = ("table", "bucket")  # beside "dbias"


@dataclass(frozen=True)
class Config:
    """One kernel's launch: queries and keys of a tile, warps, software-pipelining stages.

    `most_registers` of a thread, on NVIDIA's parts; 0 leaves it to their assembler, which in small tiles aims at more
    warps a multiprocessor than there is use for, and spills to get there: a limit, however high, makes it stop.

    `may_spill` bytes of stack: only where it was measured, on the part, to be faster than what spills nothing.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    most_registers: int = 0
    may_spill: int = 0

    def launch_options(self, architecture: str) -> dict[str, int]:
        """What Triton is told beside the tile."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if architecture.startswith("sm_") and self.most_registers:
            options["maxnreg"] = self.most_registers
        return options


def padded(head_dim: int) -> int:
    """The head dimension that is held in registers: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


# architecture -> padded head_dim -> kernel -> Config; head dimensions that have none take the entry of 64. Where the
# memory is int8, a block of keys is converted in registers, which with all of the keys spills: half of them are taken,
# but for the entries of `INT8`, where those spill, too. An entry "..._padded" is for head dimensions that are padded,
# and "..._biased" for calls with a learned bias where the other one spills with it; under Triton 3.6 three of those on
# Hopper still spill 8 to 32 bytes. "dbias" takes no more queries than keys, with a memory in int8 too.
Sizes = dict[int, dict[str, Config]]

_AMPERE: Sizes = {
    64: {
        "forward": Config(128, 64, 8, 2),  # four warps spill, with 64 queries too
        "dq": Config(128, 64, 8, 2),  # 256 queries or 128 keys spill
        "dkv": Config(16, 128, 8, 2),  # 32 queries a step spill, with 64 keys too
        "dq_int8": Config(64, 32, 8, 2),
        "dbias": Config(32, 64, 8, 2),  # 64 queries spill
        "forward_biased": Config(128, 64, 8, 2, 255),
        "forward_int8_biased": Config(64, 32, 8, 2),
    },
    128: {
        "forward": Config(64, 64, 8, 2),  # 128 queries spill
        "dq": Config(64, 64, 8, 2),  # 128 queries spill
        "dkv": Config(32, 64, 8, 2),  # 128 keys spill
        "dbias": Config(32, 64, 8, 2),  # 64 queries spill
        "forward_biased_padded": Config(64, 32, 8, 2),
    },
    256: {
        "forward": Config(64, 32, 8, 2),  # 128 queries or 64 keys spill
        "dq": Config(64, 32, 8, 1),  # a second stage spills with ALiBi
        "dkv": Config(16, 32, 8, 2),  # 64 keys spill with ALiBi, and so do four warps
        "forward_int8": Config(32, 16, 8, 2, 255),
        "dq_int8": Config(32, 16, 8, 1),
        "dbias": Config(16, 32, 8, 1),  # 32 queries spill
        "forward_biased_padded": Config(32, 32, 8, 2, 255),
        "dq_biased": Config(32, 32, 8, 1),
    },
}
# With eight warps the compiler keeps to 128 registers.
_AMPERE[32] = {**_AMPERE[64], "forward": Config(128, 64, 4, 2)}
# Likewise, on the youngest of the parts that use it.
_AMPERE[16] = {**_AMPERE[64], "dq": Config(128, 64, 4, 2, 255)}
# Measured on an H100 (docs/kernels.md): four warps, of which several programs share a multiprocessor, beat eight by a
# quarter to three quarters up to head_dim 64, and a third stage does at 128.
_HOPPER: Sizes = {
    64: {
        "forward": Config(128, 64, 4, 3, may_spill=64),  # 1.06 of the fastest clean one's speed, 1.5 of 128 x 128's
        "dq": Config(64, 64, 4, 3),  # 1.6 of the speed of 128 queries with eight warps and two stages
        "dkv": Config(64, 64, 4, 2, may_spill=192),  # 1.1 to 1.2 of the speed of 128 keys with eight warps
        "forward_int8": Config(64, 64, 4, 3),
        "dq_int8": Config(64, 64, 4, 3),
        "forward_split": Config(128, 64, 8, 3),
        "forward_int8_split": Config(128, 64, 8, 2),
        "dq_split": Config(128, 64, 8, 2),
        "dkv_split": Config(32, 128, 8, 2),
        "dbias": Config(64, 64, 4, 2),
        "forward_biased": Config(128, 64, 8, 2),
        "forward_int8_biased": Config(128, 32, 8, 2),
        "dq_biased": Config(128, 64, 8, 2),
        "dq_int8_biased": Config(128, 32, 8, 2),
        "dkv_biased": Config(32, 128, 8, 2),
    },
    128: {
        "forward": Config(128, 64, 8, 3),  # 1.1 to 1.9 times as fast as ten others
        "dq": Config(128, 64, 8, 3, may_spill=16),  # 1.26 of the speed of two stages
        "dkv": Config(32, 64, 4, 2, may_spill=112),  # 1.07 of the speed of 128 keys with eight warps
        "dkv_padded": Config(16, 128, 8, 2),
        "forward_int8": Config(64, 64, 8, 2),
        "dq_int8": Config(64, 32, 8, 2),
        "dbias": Config(64, 64, 8, 2),  # four warps spill with a memory in int8
        "forward_biased": Config(128, 32, 8, 2),
        "dkv_biased": Config(16, 128, 8, 2),
        "dkv_biased_padded": Config(16, 64, 8, 2),
    },
    256: {
        "forward": Config(128, 32, 8, 3, may_spill=64),  # twice as fast as the fastest clean one
        "dq": Config(128, 32, 8, 2, may_spill=32),  # twice as fast as the fastest that is clean under Triton 3.6
        # A second stage spills; with a bias, a padded head_dim spills 8 bytes, and every other tile tried more.
        "dkv": Config(16, 64, 8, 1),
        "forward_int8": Config(64, 16, 8, 2),
        "dq_int8": Config(64, 16, 8, 2),
        "dbias": Config(64, 64, 8, 1),
        "forward_biased": Config(64, 32, 8, 2),
        "forward_int8_biased": Config(64, 16, 8, 1),
        "dq_biased": Config(64, 32, 8, 2),
        "dq_int8_biased": Config(64, 16, 8, 2),
    },
}
_BLACKWELL: Sizes = {  # data-centre parts: accumulators lie in tensor memory, 512 columns of it
    64: {
        "forward": Config(128, 64, 8, 3, 255),  # without a limit the compiler keeps to 128 registers; 128 keys spill
        "dq": Config(128, 64, 8, 2),  # 256 columns: two blocks share an SM
        "dkv": Config(64, 128, 8, 1),  # a second stage, or 128 queries a step, spill
        "dbias": Config(64, 64, 4, 2),
    },
    128: {
        "forward": Config(128, 64, 8, 2),  # four warps spill; 128 keys are clean, in all of the tensor memory
        "dq": Config(128, 32, 8, 2),  # 256 columns and 104 registers: two blocks share an SM; 64 keys spill
        "dkv": Config(32, 128, 8, 1),  # 64 queries a step or a second stage spill
        "dbias": Config(64, 64, 8, 2),  # four warps spill
    },
    256: {
        "forward": Config(128, 32, 8, 2),  # 64 keys spill
        "dq": Config(64, 32, 8, 2),  # 128 queries spill with ALiBi, with 16 keys too
        "dkv": Config(32, 32, 8, 2),  # 64 keys, the least that tensor memory serves, spill: see OLDER_INSTRUCTIONS
        "forward_int8": Config(64, 32, 8, 2),
        "forward_biased": Config(64, 32, 8, 2),  # 128 queries spill, with one stage, too
        "dbias": Config(64, 64, 8, 1),
    },
}
_CDNA: Sizes = {  # 64 KiB of shared memory, no asynchronous copies to pipeline: one stage
    64: {
        "forward": Config(128, 64, 4, 1),  # the largest of the clean tiles tried
        "dq": Config(64, 64, 4, 1),  # likewise
        "dkv": Config(64, 64, 4, 1),  # likewise
        "dbias": Config(64, 64, 4, 1),
    },
    128: {
        "forward": Config(128, 64, 4, 1),  # likewise
        "dq": Config(64, 32, 4, 1),  # 64 keys spill with everything compiled in
        "dkv": Config(32, 64, 4, 1),  # likewise
        "dbias": Config(32, 32, 4, 1),
    },
    256: {
        "forward": Config(64, 16, 4, 1),  # 32 keys spill with everything compiled in
        "dq": Config(32, 16, 4, 1),  # likewise
        "dkv": Config(32, 32, 4, 1),  # likewise
        "dbias": Config(16, 16, 4, 1),
    },
}
# Float32 is computed in exact arithmetic, without matrix units, for checking: small tiles, and the clean ones at that.
_FLOAT32: Sizes = {
    64: {
        "forward": Config(16, 16, 4, 1, 255),  # 32 keys spill at head_dim 16 and on Ada
        "dq": Config(32, 32, 8, 1, 255),  # four warps spill
        "dkv": Config(32, 32, 8, 1, 255),  # four warps spill under Triton 3.6
        "dbias": Config(32, 32, 8, 1, 255),
        "merge": Config(16, 0, 4, 1, 255),  # without a limit it spills on Ampere
    },
    128: {
        "forward": Config(16, 16, 8, 1, 255),  # 32 queries spill on Ada
        "dq": Config(16, 16, 4, 1, 255),  # the largest of the clean tiles tried
        "dkv": Config(32, 32, 8, 1, 255),  # likewise
        "dbias": Config(16, 16, 4, 1, 255),
    },
    256: {
        "forward": Config(16, 16, 8, 2, 255),  # with one stage, or other warps, the compiler spills 8 to 32 bytes
        "forward_int8": Config(16, 16, 8, 1, 255),
        "dq": Config(16, 16, 8, 1, 255),  # the least tile
        "dkv": Config(16, 32, 16, 1, 128),  # with 16 keys, or fewer warps, the compiler spills 8 to 16 bytes
        "dbias": Config(16, 16, 8, 1, 255),
    },
}
_CDNA_FLOAT32: Sizes = {  # the largest of the clean tiles tried, and at 256 the least that there is
    64: dict.fromkeys(("forward", "dq", "dkv", "dbias"), Config(32, 32, 4, 1)),
    128: dict.fromkeys(("forward", "dq", "dkv", "dbias"), Config(16, 32, 4, 1)),
    256: dict.fromkeys(("forward", "dq", "dkv", "dbias"), Config(16, 16, 4, 1)),
}
# Ada and workstation Blackwell multiply as Ampere does: its tiles fit their 99 KiB of shared memory, too.
TABLE = {
    "sm_80": _AMPERE, "sm_89": _AMPERE, "sm_90": _HOPPER, "sm_100": _BLACKWELL, "sm_120": _AMPERE, "gfx942": _CDNA,
}  # fmt: skip
FLOAT32_TABLE = {name: _CDNA_FLOAT32 if name.startswith("gfx") else _FLOAT32 for name in TABLE}
# (kernel, architecture, padded head_dim) where no clean tile uses the fast matrix instructions: the older ones serve.
OLDER_INSTRUCTIONS = {("dkv", "sm_100", 256)}


# Decoding. "decode" takes up to 16 stacked queries (a group's heads times the new tokens), "decode_many" more of them;
# reading the ring is what takes the time, so a block is what keeps enough loads under way. "step" takes `bm`
# rows and `bn` elements of half a head, and waits for memory, whatever the part.
# At head_dim 64, with lower limits than these, some variants spill under Triton 3.6 or 3.7.
_DECODE = {
    64: {"decode": Config(16, 64, 4, 3, 168), "decode_many": Config(32, 64, 4, 2, 200)},
    128: {
        "decode": Config(16, 64, 4, 3),
        "decode_many": Config(32, 64, 4, 2, 255),  # without a limit it spills where a row has one query
        "decode_many_biased": Config(32, 32, 4, 2, 255),
    },
    256: {"decode": Config(16, 32, 4, 3), "decode_many": Config(32, 32, 8, 2, 255)},
}
# Measured on an H100: 32 streams' rings in int8 are read 1.5 times as fast by two warps.
_HOPPER_DECODE = _DECODE | {64: _DECODE[64] | {"decode_int8": Config(16, 64, 2, 3)}}
# Under a limit of 200 registers ALiBi or a bias spills 48 to 56 bytes here; under 255 as many blocks fit.
_BLACKWELL_DECODE = _DECODE | {64: _DECODE[64] | {"decode_many": Config(32, 64, 4, 2, 255)}}
# Three stages spill, and so do two without a limit where a row has one query.
_ADA_DECODE = _DECODE | {128: _DECODE[128] | {"decode": Config(16, 64, 4, 2, 255)}}
# On Ampere alone 64 keys spill 8 bytes with a memory in int8 and a bias, and on workstation Blackwell with a bias.
_AMPERE_DECODE = _ADA_DECODE | {128: _ADA_DECODE[128] | {"decode_int8_biased": Config(16, 32, 4, 3)}}
_WORKSTATION_DECODE = _ADA_DECODE | {64: _ADA_DECODE[64] | {"decode_biased": Config(16, 32, 4, 3, 168)}}
_CDNA_DECODE = {
    64: {"decode": Config(16, 64, 4, 1), "decode_many": Config(32, 64, 4, 1)},
    128: {"decode": Config(16, 64, 4, 1), "decode_many": Config(32, 64, 4, 1)},
    256: {"decode": Config(16, 32, 4, 1), "decode_many": Config(32, 32, 4, 1)},
}
_DECODE_FLOAT32 = {
    # Four warps spill on Ampere, and with a bias and a memory in int8 on every part; eight without a limit on Hopper.
    64: {"decode": Config(16, 32, 8, 1, 255), "decode_many": Config(16, 32, 8, 1, 255)},
    128: {"decode": Config(16, 32, 8, 1, 255), "decode_many": Config(16, 32, 8, 1, 255)},
    256: {"decode": Config(16, 16, 8, 1, 255), "decode_many": Config(16, 16, 8, 1, 255)},  # 32 keys spill in Triton 3.6
}
_DECODE_TABLE = {
    "sm_80": _AMPERE_DECODE,
    "sm_89": _ADA_DECODE,
    "sm_90": _HOPPER_DECODE,
    "sm_100": _BLACKWELL_DECODE,
    "sm_120": _WORKSTATION_DECODE,
    "gfx942": _CDNA_DECODE,
}
_TABLE = Config(0, 256, 4, 1)  # `bn` distances at a time
_BUCKET = Config(16, 256, 4, 1)  # `bm` columns of the bias, `bn` distances at a time
_STEP_ELEMENTS = 1024
# What puts the shares of a small grid together: "merge" takes `bm` rows, "sum" `bm` numbers. Both wait for memory.
_TOGETHER = {"merge": Config(16, 0, 4, 1), "sum": Config(1024, 0, 4, 1)}


def _for_decoding(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    if kernel == "step":
        half = padded(head_dim) // 2
        return Config(_STEP_ELEMENTS // half, half, 8 if half == 128 and dtype == torch.float32 else 4, 1, 128)
    sizes = _DECODE_FLOAT32 if dtype == torch.float32 else _DECODE_TABLE[family(architecture)]
    entry = sizes[max(64, padded(head_dim))]
    whole = kernel.replace("_int8", "")
    names = (kernel, whole, kernel.removesuffix("_biased"), whole.removesuffix("_biased"))
    return next(entry[name] for name in names if name in entry)


def family(architecture: str) -> str:
    """The part of the table that serves an architecture: itself, or the one that has no more than it has."""
    if architecture in TABLE:
        return architecture
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_10"):  # B300 beside B200
        return "sm_100"
    return "sm_80" if architecture == "sm_87" else "sm_89"


def unrolled(architecture: str) -> bool:
    """Whether each stretch of keys is walked by loops of its own (`walk`): on data-centre Blackwell, whose accumulators
    lie in tensor memory and would come into registers between the turns of an outer loop."""
    return family(architecture) == "sm_100"


_INTERPRETER = Config(16, 16, 4, 1)  # small, so that tests of few tokens have several blocks

generation = 0  # how often what `choose` answers has changed: what was worked out from it before is stale
_measured: dict[tuple[str, int, str], Config] = {}  # by `use`: (kernel, padded head_dim, dtype) -> Config
_trial: dict[str, Config] = {}  # by `trying`: kernel -> Config


def choose(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The configuration of a kernel: "forward", "dq", "dkv", "dbias", or one of `DECODING`, `TOGETHER` or of
    `BY_DISTANCE`; the table's, unless `use` was told of a measured one. See `named` for what else is in the name."""
    return _trial.get(kernel) or _choose(kernel, architecture, head_dim, dtype)


@functools.cache
def _choose(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    if architecture == "interpreter":
        return _TOGETHER.get(kernel, _INTERPRETER)
    measured = _measured.get((kernel, padded(head_dim), str(dtype).removeprefix("torch.")))
    return measured or from_table(kernel, architecture, head_dim, dtype)


def named(kernel: str, quantised: bool = False, biased: bool = False) -> str:
    """The name under which a kernel's configuration is chosen where the memory is int8 or a learned bias takes part;
    behind it stands "_split" where programs share a tile."""
    if quantised and kernel + "_int8" in INT8:
        kernel += "_int8"
    return kernel + "_biased" if biased else kernel


def from_table(kernel: str, architecture: str, head_dim: int, dtype: torch.dtype) -> Config:
    """The table's configuration of a kernel.

    Where programs share a tile, 128 queries with four warps lost keys on an H100 under Triton 3.6, though the PTX is
    right on the virtual GPU; with eight warps, or 64 queries, they agree there: such a tile has eight.
    """
    if kernel in BY_DISTANCE:
        return _TABLE if kernel == "table" else _BUCKET
    plain = kernel.removesuffix("_biased")
    if plain.removesuffix("_int8") in DECODING:
        return _for_decoding(kernel, architecture, head_dim, dtype)
    sizes = (FLOAT32_TABLE if dtype == torch.float32 else TABLE)[family(architecture)]
    entry = sizes.get(padded(head_dim), sizes[64])
    if kernel in TOGETHER:
        return entry.get(kernel, _TOGETHER[kernel])
    if kernel.endswith("_split"):
        tile = entry.get(kernel) or from_table(kernel.removesuffix("_split"), architecture, head_dim, dtype)
        return replace(tile, warps=8) if tile.bm >= 128 and tile.warps < 8 and architecture.startswith("sm_") else tile
    if kernel != plain:
        narrower = entry.get(f"{kernel}_padded") if padded(head_dim) != head_dim else None
        return narrower or entry.get(kernel) or from_table(plain, architecture, head_dim, dtype)
    if kernel in INT8 and kernel not in entry:
        whole = entry[kernel.removesuffix("_int8")]
        return replace(whole, bn=max(16, whole.bn // 2))
    if padded(head_dim) != head_dim:
        return entry.get(f"{kernel}_padded", entry[kernel])
    return entry[kernel]


def use(measured: dict[tuple[str, int, str], Config]) -> None:
    """From now on, use these configurations and for everything else the table's: see `dsmr_kernels.dispatch`."""
    global generation
    generation += 1
    _measured.clear()
    _measured.update(measured)
    _choose.cache_clear()


@contextlib.contextmanager
def trying(kernel: str, config: Config) -> Iterator[None]:
    """Launch `kernel` with `config` inside the block: for `dsmr_kernels.tools.tune`."""
    global generation
    generation += 1
    _trial[kernel] = config
    try:
        yield
    finally:
        generation += 1
        del _trial[kernel]
