"""What this device does at best: copy bandwidth, matrix rate, exponential rate, the cost of a call. Measured once.

    python -m dsmr_kernels.costing.ceilings             # the table; measures if nothing is cached for this device
    python -m dsmr_kernels.costing.ceilings --check     # predicted beside measured attention, over shapes and dtypes

The figures are kept in the user's cache directory (`DSMR_CACHE_DIR`, else `XDG_CACHE_HOME`/dsmr, else ~/.cache/dsmr),
under the device, its threads, the version of PyTorch and a digest of the kernels. Each is the best of several rounds:
what else the machine does can only make a round slower. The load that others caused is kept beside them; figures taken
under load are measured again when the machine is quieter.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.backends.sdpa.processor import multiplies_bfloat16
from dsmr_kernels.costing.cost import Call
from dsmr_kernels.costing.load import cores, in_words, load_average, load_of_others
from dsmr_kernels.costing.predict import PARTS, Ceilings, bound_seconds, with_edge
from dsmr_kernels.costing.prediction_check import check, check_table
from dsmr_kernels.costing.timed_attention import DTYPES, timed_attention
from dsmr_kernels.costing.timing import Yardstick, seconds_of
from dsmr_kernels.measured import SUM, is_whole, sealed
from dsmr_kernels.storage import write_text

ROUNDS = 7
# Sizes by kind of device: elements copied, side of the matrices, and the attention calls that shares are taken from.
COPIED = {"cpu": 2**25, "cuda": 2**28}
SIDE = {"cpu": 2048, "cuda": 8192}
REFERENCE = {
    "cpu": {"batch": 1, "heads": 8, "queries": 512, "held": 4096},
    "cuda": {"batch": 16, "heads": 16, "queries": 1024, "held": 8192},
}
NARROW, WIDE = 32, 128
# A rough measurement, of a second or two on two CPU cores: by how much its sizes are divided, and its rounds.
ROUGH = {"copied": 4, "side": 4, "batch": 1, "heads": 4, "queries": 2, "held": 4}
ROUGH_ROUNDS = 2
# Below so much load a core, figures that were disturbed nevertheless are not measured again: it would not help.
LITTLE_LOAD = 0.1


def device_name(device: torch.device) -> str:
    """The device as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def kernels_digest() -> str:
    """Changes whenever the code of a backend does, and with it what the kernels attain."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "backends").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# --- The cache ----------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where the figures of all devices are kept."""
    if folder := os.environ.get("DSMR_CACHE_DIR"):
        return Path(folder) / "ceilings.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dsmr" / "ceilings.json"


def _key(device: torch.device) -> str:
    backend = os.environ.get("DSMR_BACKEND") or "default"
    return (
        f"{device.type}: {device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{backend} kernels {kernels_digest()}"
    )


def _read() -> dict[str, Any]:
    """All that is cached; nothing if the file is missing or damaged."""
    try:
        values = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory, or nested too deeply
        return {}
    if not is_whole(values):
        return {}
    return {key: value for key, value in values.items() if key != SUM}


def load(device: torch.device) -> Ceilings | None:
    """The cached figures of this device and these versions, or None."""
    try:
        return Ceilings.from_json(_read()[_key(device)])
    except (KeyError, TypeError):
        return None


def save(ceilings: Ceilings, device: torch.device) -> None:
    """Keep the figures, in one step, beside those of other devices; `OSError` or `RuntimeError` if that cannot be."""
    write_text(cache_file(), json.dumps(sealed(_read() | {_key(device): ceilings.to_json()}), indent=1))


def ceilings_of(
    device: torch.device,
    *,
    refresh: bool = False,
    rough: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> Ceilings:
    """The device's figures: those cached, or else measured now (seconds) and cached.

    Figures that were measured under load are measured again if there is half as much load now, or less.

    Args:
        refresh: measure also where figures are cached.
        rough: at once: those cached, however they came about, or else rough ones that are not kept.
        say: told in one sentence where figures under load are measured, or measured again, and where they could not be
            kept; they are returned all the same.
    """
    kept = None if refresh else load(device)
    if rough:
        return kept or measure(device, rough=True)
    if kept is not None and not _quieter(kept, load_average()):
        return kept
    if kept is not None:
        say(
            f"the ceilings were measured under load ({kept.disturbed}); the machine is quieter now, so they are "
            "measured again"
        )
    found = measure(device)
    if kept is not None and found.disturbed and (found.load or 0.0) >= (kept.load or 0.0):
        say("the load came back while the ceilings were measured again; those of before are used")
        return kept
    if found.disturbed:
        say(
            f"the ceilings were measured under load ({found.disturbed}), so predictions may be too slow; they are "
            "measured again when the machine is quieter"
        )
    try:
        save(found, device)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        say(f"the measured ceilings were not kept, because {cache_file().parent} cannot be written: {reason}")
    return found


def _quieter(kept: Ceilings, now: float | None) -> bool:
    """Whether figures that were disturbed can be had better now: half the load, so that it is not tried forever."""
    if kept.disturbed is None or kept.load is None or now is None:
        return False
    return kept.load >= LITTLE_LOAD * kept.cores and now <= kept.load / 2


# --- Measuring ----------------------------------------------------------------------------------------------------


def measure(device: torch.device, *, rough: bool = False) -> Ceilings:
    """Measure everything; some ten seconds on two quiet CPU cores, longer where others use them too, a second or two if
    a `rough` answer will do."""
    before = load_average()
    yardstick = Yardstick(device, 1 if rough else None)
    most = ROUGH_ROUNDS if rough else ROUNDS
    sizes = {"copied": COPIED[device.type], "side": SIDE[device.type], **REFERENCE[device.type]}
    if rough:
        sizes = {name: max(size // ROUGH[name], 1) for name, size in sizes.items()}

    def best(call: Callable[[], Any], rounds: int = most) -> float:
        return yardstick.fastest(lambda: (min(seconds_of(call, device, rounds=rounds)),))[0][0]

    source = torch.ones(sizes["copied"], device=device)
    target = torch.empty_like(source)
    copy_bytes = 2 * source.nbytes / best(lambda: target.copy_(source))
    cached = torch.zeros(256 * 1024, device=device) if device.type == "cpu" else target
    exponentials = cached.numel() / best(lambda: torch.exp2(cached, out=cached), 50)
    small, weight = torch.zeros(1, 16, device=device), torch.zeros(16, 16, device=device)
    with torch.no_grad():
        operator_seconds = best(lambda: _operators(small, weight), 50) / 24
    matrix: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        side = sizes["side"]
        if name == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16():
            dtype = torch.float32  # what products there are computed in
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        matrix[name] = 2 * side**3 / best(functools.partial(torch.mm, a, b, out=product))
    bare = Ceilings(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        kernels=kernels_digest(),
        copy_bytes=copy_bytes,
        matrix_flops=matrix,
        exponentials=exponentials,
        operator_seconds=operator_seconds,
    )
    start = _start_seconds(device, yardstick)
    attained = {name: _attained(bare, start, yardstick, name, sizes, most) for name in DTYPES}
    others = load_of_others(before, load_average(), torch.get_num_threads() if device.type == "cpu" else 1)
    known = replace(bare, attention_seconds=start, attained=attained)
    return replace(known, load=others, cores=cores(), spread=yardstick.spread)


def _operators(x: Tensor, weight: Tensor) -> None:
    """Twenty-four operators such as a model is made of, on next to nothing."""
    for _ in range(4):
        y = torch.nn.functional.linear(x, weight)
        y = torch.nn.functional.layer_norm(y, y.shape[-1:])
        y = torch.nn.functional.gelu(y.unflatten(-1, (2, -1)).transpose(0, 1).flatten())


def _start_seconds(device: torch.device, yardstick: Yardstick) -> dict[str, float]:
    """Of a part of a call with next to no work: one segment behind a memory, two parts."""
    call = Call(8, 8, held=8, head_dim=8)
    (forward, backward), _ = yardstick.fastest(lambda: timed_attention(call, device, torch.float32, 30))
    parts = sum(work.calls for work in PARTS["forward"](call).values())
    return {"forward": forward / parts, "backward": backward / parts}


def split_pair(narrow: float, wide: float, least_slope: float, least_rest: float) -> tuple[float, float]:
    """What a pair takes for each element of a head, and beside that, from the seconds of a pair at two widths; neither
    below what the device's best rates allow, and then the other as fits both widths best."""
    slope = (wide - narrow) / (WIDE - NARROW)
    rest = narrow - NARROW * slope
    if rest < least_rest:
        rest = least_rest
        slope = ((narrow - rest) / NARROW + (wide - rest) / WIDE) / 2
    if slope < least_slope:
        slope = least_slope
        rest = ((narrow - NARROW * slope) + (wide - WIDE * slope)) / 2
    return slope, max(rest, least_rest)


def edges_of(short: tuple[int, float], long: tuple[int, float]) -> list[float]:
    """Keys more a query on the causal edge, from the (queries, seconds) of two calls without memory: those whose pairs,
    m * (m + 1) / 2 + m * min(edge, (m - 1) / 2), take as long in the one as in the other. One below the short call's
    limit explains the two as well as one above it does, so both are given."""
    (m, brief), (n, lasting) = short, long
    slope = max(2 * (lasting / n - brief / m) / (n - m), 1e-30)
    below, above = lasting / n / slope - (n + 1) / 2, lasting / n * m * m / brief - (n + 1) / 2
    limit = (m - 1) / 2
    return [min(max(below, 0.0), limit), min(max(above, limit), (n - 1) / 2)]


def _attained(
    bare: Ceilings, start: dict[str, float], yardstick: Yardstick, dtype: str, sizes: dict[str, int], rounds: int
) -> dict[str, dict[str, float]]:
    """The shares of `Ceilings.attained`.

    A pair behind a memory takes a + b * head_dim seconds: two widths tell what products and what exponentials take. Of
    m queries without a memory, two lengths tell the edge.
    """
    device = yardstick.device
    batch, heads, queries, held = (sizes[name] for name in ("batch", "heads", "queries", "held"))

    def timed(queries: int, held: int, head_dim: int) -> tuple[Call, list[float]]:
        call = Call(queries, held, held=held, batch=batch, heads=heads, kv_heads=heads, head_dim=head_dim)
        seconds, _ = yardstick.fastest(lambda: timed_attention(call, device, DTYPES[dtype], rounds))
        parts = [sum(work.calls for work in PARTS[direction](call).values()) for direction in PARTS]
        return call, [
            max(total - calls * start[direction], 0.1 * total)
            for total, calls, direction in zip(seconds, parts, PARTS, strict=True)
        ]

    found = {}
    behind = {dim: (timed(queries, 0, dim), timed(queries, held, dim)) for dim in (NARROW, WIDE)}
    (short, brief), (long, lasting) = timed(queries // 2, 0, 64), timed(2 * queries, 0, 64)
    for number, direction in enumerate(PARTS):
        pair = {}  # seconds of a pair of a query and a key in the memory
        for dim, ((_, alone), (call, more)) in behind.items():
            past = PARTS[direction](call)["past"]
            pair[dim] = max(more[number] - alone[number], 0.1 * more[number]) / past.exponentials
        products = past.flops / past.exponentials / WIDE  # operations for each element of a head
        slope, rest = split_pair(pair[NARROW], pair[WIDE], products / bare.matrix_flops[dtype], 1 / bare.exponentials)
        rates = (products / bare.matrix_flops[dtype] / slope, 1 / bare.exponentials / rest)
        m, n = short.queries, long.queries
        part, fits = PARTS[direction](long)["own"], []
        for edge in edges_of((m, brief[number]), (n, lasting[number])):
            own = bound_seconds(with_edge(long, part, edge), bare, dtype, *rates) / lasting[number]
            fits.append((abs(math.log(own)), own, edge))
        _, own, edge = min(fits)  # a pair of the segment should cost about what a pair of the memory does
        found[direction] = {"products": rates[0], "exponentials": rates[1], "own": own, "edge": edge}
    return found


# --- The program --------------------------------------------------------------------------------------------------


def table(found: Ceilings) -> str:
    """The figures as lines of text."""
    lines = [
        f"{found.device}, {found.threads} threads, torch {found.torch}, kernels {found.kernels}",
        f"  copy, read and written   {found.copy_bytes / 1e9:10.1f} GB/s",
        *(f"  matrix product, {name:9s}{rate / 1e9:10.1f} GFLOP/s" for name, rate in found.matrix_flops.items()),
        f"  exponentials             {found.exponentials / 1e9:10.2f} G/s",
        f"  one small operator       {1e6 * found.operator_seconds:10.1f} µs",
        *(f"  a part of an attention {pass_:9s}{1e6 * s:8.1f} µs" for pass_, s in found.attention_seconds.items()),
        "  the attention kernels attain, of these rates; the segment's own pairs; keys more a query on the edge:",
        *(
            f"    {dtype:9s} {direction:9s} products {100 * share['products']:.0f} %, exponentials "
            f"{100 * share['exponentials']:.0f} %; own {100 * share['own']:.0f} %; edge {share['edge']:.0f}"
            for dtype, directions in found.attained.items()
            for direction, share in directions.items()
        ),
        *([] if found.load is None else [f"  load of others meanwhile {in_words(found.load, found.cores)}"]),
        *([f"  measured under load: {found.disturbed}"] if found.disturbed else []),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m dsmr_kernels.costing.ceilings", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--refresh", action="store_true", help="measure again, whatever is cached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="measure again, and compare predictions with calls")
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if device.type not in SIDE:
        print(f"device must be one of {', '.join(SIDE)}, got {options.device!r}", file=sys.stderr)
        return 1
    found = ceilings_of(
        device, refresh=options.refresh or options.check, say=lambda sentence: print(sentence, file=sys.stderr)
    )
    if options.check:
        rows = check(found, device, progress=lambda line: print(line, file=sys.stderr, flush=True))
        print(json.dumps(rows, indent=1) if options.json else table(found) + "\n" + check_table(rows))
    else:
        print(json.dumps(found.to_json(), indent=1) if options.json else table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
