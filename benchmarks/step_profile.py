"""Where does the time of a training step go: linear layers, attention, copies, AdamW, the loss?

    python -m benchmarks.step_profile      # two-scale and full, bfloat16 and float32, at the sizes of training_step

Every operator's own time, as torch.profiler counts it, belongs to what called it: what attention copies is attention's.
A step under the profiler takes a little longer than one that is not watched; the shares are what is looked for.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.parts.models import CLIPPING, CONTENDERS, VARIANTS, Training
from benchmarks.training_step import DTYPES, SIZES
from dsmr.console.heap import keep_freed_memory
from dsmr.corpus.pool import cores

CALLERS = {  # whatever runs inside of these
    "_Node": "attention",
    "_SwiftNode": "attention",
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


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="precisions")
    parser.add_argument("--contenders", nargs="+", default=["ours, two_scale", "ours, full"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=min(torch.get_num_threads(), cores()))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    lines = [f"| | {' | '.join(KINDS)} | copies | seconds |", f"|---|{'--:|' * (len(KINDS) + 2)}"]
    for dtype in options.dtypes:
        for name in options.contenders:
            training = Training(replace(SIZES, dtype=getattr(torch, dtype)), (CONTENDERS | VARIANTS)[name])
            found, seconds, copies = shares(training)
            told = " | ".join(f"{share:.1%}" for share in found.values())
            lines.append(f"| {name}, {dtype} | {told} | {copies:,} | {seconds:.3f} |")
    Console().print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
