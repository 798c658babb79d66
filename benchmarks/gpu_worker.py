"""Measures rows of the GPU comparison in a process of its own, so that a crash costs one row and not the run.

    python -m benchmarks.gpu_worker TASKS.json ROWS.jsonl

TASKS.json holds a list of tasks; a line {"begin": n} and a line {"row": {...}} go to ROWS.jsonl for each, so that the
one who started the process knows where it stands. Results are checked first: a wrong contender is not timed.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Shape, backward, check, forward, forward_backward, ours
from benchmarks.goals import OURS
from benchmarks.peers import PEERS, Attention, Missing
from dsmr_kernels import KVMemory, memory_attention
from dsmr_kernels.testing import Case
from dsmr_kernels.timing import graphed, kernel_seconds, wall_seconds

BUDGET = 0.15  # seconds for each timing
DIRECTIONS = {"forward": forward, "backward": backward, "forward_backward": forward_backward}


def contender(name: str, case: Case, backend: str) -> Attention:
    """Ours or a peer, made for `case`. Raises `Missing` where it cannot run."""
    return functools.partial(ours, backend=backend) if name == OURS else PEERS[name](case)


def times(call: Callable[[], Any], device: torch.device) -> dict[str, float | str | None]:
    """Milliseconds of the GPU's own work, of an eager call among others, and of a replay of its CUDA graph."""
    result: dict[str, float | str | None] = {
        "kernel_ms": 1e3 * kernel_seconds(call, device, budget=BUDGET),
        "wall_ms": 1e3 * wall_seconds(call, device, budget=BUDGET),
        "graph_ms": None,
    }
    try:
        if (replay := graphed(call, device)) is not None:
            result["graph_ms"] = 1e3 * kernel_seconds(replay, device, budget=BUDGET)
    except Exception as error:  # a call that cannot be captured is still worth its other figures
        result["graph_failed"] = reason(error)
    return result


def attention_row(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One contender at one shape: errors, times and rates, peak memory."""
    shape, dtype = Shape(**task["shape"]), getattr(torch, task["dtype"])
    case = shape.case(dtype, device=device)
    attention = contender(task["contender"], case, task["backend"])
    row: dict[str, Any] = {"errors": check(case, task["contender"], attention)}
    for name, direction in DIRECTIONS.items():
        row[name] = times(direction(attention, case), device)
    row["forward"]["tflops"] = shape.forward_flops / row["forward"]["kernel_ms"] / 1e9
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(attention, case)()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def piece_row(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The whole-piece pass against as many sequential calls, forward and backward: results, then tokens a second."""
    one, segments = Shape(**task["shape"]), task["segments"]
    dtype, length = getattr(torch, task["dtype"]), one.queries
    whole = Shape(one.batch, one.heads, one.kv_heads, segments * length, one.memory, one.head_dim)
    case = whole.case(dtype, device=device)
    assert case.memory is not None
    memory, backend = case.memory, task["backend"]
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]

    def at_once() -> tuple[torch.Tensor, ...]:
        out = memory_attention(*leaves, memory, horizon=one.memory, segment_length=length, backend=backend)
        assert isinstance(out, torch.Tensor)
        return out, *torch.autograd.grad(out, leaves, case.grad)

    ring = memory.clone()

    def start_again() -> KVMemory:
        ring.k.copy_(memory.k)
        ring.v.copy_(memory.v)
        return KVMemory(ring.k, ring.v, memory.length, memory.position)

    def in_turn() -> tuple[torch.Tensor, ...]:
        carried, results = start_again(), []
        for begin in range(0, segments * length, length):
            part = [x.detach()[:, :, begin : begin + length].requires_grad_() for x in leaves]
            out = memory_attention(*part, carried, horizon=one.memory, backend=backend)
            assert isinstance(out, torch.Tensor)
            results.append((out, *torch.autograd.grad(out, part, case.grad[:, :, begin : begin + length])))
            carried.append(part[1], part[2])
        return tuple(torch.cat(parts, 2) for parts in zip(*results, strict=True))

    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(at_once(), in_turn(), strict=True))
    bound = 16 * torch.finfo(dtype).eps  # both round every result once, and split their sums differently
    assert difference <= bound, (
        f"at once and in turn differ by {difference:.3g} of the largest value, {bound:.3g} allowed"
    )
    tokens = one.batch * segments * length
    row: dict[str, Any] = {"difference": difference, "segments": segments}
    for name, call in (("at_once", at_once), ("in_turn", in_turn)):
        row[name] = {"kernel_ms": 1e3 * kernel_seconds(call, device), "wall_ms": 1e3 * wall_seconds(call, device)}
        row[name]["tokens_per_s"] = 1e3 * tokens / row[name]["wall_ms"]
    return row | {"gain": row["at_once"]["tokens_per_s"] / row["in_turn"]["tokens_per_s"]}


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    said = str(error).strip().split("\n")[0][:300]
    return said if isinstance(error, AssertionError | Missing) else f"{type(error).__name__}: {said}"


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """The row of a task, whatever happens."""
    device = torch.device(task["device"])
    row = {key: task[key] for key in ("kind", "shape", "label", "contender", "dtype")}
    try:
        made = attention_row(task, device) if task["kind"] == "attention" else piece_row(task, device)
        return row | {"status": "ok"} | made
    except Missing as error:
        return row | {"status": "skipped", "reason": reason(error)}
    except Exception as error:  # also out of memory and whatever a kernel throws: it becomes the row's reason
        return row | {"status": "failed", "reason": reason(error)}


def main(tasks: Path, rows: Path) -> int:
    """Do the tasks in turn; leave with 3 after an error that leaves the GPU unusable for this process."""
    with rows.open("a", encoding="utf-8") as file:
        for number, task in enumerate(json.loads(tasks.read_text())):
            print(json.dumps({"begin": number}), file=file, flush=True)
            print(json.dumps({"row": measured(task)}), file=file, flush=True)
            if task["device"] != "cpu":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
