"""Damage MIDI files, prepare them, and account for every note-on of what is kept: by hand, ten thousand files.

    python tests/fuzz/midi.py --files 10000 --seed 0

Small pieces of our own composer are damaged at random (bits flipped, bytes inserted, deleted, cut short) and prepared
by `prepare_midi`. What is kept is held against a count of its own, which reads the bytes by the standard and shares
nothing with the reader: the note-ons in the kept files are the notes that the report says began, and the notes in the
corpus and those left out with a reason, together.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share

import numpy as np
from damaging import damaged

from dsmr.composer.compose import compose
from dsmr.corpus.prepare import prepare_midi
from dsmr.corpus.store import Corpus

BATCH = 250  # files of one corpus


def note_ons(data: bytes) -> int:
    """Note-ons of a velocity above 0 in a Standard MIDI File, by its specification (RP-001), chunk by chunk."""
    count, at = 0, 8 + int.from_bytes(data[4:8], "big")
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "big")
        if kind == b"MTrk":
            count += _of_track(data[at + 8 : at + 8 + length])
        at += 8 + length
    return count


def _of_track(body: bytes) -> int:
    count, at, status = 0, 0, 0
    while at < len(body):
        _, at = _number(body, at)  # the time since the last event
        first = body[at]
        if first in (0xF0, 0xF7, 0xFF):  # a message of any length, behind which a running status goes on
            at += 2 if first == 0xFF else 1
            length, at = _number(body, at)
            at += length
            continue
        if first & 0x80:
            status, at = first, at + 1
        data = 1 if status & 0xE0 == 0xC0 else 2
        count += status & 0xF0 == 0x90 and body[at + 1] > 0
        at += data
    return count


def _number(body: bytes, at: int) -> tuple[int, int]:
    value = 0
    while True:
        value, at = value << 7 | body[at] & 0x7F, at + 1
        if not body[at - 1] & 0x80:
            return value, at


@dataclass
class Account:
    """What became of the files, and of the note-ons of those that were kept."""

    files: int = 0
    kept: int = 0
    begun: int = 0
    in_corpus: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def pieces(count: int, minutes: float = 1.0) -> list[bytes]:
    """Small valid files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "piece.mid"
        found = []
        for number in range(count):
            compose(number, minutes=minutes).write_midi(path)
            found.append(path.read_bytes())
    return found


def account(folder: Path, whole: list[bytes], files: int, rng: random.Random, made: Account) -> None:
    """Damage `files` of the pieces into `folder`, prepare them, and add what became of them to `made`."""
    midi, out = folder / "midi", folder / "corpus"
    midi.mkdir(parents=True)
    contents = {f"{number}.mid": damaged(rng, rng.choice(whole)) for number in range(files)}
    for name, content in contents.items():
        (midi / name).write_bytes(content)
    report = prepare_midi(midi, out, jobs=1, progress=False)
    corpus = Corpus.open(out)
    counted = sum(note_ons(contents[name]) for name in corpus.source)
    vocabulary = corpus.vocabulary
    pitches = np.array([token.startswith(("Pitch_", "NoteOn_")) for token in vocabulary.tokens])
    played = int(pitches[corpus.tokens].sum())  # a token a note, by its name
    left_out = sum(report.dropped.values())
    if not counted == report.n_begun == played + left_out:
        made.wrong.append(f"{counted} note-ons, {report.n_begun} begun, {played} in the corpus, {left_out} left out")
    named = {name for name, _ in report.skipped}
    if set(contents) != set(corpus.source) | named or set(corpus.source) & named:
        made.wrong.append(f"{len(contents)} files, {len(corpus.source)} kept, {len(named)} skipped")
    made.files += files
    made.kept += corpus.n_pieces
    made.begun += counted
    made.in_corpus += played
    made.left_out.update(report.dropped)
    made.refused["files"] += len(report.skipped)


def main() -> int:
    """Batch after batch, a line each tenth, the account at the end."""
    parser = argparse.ArgumentParser(description="Damage MIDI files and account for every note of what is kept.")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, whole, made, began = random.Random(asked.seed), pieces(20), Account(), time.monotonic()
    while made.files < asked.files:
        with tempfile.TemporaryDirectory() as folder:
            account(Path(folder), whole, min(BATCH, asked.files - made.files), rng, made)
        if made.files % 1000 < BATCH:
            print(f"{made.files:,} files, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{made.files:,} damaged files: {made.kept:,} kept, {made.refused['files']:,} refused and named")
    print(
        f"{made.begun:,} note-ons in those kept: {made.in_corpus:,} in the corpus, {sum(made.left_out.values()):,} left"
    )
    for reason, count in made.left_out.most_common():
        print(f"  {count:,} {reason}")
    for line in made.wrong:
        print(f"does not add up: {line}", file=sys.stderr)
    return int(bool(made.wrong))


if __name__ == "__main__":
    sys.exit(main())
