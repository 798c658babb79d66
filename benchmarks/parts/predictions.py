"""What the GPU comparison should show, from counted operations and bytes and a GPU's ceilings: to be held against it.

A pass must do its matrix products, one exponential and some additions for each visible pair, and move its bytes:

    fast       everything overlaps: the longest of products, exponentials and bytes
    expected   the exponentials wait for the products, as in kernels whose warps do both
    slow       and so do the additions, comparisons and conversions around them

Products are those of the visible pairs, spread over the multiprocessors in whole waves; bytes are each input read and
each output written once, and for a peer the concatenation read and written. Ceilings are datasheet figures; the rates
that kernels reach of them are what has been published for their kind, and are assumptions here.
"""

import math
from dataclasses import dataclass
from typing import Any

from benchmarks.parts.contenders import Shape
from benchmarks.parts.goals import LONG_64, LONG_128, OURS, PIECE, SEGMENTS, TRAINING, goals, piece_label
from dsmr_kernels.costing.cost import attention_flops, visible_pairs

Row = dict[str, Any]
BYTES = 2  # of an element in bfloat16


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits.

    Attributes:
        dense: FLOP/s of the matrix units in bfloat16, datasheet. warpgroup, warp: what kernels reach of it through
            warpgroup instructions (ours, Flex, cuDNN) and through the older ones (flash, efficient), assumed.
            specialised: by warps of which some load while others compute: FlashAttention 3's whole forward is published
            at up to 740e12 (Shah et al., 2024), its exponentials hidden behind the products.
        exponentials, lanes: per second, multiprocessors x units x boost clock.
        bandwidth: bytes/s of device memory, datasheet. launch: seconds between two kernels in a stream, assumed.
        host_ours, host_torch, host_pass: seconds of Python for a launch of ours, for an operator of PyTorch's, and
            for entering autograd once, assumed; a slow CPU, with a driver that does nothing, took 25 for the first.
    """

    name: str
    multiprocessors: int
    dense: float
    warpgroup: float
    warp: float
    specialised: float
    exponentials: float
    lanes: float
    bandwidth: float
    launch: float
    host_ours: float
    host_torch: float
    host_pass: float


H100 = Ceilings(
    name="NVIDIA H100 SXM5",
    multiprocessors=132,
    dense=989e12,
    warpgroup=650e12,
    warp=400e12,
    specialised=740e12,
    exponentials=132 * 16 * 1.755e9,
    lanes=132 * 128 * 1.755e9,
    bandwidth=3.35e12,
    launch=2e-6,
    host_ours=15e-6,
    host_torch=8e-6,
    host_pass=20e-6,
)
LANE_OPERATIONS = 5  # for each pair: maximum, scaling and subtraction in one, sum, a conversion, about


@dataclass(frozen=True)
class Work:
    """What one kernel does.

    Attributes:
        bytes: moved at least. flops: of the matrix products. pairs: query-key pairs over all heads, an exponential
            each. blocks: thread blocks, spread over the multiprocessors in whole waves.
    """

    bytes: float
    flops: float = 0.0
    pairs: float = 0.0
    blocks: int = 1


@dataclass(frozen=True)
class Sizes:
    """A shape, counted: pairs over all rows and heads, and bytes of its tensors."""

    shape: Shape
    segments: int = 1

    @property
    def _one(self) -> int:
        return self.shape.batch * self.shape.heads * self.segments

    @property
    def own_pairs(self) -> float:
        """Pairs within a query's own segment."""
        return self._one * visible_pairs(self.shape.queries, horizon=0, segment_length=None)

    @property
    def pairs(self) -> float:
        return self._one * self.shape.queries * self.shape.memory + self.own_pairs

    @property
    def all_pairs(self) -> float:
        """Pairs, whether visible or not."""
        return float(self._one * self.shape.queries * (self.shape.memory + self.shape.queries))

    @property
    def q(self) -> float:
        """Bytes of q; those of the output, dq and the gradient are the same."""
        return float(self._one * self.shape.queries * self.shape.head_dim * BYTES)

    @property
    def kv(self) -> float:
        """Bytes of k and v of the call."""
        return 2 * self.q * self.shape.kv_heads / self.shape.heads

    @property
    def memory(self) -> float:
        """Bytes of the memory's keys and values."""
        return 2.0 * self.shape.batch * self.shape.kv_heads * self.shape.memory * self.shape.head_dim * BYTES

    def products(self, pairs: float, count: int) -> float:
        """FLOPs of `count` matrix products over `pairs`; a forward has two."""
        return attention_flops(pairs, heads=1, head_dim=self.shape.head_dim) * count / 2

    def blocks(self, rows: int, heads: int) -> int:
        return self.shape.batch * heads * math.ceil(self.segments * self.shape.queries / rows)


def ours(sizes: Sizes, direction: str) -> list[Work]:
    """Our kernels: nothing is concatenated, and the backward computes dk and dv within the segment alone."""
    import torch

    from dsmr_kernels.backends.triton.configs import from_table

    if direction == "forward_backward":
        return ours(sizes, "forward") + ours(sizes, "backward")
    shape = sizes.shape
    tile = {kernel: from_table(kernel, "sm_90", shape.head_dim, torch.bfloat16) for kernel in ("forward", "dq", "dkv")}
    read = sizes.q + sizes.kv + sizes.memory
    if direction == "forward":
        blocks = sizes.blocks(tile["forward"].bm, shape.heads)
        return [Work(read + sizes.q, sizes.products(sizes.pairs, 2), sizes.pairs, blocks)]
    dq_blocks, dkv_blocks = sizes.blocks(tile["dq"].bm, shape.heads), sizes.blocks(tile["dkv"].bn, shape.kv_heads)
    return [  # dq reads output and gradient, and sums their product on the way
        Work(read + 3 * sizes.q, sizes.products(sizes.pairs, 3), sizes.pairs, dq_blocks),
        Work(2 * sizes.q + 2 * sizes.kv, sizes.products(sizes.own_pairs, 4), sizes.own_pairs, dkv_blocks),
    ]


def peer(sizes: Sizes, direction: str, kind: str) -> list[Work]:
    """A concatenating peer; its backward computes the gradients of the memory too.

    Args:
        kind: "flash" does the backward in one kernel of five products, "flex" in two of three and four, "masked" is
            flash that looks at every pair, since a mask tensor does not tell which blocks are empty.
    """
    if direction == "forward_backward":
        return peer(sizes, "forward", kind) + peer(sizes, "backward", kind)
    joined, blocks = sizes.kv + sizes.memory, sizes.blocks(128, sizes.shape.heads)
    pairs = sizes.all_pairs if kind == "masked" else sizes.pairs
    if direction == "forward":
        attention = Work(2 * sizes.q + joined, sizes.products(pairs, 2), pairs, blocks)
        return [Work(joined), Work(joined), attention]  # k and v concatenated: half of `joined` read and written each
    read = 2 * sizes.q + joined
    if kind == "flex":
        kernels = [Work(read + sizes.q, sizes.products(pairs, 3), pairs, blocks)]
        kernels += [Work(read + joined, sizes.products(pairs, 4), pairs, blocks)]
    else:
        kernels = [Work(read + sizes.q + joined, sizes.products(pairs, 5), pairs, blocks)]
    return [Work(2 * sizes.q), *kernels]


def seconds(works: list[Work], rate: float, ceilings: Ceilings) -> dict[str, float]:
    """Predicted time of the GPU's own work, one kernel after another; see the module's docstring."""
    found = {"floor": 0.0, "fast": 0.0, "expected": 0.0, "slow": 0.0}
    for work in works:
        waves = work.blocks / ceilings.multiprocessors
        idle = math.ceil(waves) / waves if work.flops else 1.0
        moving = work.bytes / ceilings.bandwidth
        products, exponentials = idle * work.flops / rate, idle * work.pairs / ceilings.exponentials
        lanes = idle * LANE_OPERATIONS * work.pairs / ceilings.lanes
        found["floor"] += max(work.flops / ceilings.dense, moving)
        found["fast"] += ceilings.launch + max(products, exponentials, moving)
        found["expected"] += ceilings.launch + max(products + exponentials, moving)
        found["slow"] += ceilings.launch + max(products + exponentials + lanes, moving)
    return found


SHAPES = (LONG_128, LONG_64, TRAINING)
KINDS = (  # name as in the comparison, kind, which rate
    ("SDPA flash, causal", "flash", "warp"),
    ("FlexAttention, block mask", "flex", "warpgroup"),
    ("SDPA cuDNN, boolean mask", "masked", "warpgroup"),
    ("FlashAttention 3, concatenated", "flash", "specialised"),
)


def predict(ceilings: Ceilings = H100) -> list[Row]:
    """A row for each shape of the goals, contender and direction, and one for the whole-piece pass."""
    rows = []
    for shape in SHAPES:
        sizes = Sizes(shape)
        for direction in ("forward", "backward", "forward_backward"):
            works = ours(sizes, direction)
            rows.append(_row(str(shape), OURS, direction, works, ceilings.warpgroup, ceilings))
            for name, kind, rate in KINDS:
                works = peer(sizes, direction, kind)
                rows.append(_row(str(shape), name, direction, works, getattr(ceilings, rate), ceilings))
    return [*rows, _piece(ceilings)]


def _host(kernels: int, ours: bool, direction: str, ceilings: Ceilings) -> float:
    passes = 2 if direction == "forward_backward" else 1
    return kernels * (ceilings.host_ours if ours else ceilings.host_torch) + passes * ceilings.host_pass


def _row(label: str, name: str, direction: str, works: list[Work], rate: float, ceilings: Ceilings) -> Row:
    flops = sum(work.flops for work in works)
    row: Row = {"label": label, "contender": name, "direction": direction, "kernels": len(works), "flops": flops}
    row |= {"pairs": sum(work.pairs for work in works), "bytes": sum(work.bytes for work in works), "rate": rate}
    row |= {f"{key}_ms": 1e3 * value for key, value in seconds(works, rate, ceilings).items()}
    if rate == ceilings.specialised:
        row["expected_ms"] = row["fast_ms"]  # of such a kernel that is what is expected
    row["eager_ms"] = max(row["expected_ms"], 1e3 * _host(len(works), name == OURS, direction, ceilings))
    if direction == "forward":
        row["tflops"] = flops / row["expected_ms"] / 1e9
    return row


def _piece(ceilings: Ceilings) -> Row:
    """Tokens a second of the whole-piece pass over those of as many calls, forward and backward."""
    direction, append = "forward_backward", 10  # operators of PyTorch's in an append and the slices of a segment
    times = {}
    for name, sizes in (("whole", Sizes(PIECE, SEGMENTS)), ("one", Sizes(PIECE))):
        works = ours(sizes, direction)
        alone = seconds(works, ceilings.warpgroup, ceilings)["expected"]
        times[name] = alone, _host(len(works), True, direction, ceilings)
    alone, host = times["one"][0] + append * ceilings.launch, times["one"][1] + append * ceilings.host_torch
    at_once, in_turn = max(times["whole"]), SEGMENTS * max(alone, host)
    return {
        "label": piece_label(PIECE, SEGMENTS),
        "contender": OURS,
        "direction": "piece",
        "at_once_ms": 1e3 * at_once,
        "in_turn_ms": 1e3 * in_turn,
        "in_turn_without_host_ms": 1e3 * SEGMENTS * alone,
        "gain": in_turn / at_once,
    }


def goal_rows(rows: list[Row]) -> list[Row]:
    """The goals of the comparison, as predicted: the same shape of rows as `benchmarks.parts.goals.goals` gives."""
    found: dict[tuple[str, str], Row] = {}
    pieces = []
    for row in rows:
        if row["direction"] == "piece":
            pieces.append({"kind": "piece", "label": row["label"], "status": "ok", "gain": row["gain"]})
            continue
        key = (row["label"], row["contender"])
        made = found.setdefault(key, {"kind": "attention", "label": key[0], "contender": key[1], "status": "ok"})
        made[row["direction"]] = {
            "kernel_ms": row["expected_ms"], "graph_ms": row["expected_ms"], "wall_ms": row["eager_ms"],
            "tflops": row.get("tflops"),
        }  # fmt: skip
    return goals([*found.values(), *pieces])


def markdown(rows: list[Row], ceilings: Ceilings = H100) -> str:
    """The predictions as a page."""
    lines = [
        f"# Predictions for an {ceilings.name}",
        "",
        "Written by `python -m benchmarks.gpu --predict` before any run on such a GPU, but for the rows of",
        "FlashAttention 3, which came later. Counted: operations, visible pairs and least bytes in bfloat16.",
        "",
        f"- Ceilings, from the datasheet: {ceilings.dense / 1e12:.0f} TFLOP/s dense, "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s,",
        f"  {ceilings.exponentials / 1e12:.1f} T exponentials/s (16 a clock and multiprocessor at 1.755 GHz).",
        f"- Assumed: {ceilings.warpgroup / 1e12:.0f} TFLOP/s of products reached through warpgroup instructions",
        f"  (ours, Flex, cuDNN), {ceilings.warp / 1e12:.0f} through the older ones (flash of SDPA);",
        f"  {ceilings.specialised / 1e12:.0f} by FlashAttention 3, exponentials hidden (Shah et al., 2024);",
        f"  {1e6 * ceilings.launch:.0f} us between kernels;",
        f"  Python takes {1e6 * ceilings.host_ours:.0f} us for a launch of ours, {1e6 * ceilings.host_torch:.0f} for an"
        f" operator of PyTorch's, {1e6 * ceilings.host_pass:.0f} to enter autograd.",
        "- floor: the larger of operations and bytes of each kernel at the datasheet's rates. fast: all overlaps.",
        "  expected: exponentials wait for products. slow: so do the additions around them. eager: the greater of",
        "  expected and Python's time.",
        "- The cuDNN peer looks at every pair, as a mask tensor makes it do; the mask's own bytes are not counted.",
        "",
        "| shape | contender | pass | GFLOP | MB | launches | floor, ms | fast | expected | slow | eager | TFLOP/s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["direction"] != "piece":
            rate = f"{row['tflops']:.0f}" if "tflops" in row else ""
            lines.append(
                f"| {row['label']} | {row['contender']} | {row['direction'].replace('_', ' + ')} "
                f"| {row['flops'] / 1e9:.1f} | {row['bytes'] / 1e6:.1f} | {row['kernels']} | {row['floor_ms']:.4f} "
                f"| {row['fast_ms']:.3f} | {row['expected_ms']:.3f} | {row['slow_ms']:.3f} | {row['eager_ms']:.3f} "
                f"| {rate} |"
            )
    lines += [
        "",
        "| whole-piece pass | at once, ms | in turn, ms | in turn, the GPU alone | gain |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['label']} | {row['at_once_ms']:.2f} | {row['in_turn_ms']:.2f} | {row['in_turn_without_host_ms']:.2f} "
        f"| {row['gain']:.1f} x |"
        for row in rows
        if row["direction"] == "piece"
    ]
    lines += ["", "| goal | wanted | predicted | met? |", "|---|---|--:|---|"]
    lines += [
        f"| {row['goal']} | {row['wanted']} | {row['measured']:.2f} {row['unit']} | {'yes' if row['met'] else 'no'} |"
        for row in goal_rows(rows)
    ]
    return "\n".join(lines) + "\n"
