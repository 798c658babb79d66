"""What is measured on a GPU, and the goals that the figures are held against."""

from typing import Any

from benchmarks.parts.contenders import Shape

OURS = "ours"
LONG_128 = Shape(8, 16, 16, 1024, 8192, 128)
LONG_64 = Shape(8, 16, 16, 1024, 8192, 64)
TRAINING = Shape(8, 8, 8, 512, 1024, 64)
GRID = (
    Shape(1, 8, 8, 1024, 4096, 64),  # one stream
    Shape(8, 16, 4, 1024, 4096, 128),  # grouped heads
    Shape(32, 8, 8, 128, 512, 64),  # short segments of many streams
    Shape(2, 16, 16, 2048, 16384, 128),  # a very long memory
)
SHAPES = (LONG_128, LONG_64, TRAINING, *GRID)
SEGMENTS = 32
PIECE = Shape(1, 8, 8, 1024, 2048, 64)  # one segment of the whole-piece pass; the goal names no heads: as in training

DRY_SHAPES = (Shape(1, 2, 2, 16, 24, 16), Shape(2, 2, 1, 8, 8, 16))
DRY_SEGMENTS, DRY_PIECE = 3, Shape(1, 2, 2, 8, 16, 16)

Row = dict[str, Any]


def piece_label(shape: Shape, segments: int) -> str:
    """How a whole-piece pass over segments like `shape` is called in the report."""
    return f"{segments} segments, each {shape}"


def goals(rows: list[Row]) -> list[Row]:
    """A row for each goal: what was wanted, what was measured (None where it was not), and whether it is met.

    Args:
        rows: of the comparison, as `benchmarks.parts.gpu_worker` makes them.
    """
    found = [
        _goal(f"forward, {LONG_128}", ">= 450 TFLOP/s", _forward_rate(rows, LONG_128), 450, "TFLOP/s"),
        _goal(f"forward, {LONG_64}", ">= 350 TFLOP/s", _forward_rate(rows, LONG_64), 350, "TFLOP/s"),
    ]
    for shape in (LONG_128, LONG_64):
        ratio = _against_best(rows, shape, "backward", "kernel_ms")
        share = None if ratio is None else 1 / ratio
        found.append(
            _goal(f"backward, {shape}", "<= 0.6 of the best peer's time", share, 0.6, "of its time", least=False)
        )
    for how, kind in (("eager", "wall_ms"), ("under a CUDA graph", "graph_ms")):
        speedup = _against_best(rows, TRAINING, "forward_backward", kind)
        found.append(_goal(f"forward + backward {how}, {TRAINING}", ">= 1.5 x the best peer", speedup, 1.5, "x"))
    label = piece_label(PIECE, SEGMENTS)
    piece = [row for row in rows if row["kind"] == "piece" and row["label"] == label and row["status"] == "ok"]
    gain = piece[0]["gain"] if piece else None
    wanted = f">= 4 x the tokens/s of {SEGMENTS} sequential calls"
    found.append(_goal(f"whole-piece pass, {label}", wanted, gain, 4, "x"))
    return found


def _goal(name: str, wanted: str, value: float | None, bound: float, unit: str, *, least: bool = True) -> Row:
    met = None if value is None else value >= bound if least else value <= bound
    return {"goal": name, "wanted": wanted, "measured": value, "unit": unit, "met": met}


def _of(rows: list[Row], shape: Shape) -> list[Row]:
    return [row for row in rows if row["kind"] == "attention" and row["label"] == str(shape) and row["status"] == "ok"]


def _forward_rate(rows: list[Row], shape: Shape) -> float | None:
    for row in _of(rows, shape):
        if row["contender"] == OURS:
            return float(row["forward"]["tflops"])
    return None


def _against_best(rows: list[Row], shape: Shape, direction: str, kind: str) -> float | None:
    """The best peer's time over ours; None unless ours and at least one peer were measured."""
    times = {row["contender"]: row[direction][kind] for row in _of(rows, shape) if row[direction].get(kind)}
    mine = times.pop(OURS, None)
    return min(times.values()) / mine if mine and times else None
