"""Token-by-token decoding on this CPU, ours beside what people use, in turn within one run, correctness first.

    python -m benchmarks.decode                # the tables, and benchmarks/results/cpu-decode.{json,md,png}
    python -m benchmarks.decode --long 200000  # instead: play so many tokens and watch the process's memory

Every decoder's tokens are checked against its own pass over the whole sequence before it is timed. The decoders take
turns of a few tokens, so that a noisy machine disturbs all alike; reported are medians, and medians of the turns'
ratios. Real time is counted against 40 tokens a second, which a dense performance asks for.
"""

import argparse
import importlib.util
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.parts.decoders import CONTENDERS, Ours, random_context, ready
from benchmarks.parts.machine import describe
from dsmr.console.files import atomic_path, write_json, write_text

CONTEXT = 2048
DENSE_MUSIC = 40.0  # tokens a second
PLACES = (1_000, 10_000, 100_000)
MEMORIES = ("float32", "bfloat16", "int8")


def compare(rounds: int, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Milliseconds a token of every contender behind `CONTEXT` tokens, and how many times faster the first is."""
    torch.set_num_threads(threads)
    context = random_context(CONTEXT)
    rows: list[dict[str, Any]] = []
    decoders = []
    for contender in CONTENDERS:
        row: dict[str, Any] = {"name": contender.name, "threads": threads, "skipped": contender.missing}
        rows.append(row)
        decoders.append(None if contender.missing else ready(contender, context))
        row["parameters"] = 0 if decoders[-1] is None else decoders[-1].parameters
        row["turns"] = []
    for turn in track(range(rounds + 1), f"decoding on {threads} threads", transient=True):
        for row, decoder in zip(rows, decoders, strict=True):
            if decoder is None:
                continue
            decoder.step(turn)  # brings its weights back into the cache, which the others have filled
            begin = time.perf_counter()
            for token in range(tokens):
                decoder.step(token)
            if turn:
                row["turns"].append((time.perf_counter() - begin) / tokens)
    for row in rows:
        if row["turns"]:
            row["ms"] = 1e3 * statistics.median(row["turns"])
            row["tokens_a_second"] = 1e3 / row["ms"]
            row["faster"] = statistics.median(b / a for a, b in zip(rows[0]["turns"], row["turns"], strict=True))
            row["realtime"] = row["tokens_a_second"] / DENSE_MUSIC
    return rows


def at_places(rounds: int, tokens: int, threads: int, precision: str, memory: str) -> list[dict[str, Any]]:
    """Milliseconds a token at positions far apart, with memory of a dtype. Those far on are reached by setting a stream
    forward whose rings are full, by whole turns of every ring."""
    torch.set_num_threads(threads)
    decoders = []
    for place in PLACES:
        turn = math.lcm(*(memory.capacity for memory in Ours(random_context(1), "plain").state.memories))
        read = place if place < 2 * turn else turn + place % turn
        decoder = Ours(random_context(read), precision, memory=getattr(torch, memory))
        decoder.set_forward(place - read)  # a stream whose rings are full, so that nothing but the count differs
        assert int(decoder.state.position[0]) == place
        decoders.append(decoder)
    turns: list[list[float]] = [[] for _ in PLACES]
    for _ in range(rounds):
        for decoder, times in zip(decoders, turns, strict=True):
            decoder.step(1)
            begin = time.perf_counter()
            for token in range(tokens):
                decoder.step(token)
            times.append((time.perf_counter() - begin) / tokens)
    first = turns[0]
    return [
        {
            "memory": memory,
            "position": place,
            "threads": threads,
            "ms": 1e3 * statistics.median(times),
            "of_first": statistics.median(b / a for a, b in zip(first, times, strict=True)),
        }
        for place, times in zip(PLACES, turns, strict=True)
    ]


def cores() -> int:
    """Cores that this process may use, `taskset` considered."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes() -> int:
    """Memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def play_long(tokens: int, precision: str, memory: torch.dtype) -> list[dict[str, float]]:
    """Seconds and resident memory while so many tokens are played, one after another; the first row is the start."""
    decoder = Ours(random_context(CONTEXT), precision, memory=memory)
    rows = []
    begin = time.perf_counter()
    for token in track(range(tokens + 1), f"playing {tokens:,} tokens"):
        if token % max(tokens // 10, 1) == 0:
            rows.append({"tokens": token, "seconds": time.perf_counter() - begin, "bytes": resident_bytes()})
        decoder.step(token % 512)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| decoder | threads | parameters | ms a token | tokens/s | × dense music | ours in int8 is faster |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["skipped"]:
            lines.append(f"| {row['name']} | | | | | | {row['skipped']} |")
            continue
        lines.append(
            f"| {row['name']} | {row['threads']} | {row['parameters'] / 1e6:.1f} M | {row['ms']:.2f} "
            f"| {row['tokens_a_second']:.0f} | {row['realtime']:.1f} | {row['faster']:.2f} × |"
        )
    return "\n".join(lines)


def places_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| memory | position | threads | ms a token | of that at 1,000 |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        place = f"| {row['memory']} | {row['position']:,} | {row['threads']} "
        lines.append(f"{place}| {row['ms']:.2f} | {row['of_first']:.2f} × |")
    return "\n".join(lines)


def long_table(rows: list[dict[str, float]]) -> str:
    lines = ["| tokens played | tokens/s so far | resident memory | of the first |", "|--:|--:|--:|--:|"]
    for row in rows:
        rate = row["tokens"] / row["seconds"] if row["tokens"] else 0.0
        share = row["bytes"] / rows[0]["bytes"]
        lines.append(f"| {row['tokens']:,} | {rate:.0f} | {row['bytes'] / 2**20:.1f} MiB | {share:.4f} × |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of tokens a second, with the line of dense music."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in rows if not row["skipped"]]
    figure, axis = plt.subplots(figsize=(9, 0.38 * len(shown) + 1.2), layout="constrained")
    labels = [f"{row['name']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}" for row in shown]
    colours = ["#2a6f97" if row["name"].startswith("dsmr") else "#e07a5f" for row in shown]
    axis.barh(labels, [row["tokens_a_second"] for row in shown], color=colours)
    axis.axvline(DENSE_MUSIC, color="black", linewidth=1, linestyle="--")
    axis.set_title(f"tokens a second behind {CONTEXT:,} tokens (dashed: a dense performance)", fontsize=10)
    for place, row in enumerate(shown):
        axis.text(row["tokens_a_second"], place, f" {row['tokens_a_second']:.0f}", va="center", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.invert_yaxis()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9, help="turns of every decoder")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores()}), help="numbers of threads")
    parser.add_argument("--long", type=int, default=0, help="instead: play so many tokens and watch memory")
    parser.add_argument("--precision", default="int8", help="of the long run and of the positions")
    parser.add_argument("--memory-dtype", default="float32", choices=MEMORIES, help="of the long run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    arguments = parser.parse_args()
    console = Console()
    machine = describe(torch.device("cpu"))
    del machine["threads"]  # each row has its own
    results: dict[str, Any] = {"machine": machine, "context": CONTEXT}
    if arguments.long:
        name, command = "cpu-decode-long", f"python -m benchmarks.decode --long {arguments.long}"
        torch.set_num_threads(1)
        precision, memory = arguments.precision, arguments.memory_dtype
        results["long"] = play_long(arguments.long, precision, getattr(torch, memory))
        named = f"{arguments.long:,} tokens played ({precision}, memory {memory}, 1 thread):"
        parts = [named, long_table(results["long"])]
    else:
        name = "cpu-decode"
        command = f"python -m benchmarks.decode --rounds {arguments.rounds} --tokens {arguments.tokens}"
        rows = [row for threads in arguments.threads for row in compare(arguments.rounds, arguments.tokens, threads)]
        places = [
            row
            for threads in arguments.threads
            for memory in MEMORIES
            for row in at_places(4 * arguments.rounds, arguments.tokens, threads, arguments.precision, memory)
        ]
        results |= {"rows": rows, "positions": places}
        parts = [table(rows), f"Time by position ({arguments.precision}):", places_table(places)]
        if importlib.util.find_spec("matplotlib") is None:
            console.print("no figure: matplotlib is not installed")
        else:
            draw(rows, arguments.out / f"{name}.png")
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    text = "\n\n".join([f"Measured by `{command}` on: {about}.", *parts])
    console.print(text, soft_wrap=True, highlight=False)
    write_json(arguments.out / f"{name}.json", results)
    write_text(arguments.out / f"{name}.md", text + "\n")


if __name__ == "__main__":
    main()
