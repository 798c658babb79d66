"""A stream of a million tokens through `dsmr generate --stream`, and what its process holds meanwhile: by hand.

    python tests/generation/long_stream.py --tokens 1000000    # PyTorch: half an hour of a core
    python tests/generation/long_stream.py --tokens 1000000 --engine onnx    # the exported model: ten minutes

A small model with random weights plays, so that the time goes to what surrounds it; the music is printed and written
while it grows, as a musician would have it. Fails if the process grows by more than a mebibyte after its first 20,000
tokens, or if the file does not hold every note that was printed.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from raw_midi import melody, midi, track
from resident import resident

from dsmr.music.tokenizer import vocabulary_of

MOST = 2**20
"""Bytes that the process may grow by."""


def made(folder: Path, engine: str) -> Path:
    """A run of a small model, or its export."""
    import torch

    from dsmr.model.config import DSMRConfig
    from dsmr.model.transformer import DSMRModel

    vocabulary = vocabulary_of("tsd")
    torch.manual_seed(0)
    schedule = "two_scale(layers=2, long=512, short=64, n_long=1)"
    run = folder / "run"
    DSMRModel(DSMRConfig(vocabulary.size, schedule, d_model=32, n_heads=2, segment_length=64)).save_pretrained(run)
    vocabulary.save(run / "tokenizer.json")
    if engine == "torch":
        return run
    subprocess.run([sys.executable, "-m", "dsmr", "export", str(run), "--out", str(folder / "export")], check=True)
    return folder / "export"


def watch(command: list[str], out: Path, tokens: int, settled: int) -> int:
    """Run the program, read what it prints, and see what it holds; 1 where a promise is broken."""
    began, notes, held, shown = time.monotonic(), 0, [], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            notes += "velocity" in line
            if notes % 500 == 0:
                held.append((notes, resident(process.pid)))
            if time.monotonic() > shown + 20:
                shown = time.monotonic()
                print(
                    f"{shown - began:6.0f} s  {notes:,} notes  {held[-1][1] / 2**20 if held else 0:.1f} MiB", flush=True
                )
        said = process.stderr.read()
    if process.returncode:
        print(f"it ended with {process.returncode}: {said.strip().splitlines()[-1]}")
        return 1
    from symusic import Score

    written = sum(len(part.notes) for part in Score(out.with_name(f"{out.stem}-continuation.mid")).tracks)
    later = [size for count, size in held if count >= notes * settled / tokens]
    grown = max(later) - later[0]
    print(
        f"{tokens:,} tokens, {notes:,} notes printed and {written:,} written in {time.monotonic() - began:.0f} s; "
        f"held {later[0] / 2**20:.1f} MiB after {settled:,} tokens and at most {grown / 2**10:,.0f} KiB more later"
    )
    return int(grown > MOST or written != notes)


def main() -> int:
    """Play, watch, say; 1 where a promise is broken."""
    parser = argparse.ArgumentParser(description="Watch a long stream's memory.")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--settled", type=int, default=20_000, help="tokens after which nothing may grow")
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompt, out = folder / "prompt.mid", folder / "out.mid"
        prompt.write_bytes(midi(track(*melody(*range(60, 80)))))
        command = [sys.executable, "-m", "dsmr", "generate", str(made(folder, asked.engine)), "--prompt", str(prompt)]
        command += ["--tokens", str(asked.tokens), "--out", str(out), "--stream", "--seed", "1", "--threads", "1"]
        return watch(command, out, asked.tokens, asked.settled)


if __name__ == "__main__":
    sys.exit(main())
