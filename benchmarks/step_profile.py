"""Where does the time of a training step go: linear layers, attention, copies, AdamW, the loss?

    python -m benchmarks.step_profile      # two-scale and full, bfloat16 and float32, at the sizes of training_step
    python -m benchmarks.step_profile --floor      # the step in turns with nothing but its matrix products

Every operator's own time, as torch.profiler counts it, belongs to what called it: what attention copies is attention's.
A step under the profiler takes a little longer than one that is not watched; the shares are what is looked for. Below
the floor no fusion of all the rest can go: its products find their factors where they are, and nobody uses the results.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts.models import CLIPPING, CONTENDERS, VARIANTS, Training
from benchmarks.training_step import DTYPES, SIZES
from dsmr.console.heap import keep_freed_memory
from dsmr.corpus.pool import cores

CALLERS = {  # whatever runs inside of these
    "_Node": "attention",
    "_NodeBackward": "attention",
    "Optimizer.step#AdamW.step": "AdamW",
    CLIPPING: "clipping",
}
OPERATORS = {  # elsewhere
    "aten::mm": "linear layers",
    "aten::addmm": "linear layers",
    "aten::bmm": "linear layers",
    "aten::copy_": "copies",
    "aten::cat": "copies",
    "aten::fill_": "copies",
    "aten::_log_softmax": "loss",
    "aten::_log_softmax_backward_data": "loss",
    "aten::nll_loss_forward": "loss",
    "aten::nll_loss_backward": "loss",
    "aten::gelu": "GELU",
    "aten::gelu_backward": "GELU",
    "aten::native_layer_norm": "norms",
    "aten::native_layer_norm_backward": "norms",
}
TILE = 512  # keys of a product of attention
TURNS = 5
KINDS = ("linear layers", "attention", "GELU", "norms", "copies", "AdamW", "clipping", "loss", "all else")


def _above(event: FunctionEvent) -> Iterator[str]:
    """The names of an event and of what called it."""
    here: FunctionEvent | None = event
    while here is not None:
        yield here.name
        here = here.cpu_parent


def kind_of(event: FunctionEvent) -> str:
    """To which of `KINDS` an operator's own time belongs."""
    called = next((CALLERS[name] for name in _above(event) if name in CALLERS), None)
    return called or OPERATORS.get(event.name, "all else")


def shares(training: Training) -> tuple[dict[str, float], float, int]:
    """Each kind's share of a step, its seconds under the profiler, and how many copies it makes, attention's too."""
    for _ in range(2):  # memory and caches are warm
        training()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        training()
    spent: Counter[str] = Counter()
    copies = 0
    for event in watched.events():
        spent[kind_of(event)] += event.self_cpu_time_total
        copies += event.name == "aten::copy_"
    whole = sum(spent.values())
    return {kind: spent[kind] / whole for kind in KINDS}, whole / 1e6, copies


def products_of_layers(training: Training) -> Callable[[], None]:
    """What multiplies as a step's linear layers do: for the output, and the gradients of the input and the weights."""
    sizes, factors = training.sizes, []
    for layer in training.contender.model.modules():
        if isinstance(layer, nn.Linear):
            out, features = layer.weight.shape
            shapes = ((sizes.tokens, features), (out, features), (sizes.tokens, out))
            factors.append([torch.randn(shape).to(sizes.dtype) for shape in shapes])

    def multiply() -> None:
        for x, weight, grad in factors:
            F.linear(x, weight)
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)

    return multiply


def products_of_attention(training: Training) -> Callable[[], None]:
    """What multiplies as a step's attention does: scores in both passes, their gradients, and sums weighed by them for
    the output, dQ and, but for memory, dK and dV. Of a segment a token sees half; tiles stay in the cache."""
    sizes = training.sizes
    model: Any = training.contender.model
    heads, dim = sizes.batch * sizes.heads, sizes.width // sizes.heads
    rows = torch.randn(heads, sizes.segment, dim).to(sizes.dtype)

    def products(keys: int, taking: bool) -> None:
        side = rows.new_ones(heads, keys, dim)
        scores = rows.new_empty(heads, sizes.segment, keys)
        for _ in range(3):
            torch.bmm(rows, side.mT, out=scores)
        for _ in range(2):
            torch.bmm(scores, side)
        for _ in range(2 * taking):
            torch.bmm(scores.mT, rows)

    def multiply() -> None:
        for horizon in model.config.schedule.horizons:
            for start in range(0, horizon, TILE):
                products(min(TILE, horizon - start), False)
            products(sizes.segment // 2, True)

    return multiply


def _seconds(what: Callable[[], object]) -> float:
    begin = time.perf_counter()
    what()
    return time.perf_counter() - begin


def floor(training: Training, turns: int = TURNS) -> tuple[float, float, float]:
    """Seconds of a step, of its linear layers' products and of its attention's alone: medians of as many turns."""
    contestants = (training, products_of_layers(training), products_of_attention(training))
    for one in contestants:
        _seconds(one)  # memory and caches are warm
    taken = [[_seconds(one) for one in contestants] for _ in range(turns)]
    step, layers, attention = (statistics.median(times) for times in zip(*taken, strict=True))
    return step, layers, attention


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="precisions")
    parser.add_argument("--contenders", nargs="+", default=["ours, two_scale", "ours, full"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=min(torch.get_num_threads(), cores()))
    parser.add_argument("--floor", action="store_true", help="a step's seconds, and those of its products alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    columns = (
        ("a step", "products of its layers", "of its attention") if options.floor else (*KINDS, "copies", "seconds")
    )
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for dtype in options.dtypes:
        for name in options.contenders:
            training = Training(replace(SIZES, dtype=getattr(torch, dtype)), (CONTENDERS | VARIANTS)[name])
            if options.floor:
                told = " | ".join(f"{seconds:.3f} s" for seconds in floor(training))
                lines.append(f"| {name}, {dtype} | {told} |")
                continue
            found, seconds, copies = shares(training)
            told = " | ".join(f"{share:.1%}" for share in found.values())
            lines.append(f"| {name}, {dtype} | {told} | {copies:,} | {seconds:.3f} |")
    Console().print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
