"""An hour of `dsmr train`, killed now and then, and what its process holds meanwhile: by hand.

    python tests/training/long_training.py --minutes 60

A small model learns composed pieces, so that much happens: thousands of steps, epochs, validations and checkpoints.
The process is killed with SIGKILL after every `--part` minutes and the same run goes on. Fails if a process grows by
more than 8 MiB after its first two minutes, if a step is missing or told twice, if a loss is not finite, or if
the last losses are not below the first.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from resident import resident

MOST = 8 * 2**20
"""Bytes that a process may grow by, once it has settled: a heap moves a little for ever."""


def part(command: list[str], seconds: float, settled: float) -> tuple[int | None, int]:
    """Let the program run so long at most: its exit code, None if it was killed, and by how much it grew."""
    began, first, most = time.monotonic(), 0, 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while (code := process.poll()) is None and time.monotonic() < began + seconds:
            time.sleep(1)
            if time.monotonic() > began + settled and (held := resident(process.pid)):
                first, most = first or held, max(most, held)
        if code is None:
            process.send_signal(signal.SIGKILL)
    print(
        f"{time.monotonic() - began:6.0f} s  {most / 2**20:.1f} MiB, {(most - first) / 2**10:,.0f} KiB more", flush=True
    )
    return code, most - first


def main() -> int:
    """Train, kill, go on, look; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description="Watch a long training's memory.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--part", type=float, default=15.0, help="minutes after which it is killed")
    parser.add_argument("--settled", type=float, default=2.0, help="minutes after which a process may not grow")
    asked = parser.parse_args()
    if asked.part <= asked.settled:
        parser.error(f"a part of {asked.part:g} minutes ends before its process has settled, in {asked.settled:g}")
    with tempfile.TemporaryDirectory() as name:
        corpus, run = Path(name) / "songs", Path(name) / "run"
        dsmr = [sys.executable, "-m", "dsmr"]
        composed = [*dsmr, "prepare", "composed", "--out", str(corpus), "--pieces", "24"]
        subprocess.run(composed, check=True, stdout=subprocess.DEVNULL)
        schedule = "two_scale(layers=2, long=512, short=64, n_long=1)"
        command = [*dsmr, "train", "--data", str(corpus), "--out", str(run), "--schedule", schedule, "--d-model", "32"]
        command += ["--n-heads", "2", "--segment-length", "64", "--batch-size", "4", "--threads", "1"]
        command += ["--eval-every", "1000", "--save-minutes", "0.5", "--minutes", str(asked.minutes)]
        grown, code = [], None
        while code is None:
            resume = ["--resume"] if run.exists() else []
            code, more = part([*command, *resume], 60 * asked.part, 60 * asked.settled)
            grown.append(more)
        if code:
            print(f"it ended with {code}")
            return 1
        return judged(run, grown)


def judged(run: Path, grown: list[int]) -> int:
    """Say what there was; 1 where a promise is broken."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [one["step"] for one in records if one["kind"] == "train"]
    losses = [one["loss"] for one in records if one["kind"] == "train"]
    head, tail = (sum(some) / len(some) for some in (losses[:100], losses[-100:]))
    in_order = steps == list(range(1, len(steps) + 1)) and len(steps) > 200
    print(
        f"{steps[-1]:,} steps told in {len(steps):,} lines, {len(records) - len(steps):,} validations, "
        f"killed {len(grown) - 1} times; grew by {max(grown) / 2**10:,.0f} KiB at most; loss {head:.3f} to {tail:.3f}"
    )
    return int(max(grown) > MOST or not in_order or not all(map(math.isfinite, losses)) or tail >= head)


if __name__ == "__main__":
    sys.exit(main())
