"""Measures rows of the GPU comparison in a process of its own, so that a crash costs one row and not the run.

    python -m benchmarks.parts.gpu_worker TASKS.json ROWS.jsonl

TASKS.json holds a list of tasks; a line {"begin": n} and a line {"row": {...}} go to ROWS.jsonl for each, so that the
one who started the process knows where it stands. Results are checked first: a wrong contender is not timed.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.parts.contenders import Shape, backward, check, forward, forward_backward, ours, recorded
from benchmarks.parts.goals import OURS
from benchmarks.parts.peers import PEERS, Attention, Missing
from dsmr_kernels import KVMemory
from dsmr_kernels.cases import Case
from dsmr_kernels.costing.timing import graphed, kernel_seconds, wall_seconds

BUDGET = {"cuda": 0.15, "cpu": 0.01}  # seconds for each timing; on a CPU the program is tried, and nothing measured
DIRECTIONS = {"forward": forward, "backward": backward, "forward_backward": forward_backward}


def contender(name: str, case: Case, backend: str) -> Attention:
    """Ours or a peer, made for `case`. Raises `Missing` where it cannot run."""
    return functools.partial(ours, backend=backend) if name == OURS else PEERS[name](case)


def times(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of the GPU's own work, and of an eager call among others of its kind."""
    budget = BUDGET[device.type]
    kernel, wall = (1e3 * seconds(call, device, budget=budget) for seconds in (kernel_seconds, wall_seconds))
    return {"kernel_ms": kernel, "wall_ms": wall, "graph_ms": None}


def graph_times(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Milliseconds of a replay of the call's CUDA graph, or why there is none."""
    try:
        replay = graphed(call, device)
        return {} if replay is None else {"graph_ms": 1e3 * kernel_seconds(replay, device, budget=BUDGET[device.type])}
    except Exception as error:  # a call that cannot be captured is still worth its other figures
        return {"graph_failed": reason(error)}


def attention_row(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One contender at one shape: errors, times and rates, peak memory."""
    shape, dtype = Shape(**task["shape"]), getattr(torch, task["dtype"])
    case = shape.case(dtype, device=device)
    attention = contender(task["contender"], case, task["backend"])
    row: dict[str, Any] = {"errors": check(case, task["contender"], attention)}
    for name, direction in DIRECTIONS.items():
        row[name] = times(direction(attention, case), device)
    for name in ("forward", "forward_backward"):  # last: a capture that fails may leave the process in disorder
        row[name] |= graph_times(DIRECTIONS[name](attention, case), device)
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
    case = replace(one, queries=segments * length).case(dtype, device=device)
    case.options["segment_length"] = length
    attention = functools.partial(ours, backend=task["backend"])
    assert case.memory is not None
    memory, ring, leaves = case.memory, case.memory.clone(), recorded(case)
    at_once = forward_backward(attention, case)

    def in_turn() -> list[tuple[torch.Tensor, ...]]:
        ring.k.copy_(memory.k)
        ring.v.copy_(memory.v)
        carried, results = KVMemory(ring.k, ring.v, memory.length.clone(), memory.position.clone()), []
        for begin in range(0, segments * length, length):
            part = slice(begin, begin + length)
            q, k, v = (x.detach()[:, :, part].requires_grad_() for x in (leaves.q, leaves.k, leaves.v))
            out = attention(Case(q, k, v, carried, case.grad, {"horizon": one.memory}))
            results.append(torch.autograd.grad(out, (q, k, v), case.grad[:, :, part]))
            carried.append(k, v)
        return results

    # What a token sees and the gradient it takes do not depend on later segments: the first few tell.
    row: dict[str, Any] = {"segments": segments, "errors": check(case, "at once", attention, min(segments, 3) * length)}
    together = [torch.cat(parts, 2) for parts in zip(*in_turn(), strict=True)]
    pairs = zip(at_once(), together, strict=True)
    row["difference"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    bound = 16 * torch.finfo(dtype).eps  # both round every result once, and split their sums differently
    assert row["difference"] <= bound, f"at once and in turn differ by {row['difference']:.3g}, allowed {bound:.3g}"
    for name, call in (("at_once", at_once), ("in_turn", in_turn)):
        row[name] = times(call, device)
        row[name]["tokens_per_s"] = 1e3 * one.batch * segments * length / row[name]["wall_ms"]
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
