"""What a training would take on machines that are not here: nodes of H100, a step simulated from the cost model.

    python -m dsmr.profiling.planning --hours 1000 --nodes 1 64

A step is the greater of what the GPU and what its host take; DDP's buckets of gradients, or FSDP2's weights and
gradients of each layer, are sent while it goes on, one after another, over NVLink within a node and the network between
nodes. Nothing is measured by the command: the rates are those of `H100`, `HOST` and `Links`, which it prints with their
sources.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import check_replaceable, write_json
from dsmr.console.progress import duration
from dsmr.console.terminal import command, console
from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.cost import LayerSeconds, Predicted, held_bytes, least_bytes, parameters_of, predict_step
from dsmr.profiling.job import Sizes
from dsmr_kernels.costing.cost import human_bytes
from dsmr_kernels.costing.predict import Ceilings

_ALL = {"products": 1.0, "exponentials": 1.0, "own": 1.0, "edge": 0.0}
H100 = Ceilings(
    device="NVIDIA H100 SXM5 80 GB",
    threads=1,
    torch="any",
    kernels="triton",
    copy_bytes=0.9 * 3.35e12,
    matrix_flops={"float32": 60e12, "bfloat16": 650e12},
    exponentials=132 * 16 * 1.755e9,
    operator_seconds=2e-6,
    attention_seconds={"forward": 2e-6, "backward": 4e-6},
    attained={dtype: {"forward": _ALL, "backward": _ALL} for dtype in ("float32", "bfloat16")},
)
"""Attention at these rates takes within 4 % of what docs/kernels.md measured (batch 8, 16 heads of 64 and of 128)."""
HOST = replace(
    H100,
    copy_bytes=math.inf,
    matrix_flops=dict.fromkeys(H100.matrix_flops, math.inf),
    exponentials=math.inf,
    operator_seconds=8e-6,
    attention_seconds={"forward": 35e-6, "backward": 70e-6},
)
"""The same step as its host sees it: nothing but starting one operator after another."""
GPU_BYTES = 80e9
GPUS_A_NODE = 8
BUCKET_BYTES = 25 * 2**20
FIRST_BUCKET_BYTES = 2**20
"""DDP's own: the first bucket is small so that sending begins early."""


@dataclass(frozen=True)
class Links:
    """What connects GPUs: bytes a second that one GPU sends, and seconds to begin with."""

    within: float = 0.8 * 450e9
    between: float = 0.8 * 50e9
    begin_within: float = 10e-6
    begin_between: float = 20e-6
    begin_host: float = 30e-6

    def all_reduce(self, size: float, gpus: int, nodes: int) -> float:
        """Seconds until every GPU of `nodes` nodes of `gpus` GPUs has the sum of `size` bytes.

        Reduced and scattered within the nodes, summed between the GPUs of like place in all nodes (each has its part),
        gathered within the nodes again: each sends 2 (g - 1) / g of the bytes within and 2 (n - 1) / n of its part
        between, whose trees are log2(n) deep.
        """
        seconds = 0.0
        if gpus > 1:
            seconds += 2 * (gpus - 1) / gpus * size / self.within + 2 * self.begin_within
        if nodes > 1:
            seconds += 2 * (nodes - 1) / nodes * size / gpus / self.between
            seconds += 2 * math.ceil(math.log2(nodes)) * self.begin_between
        return seconds

    def gather(self, size: float, gpus: int, nodes: int) -> float:
        """Seconds until every GPU has all of `size` bytes, of which each had its part; or until each has its part of
        their sum. A sum for all is the one after the other."""
        return self.all_reduce(size, gpus, nodes) / 2

    def meeting(self, ranks: int) -> float:
        """Seconds in which the ranks' hosts agree on loss, clock and signals: a few numbers, by TCP, up and down."""
        return 2 * math.ceil(math.log2(ranks)) * self.begin_host


def buckets(ready: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """DDP's buckets from gradients (bytes, second at which they are ready): each one's bytes and second."""
    found: list[tuple[float, float]] = []
    filled, limit = 0.0, float(FIRST_BUCKET_BYTES)
    for size, second in ready:
        filled += size
        if filled >= limit:
            found.append((filled, second))
            filled, limit = 0.0, float(BUCKET_BYTES)
    if filled:
        found.append((filled, ready[-1][1]))
    return found


def sent_by(waiting: Sequence[tuple[float, float]], links: Links, gpus: int, nodes: int) -> float:
    """The second at which the last bucket is summed, where they are sent one after another as they are ready."""
    done = 0.0
    for size, second in waiting:
        done = max(done, second) + links.all_reduce(size, gpus, nodes)
    return done


def gradients(step: Predicted, sizes: Sizes, schedule: MemorySchedule) -> list[tuple[float, float]]:
    """The gradients (float32) of a backward, as they become ready: of the last layer first, the shared embedding last,
    a matrix of a layer at a time."""
    embedding = 4.0 * sizes.vocab_size * sizes.d_model
    a_layer = (4.0 * parameters_of(sizes, schedule) - embedding) / schedule.layers
    second, found = step.around["backward"]["head"], []
    for layer in reversed(step.layers):
        took = sum(layer.backward.values())
        found += [(a_layer / 4, second + took * quarter / 4) for quarter in range(1, 5)]
        second += took
    return [*found, (embedding, second + step.around["backward"]["embedding"])]


def parts(sizes: Sizes, schedule: MemorySchedule) -> tuple[float, float]:
    """Bytes of the weights of a layer, and of those around the layers, which FSDP2 holds together."""
    around = 4.0 * (sizes.vocab_size + 1) * sizes.d_model
    return (4.0 * parameters_of(sizes, schedule) - around) / schedule.layers, around


def sharded(step: Predicted, sizes: Sizes, schedule: MemorySchedule, links: Links, gpus: int, nodes: int) -> float:
    """Seconds of the forward and backward under FSDP2, with what is sent.

    Whole weights come before a layer computes, those of the next one meanwhile; the backward asks for them again, and
    sends each layer's gradients when it is through. What is around the layers comes first, stays, and is sent last.
    """
    layer, around = (links.gather(size, gpus, nodes) for size in parts(sizes, schedule))
    now, link = around, around  # what computes, and what is sent, are so far
    for direction, order in (("forward", step.layers), ("backward", step.layers[::-1])):
        back = direction == "backward"
        arrived = link = max(link, now) + layer
        now += step.around[direction]["head" if back else "embedding"]
        for place, each in enumerate(order):
            now = max(now, arrived)
            if place + 1 < len(order):
                arrived = link = max(link, now) + layer
            now += sum(getattr(each, direction).values())
            if back:
                link = max(link, now) + layer
        now += step.around[direction]["embedding" if back else "head"]
    return max(now, link) + around


@dataclass(frozen=True)
class Plan:
    """A training on so many nodes: `step` seconds, of which `waiting` for what is sent and not hidden by computing."""

    parallel: str
    nodes: int
    gpus: int
    batch: int
    rows_a_gpu: int
    gpu_bytes: float
    fits: bool
    state_bytes: int
    sent_bytes: float
    compute: float
    host: float
    waiting: float
    meeting: float
    step: float
    tokens_per_second: float
    share_of_compute: float
    steps_an_epoch: int
    hours: float


def plan(
    sizes: Sizes,
    schedule: MemorySchedule,
    *,
    nodes: int,
    batch: int,
    tokens: float,
    epochs: float,
    parallel: str = "ddp",
    gpus: int = GPUS_A_NODE,
    ceilings: Ceilings = H100,
    host: Ceilings = HOST,
    links: Links | None = None,
) -> Plan:
    """The plan for `epochs` passes over `tokens` tokens with `batch` rows over all GPUs (`sizes.batch` is not looked
    at), in the way of `dsmr train --parallel`. `UserError` if the ranks cannot share the batch evenly."""
    links = links or Links()
    ranks = nodes * gpus
    if batch % ranks:
        raise UserError(f"a batch of {batch:,} rows cannot be dealt evenly to {ranks:,} GPUs")
    here = replace(sizes, batch=batch // ranks)
    here.config(schedule)
    device, launching = (predict_step(here, schedule, "train", rates) for rates in (ceilings, host))
    forward, backward, update = (device.seconds(part) for part in ("forward", "backward", "step"))
    started = sum(launching.seconds(part) for part in ("forward", "backward", "step"))
    compute = max(forward + backward + update, started)
    slower = compute / (forward + backward + update)  # a backward that its host holds up hides more
    weights = 4.0 * parameters_of(here, schedule)
    needed, waiting = float(least_bytes(here, schedule, "train")), 0.0
    if parallel == "fsdp" and ranks > 1:
        layer, around = parts(here, schedule)
        whole = 3 * layer + 2 * around  # weights of two layers and what is around; gradients of one and of that
        needed += min(whole - 4 * weights * (1 - 1 / ranks), 0.0)
        waiting = sharded(_slowed(device, slower), here, schedule, links, gpus, nodes) - slower * (forward + backward)
    elif ranks > 1:
        ready = [(size, slower * second) for size, second in gradients(device, here, schedule)]
        waiting = max(sent_by(buckets(ready), links, gpus, nodes) - slower * backward, 0.0)
    meeting = links.meeting(ranks)
    step = compute + waiting + meeting
    a_step = batch * here.segment_length
    held = sum(held_bytes(here, schedule, "train"))
    steps = math.ceil(tokens / a_step)
    return Plan(
        parallel=parallel,
        nodes=nodes,
        gpus=ranks,
        batch=batch,
        rows_a_gpu=here.batch,
        gpu_bytes=needed,
        fits=needed <= GPU_BYTES,
        state_bytes=held * ranks,
        sent_bytes=(3 if parallel == "fsdp" else 2) * (ranks - 1) / ranks * weights,
        compute=compute,
        host=started,
        waiting=waiting,
        meeting=meeting,
        step=step,
        tokens_per_second=a_step / step,
        share_of_compute=compute / step,
        steps_an_epoch=steps,
        hours=epochs * steps * step / 3600,
    )


def _slowed(step: Predicted, by: float) -> Predicted:
    """The same step, all of it `by` times as long."""

    def longer(parts: Mapping[str, float]) -> dict[str, float]:
        return {name: by * seconds for name, seconds in parts.items()}

    layers = tuple(LayerSeconds(longer(layer.forward), longer(layer.backward)) for layer in step.layers)
    return Predicted(layers, {direction: longer(parts) for direction, parts in step.around.items()})


def assumptions(links: Links) -> list[str]:
    """Every figure that the plan rests on, and where it is from."""
    return [
        f"{H100.device}: {H100.matrix_flops['bfloat16'] / 1e12:.0f} TFLOP/s of bfloat16 products (989 on the "
        f"datasheet), {H100.copy_bytes / 1e12:.2f} TB/s (0.9 of the datasheet), {H100.exponentials / 1e12:.1f} T "
        f"exponentials/s (16 a clock and multiprocessor), {1e6 * H100.operator_seconds:.0f} µs between kernels",
        f"the host starts an operator in {1e6 * HOST.operator_seconds:.0f} µs, an attention in "
        f"{1e6 * HOST.attention_seconds['forward']:.0f} µs, its backward in "
        f"{1e6 * HOST.attention_seconds['backward']:.0f} µs; as many operators as the cost model counts",
        f"within a node {links.within / 1e9:.0f} GB/s a GPU and direction (0.8 of NVLink's 450), "
        f"{1e6 * links.begin_within:.0f} µs to begin; between nodes {links.between / 1e9:.0f} GB/s a GPU (0.8 of 400 "
        f"Gbit/s), {1e6 * links.begin_between:.0f} µs for each level of a tree",
        f"the hosts meet once a step: {1e6 * links.begin_host:.0f} µs for each level of a tree, up and down",
        "ddp sums float32 gradients in buckets of 25 MiB while the backward goes on; fsdp gathers the float32 weights "
        "of one layer ahead of the one that computes, twice a step, and scatters its gradients, in half the time of a "
        "sum each; what it does on the host is not counted; all GPUs are equally fast; reading the corpus, validation "
        "and checkpoints take nothing; memory is the least that a step needs",
        "every row has read enough to fill its memory; whether so large a batch still learns as well is not modelled",
    ]


def table(plans: Sequence[Plan]) -> Any:
    """The plans side by side, for a terminal (rich)."""
    from rich.table import Table

    shown = Table()
    for title in (
        *(
            "way",
            "nodes",
            "GPUs",
            "batch",
            "rows a GPU",
            "memory a GPU",
            "state of all rows",
            "step",
            "compute",
            "waiting",
        ),
        *("tokens/s", "of it compute", "steps an epoch", "all epochs"),
    ):
        shown.add_column(title, justify="right")
    for row in plans:
        fits = "" if row.fits else " (too much)"
        shown.add_row(
            *(row.parallel, f"{row.nodes:,}", f"{row.gpus:,}", f"{row.batch:,}", f"{row.rows_a_gpu:,}"),
            *(human_bytes(round(row.gpu_bytes)) + fits, human_bytes(row.state_bytes)),
            *(f"{1e3 * seconds:.1f} ms" for seconds in (row.step, row.compute, row.waiting)),
            *(f"{row.tokens_per_second:,.0f}", f"{row.share_of_compute:.0%}", f"{row.steps_an_epoch:,}"),
            duration(3600 * row.hours),
        )
    return shown


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dsmr.profiling.planning", description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=1000.0, help="of music")
    parser.add_argument("--tokens-a-second", type=float, default=35.0, help="of music; 35 in MAESTRO (docs/playing.md)")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--schedule", default="two_scale(layers=24, long=8192, short=1024, n_long=6)")
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--n-heads", type=int, default=16)
    parser.add_argument("--segment-length", type=int, default=1024)
    parser.add_argument("--vocab-size", type=int, default=746)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[512, 4096], help="rows over all GPUs")
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp"), default=["ddp"], help="as of dsmr train")
    parser.add_argument("--json", type=Path, help="also write the plans as JSON")
    return parser.parse_args(given)


@command
def main(given: Sequence[str] | None = None) -> None:
    """Print the plans for each number of nodes and each batch, and what they rest on."""
    asked = _arguments(given)
    check_replaceable(asked.json)
    for name in ("hours", "tokens_a_second", "epochs"):
        if not 0 < getattr(asked, name) <= 1e12:
            raise UserError(f"{name.replace('_', '-')} must be above 0 and at most 1e12, got {getattr(asked, name)}")
    if any(not 1 <= count <= 2**20 for count in (*asked.nodes, *asked.batch_size)):
        raise UserError("nodes and batch-size must be at least 1 and at most 1,048,576")
    schedule = MemorySchedule.parse(asked.schedule)
    sizes = Sizes(
        d_model=asked.d_model,
        heads=asked.n_heads,
        segment_length=asked.segment_length,
        vocab_size=asked.vocab_size,
        dtype="bfloat16",
    )
    sizes.config(schedule)
    tokens = asked.hours * 3600 * asked.tokens_a_second
    plans = [
        plan(sizes, schedule, nodes=nodes, batch=batch, tokens=tokens, epochs=asked.epochs, parallel=way)
        for batch in asked.batch_size
        for nodes in asked.nodes
        for way in asked.parallel
    ]
    if asked.json is not None:
        content = {"assumptions": assumptions(Links()), "plans": [asdict(row) for row in plans]}
        write_json(asked.json, content, sealed=True)
    screen = console()
    screen.width = max(screen.width, 180)
    screen.print(
        f"{schedule}, width {sizes.d_model}, {parameters_of(sizes, schedule) / 1e6:.0f} M parameters; {asked.hours:,g} "
        f"hours of music are {tokens / 1e6:,.0f} M tokens ({asked.tokens_a_second:g} a second); {asked.epochs:g} epochs"
    )
    screen.print(table(plans))
    for row in plans[: len(asked.parallel)]:
        what = "gradients" if row.parallel == "ddp" else "weights and gradients"
        sent = human_bytes(round(row.sent_bytes))
        screen.print(f"with {row.parallel} each GPU of {row.gpus:,} sends {sent} of {what} a step")
    for line in assumptions(Links()):
        screen.print(f"- {line}")


if __name__ == "__main__":
    main()
