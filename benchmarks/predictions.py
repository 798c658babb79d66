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
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contenders import Shape
from benchmarks.goals import LONG_64, LONG_128, OURS, PIECE, SEGMENTS, TRAINING
from dsmr_kernels.cost import attention_flops, visible_pairs

Row = dict[str, Any]
BYTES = 2  # of an element in bfloat16


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits.

    Attributes:
        dense: FLOP/s of the matrix units in bfloat16, datasheet. warpgroup, warp: what kernels reach of it through
            warpgroup instructions (ours, Flex, cuDNN) and through the older ones (flash, efficient), assumed.
        exponentials, lanes: per second, multiprocessors x units x boost clock.
        bandwidth: bytes/s of device memory, datasheet. launch: seconds between two kernels in a stream, assumed.
        host_ours, host_torch: seconds of Python for a launch of ours and an operator of PyTorch's, assumed.
    """

    name: str
    multiprocessors: int
    dense: float
    warpgroup: float
    warp: float
    exponentials: float
    lanes: float
    bandwidth: float
    launch: float
    host_ours: float
    host_torch: float


H100 = Ceilings(
    name="NVIDIA H100 SXM5",
    multiprocessors=132,
    dense=989e12,
    warpgroup=650e12,
    warp=400e12,
    exponentials=132 * 16 * 1.755e9,
    lanes=132 * 128 * 1.755e9,
    bandwidth=3.35e12,
    launch=2e-6,
    host_ours=25e-6,
    host_torch=8e-6,
)
LANE_OPERATIONS = 6  # for each pair: scale, maximum, subtraction, sum, two halves of a conversion, about


@dataclass(frozen=True)
class Work:
    """What one pass does.

    Attributes:
        flops: of the matrix products. pairs: visible pairs over all heads, an exponential each, once for each kernel
            that recomputes them. bytes: moved at least. kernels: launches. blocks: thread blocks of the largest launch.
    """

    flops: float
    pairs: float
    bytes: float
    kernels: int
    blocks: int

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.pairs + other.pairs,
            self.bytes + other.bytes,
            self.kernels + other.kernels,
            max(self.blocks, other.blocks),
        )


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


def ours(sizes: Sizes, direction: str) -> Work:
    """Our kernels: nothing is concatenated, and the backward computes dk and dv within the segment alone."""
    import torch

    from dsmr_kernels.backends.triton.configs import from_table

    tile = {
        kernel: from_table(kernel, "sm_90", sizes.shape.head_dim, torch.bfloat16) for kernel in ("forward", "dq", "dkv")
    }
    heads = sizes.shape.heads
    if direction == "forward":
        moved = 2 * sizes.q + sizes.kv + sizes.memory
        blocks = sizes.blocks(tile["forward"].bm, heads)
        return Work(sizes.products(sizes.pairs, 2), sizes.pairs, moved, 1, blocks)
    if direction == "backward":
        moved = 2 * sizes.q + 3 * sizes.q + sizes.kv + sizes.memory + 2 * sizes.q + 2 * sizes.kv  # delta, dq, dkv
        flops = sizes.products(sizes.pairs, 3) + sizes.products(sizes.own_pairs, 4)
        return Work(flops, sizes.pairs + sizes.own_pairs, moved, 3, sizes.blocks(tile["dq"].bm, heads))
    return ours(sizes, "forward") + ours(sizes, "backward")


PRODUCTS = {"flash": 5, "flex": 7}  # of the backward: in one kernel with atomics for dq, or split in two


def peer(sizes: Sizes, direction: str, backward: str) -> Work:
    """A concatenating peer; its backward computes the gradients of the memory too."""
    joined = sizes.kv + sizes.memory
    blocks = sizes.blocks(128, sizes.shape.heads)
    if direction == "forward":
        moved = 2 * joined + 2 * sizes.q + joined  # concatenate: read and write; then attention reads again
        return Work(sizes.products(sizes.pairs, 2), sizes.pairs, moved, 3, blocks)
    if direction == "backward":
        moved = 2 * sizes.q + 3 * sizes.q + joined + joined
        return Work(sizes.products(sizes.pairs, PRODUCTS[backward]), sizes.pairs, moved, 3, blocks)
    return peer(sizes, "forward", backward) + peer(sizes, "backward", backward)


def seconds(work: Work, rate: float, ceilings: Ceilings) -> dict[str, float]:
    """Predicted time of the GPU's own work: fast, expected and slow; see the module's docstring."""
    waves = work.blocks / ceilings.multiprocessors
    idle = math.ceil(waves) / waves
    products, bytes_ = idle * work.flops / rate, work.bytes / ceilings.bandwidth
    exponentials = idle * work.pairs / ceilings.exponentials
    lanes = idle * LANE_OPERATIONS * work.pairs / ceilings.lanes
    launches = work.kernels * ceilings.launch
    return {
        "floor": max(work.flops / ceilings.dense, bytes_),
        "fast": max(products, exponentials, bytes_) + launches,
        "expected": max(products + exponentials, bytes_) + launches,
        "slow": max(products + exponentials + lanes, bytes_) + launches,
    }


SHAPES = (LONG_128, LONG_64, TRAINING)
KINDS = (  # name as in the comparison, backward's kind, which rate
    ("SDPA flash, causal", "flash", "warp"),
    ("FlexAttention, block mask", "flex", "warpgroup"),
    ("SDPA cuDNN, boolean mask", "flash", "warpgroup"),
)


def predict(ceilings: Ceilings = H100) -> list[Row]:
    """A row for each shape of the goals, contender and direction, and one for the whole-piece pass."""
    rows = []
    for shape in SHAPES:
        sizes = Sizes(shape)
        for direction in ("forward", "backward", "forward_backward"):
            work = ours(sizes, direction)
            rows.append(_row(str(shape), OURS, direction, work, ceilings.warpgroup, ceilings))
            for name, backward, rate in KINDS:
                work = peer(sizes, direction, backward)
                rows.append(_row(str(shape), name, direction, work, getattr(ceilings, rate), ceilings))
    return [*rows, _piece(ceilings)]


def _row(label: str, name: str, direction: str, work: Work, rate: float, ceilings: Ceilings) -> Row:
    host = ceilings.host_ours if name == OURS else ceilings.host_torch
    found = {f"{key}_ms": 1e3 * value for key, value in seconds(work, rate, ceilings).items()}
    row = {"label": label, "contender": name, "direction": direction, **asdict(work), "rate": rate, **found}
    row["eager_ms"] = max(row["expected_ms"], 1e3 * work.kernels * host)
    if direction == "forward":
        row["tflops"] = work.flops / row["expected_ms"] / 1e9
    return row


def _piece(ceilings: Ceilings) -> Row:
    """Tokens a second of the whole-piece pass over those of as many calls, forward and backward."""
    whole, one = Sizes(PIECE, SEGMENTS), Sizes(PIECE)
    at_once = seconds(ours(whole, "forward_backward"), ceilings.warpgroup, ceilings)["expected"]
    work = ours(one, "forward_backward")
    append = 12  # operators of PyTorch's in an append, a slice and the collection of results
    alone = seconds(work, ceilings.warpgroup, ceilings)["expected"]
    host = work.kernels * ceilings.host_ours + append * ceilings.host_torch
    in_turn = SEGMENTS * max(alone + append * ceilings.launch, host)
    label = f"{SEGMENTS} segments, each {PIECE}"
    return {
        "label": label, "contender": OURS, "direction": "piece", "at_once_ms": 1e3 * at_once,
        "in_turn_ms": 1e3 * in_turn, "in_turn_without_host_ms": 1e3 * SEGMENTS * (alone + append * ceilings.launch),
        "gain": in_turn / at_once,
    }  # fmt: skip


def goal_rows(rows: list[Row]) -> list[Row]:
    """The goals of the comparison, as predicted: the same shape of rows as `benchmarks.goals.goals` gives."""
    from benchmarks.goals import goals

    found: dict[tuple[str, str], Row] = {}
    pieces = []
    for row in rows:
        if row["direction"] == "piece":
            pieces.append({"kind": "piece", "status": "ok", "gain": row["gain"]})
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
        "Written by `python -m benchmarks.gpu --predict` before any run on such a GPU. Counted: operations, visible",
        "pairs and least bytes in bfloat16. Ceilings: "
        f"{ceilings.dense / 1e12:.0f} TFLOP/s dense and {ceilings.bandwidth / 1e12:.2f} TB/s (datasheet), "
        f"{ceilings.exponentials / 1e12:.1f} T exponentials/s (16 a clock and multiprocessor at 1.755 GHz).",
        f"Assumed: {ceilings.warpgroup / 1e12:.0f} TFLOP/s reached through warpgroup instructions (ours, Flex, cuDNN), "
        f"{ceilings.warp / 1e12:.0f} through the older ones (flash of SDPA), {1e6 * ceilings.launch:.0f} us between "
        f"kernels, {1e6 * ceilings.host_ours:.0f} us of Python for a launch of ours, {1e6 * ceilings.host_torch:.0f} "
        "for an operator of PyTorch's.",
        "",
        "floor: the larger of operations and bytes at the datasheet's rates. fast: all overlaps. expected:",
        "exponentials wait for products. slow: so do the additions around them. eager: the greater of expected and",
        "Python's time.",
        "The cuDNN peer is counted without its mask's bytes and with one pass over the keys in the backward.",
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
