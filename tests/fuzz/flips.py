"""Flip bits in every file that any verb writes, and have each flip found and the file named.

    python tests/fuzz/flips.py                # runs every verb, small; 60 flips a file, a table; three minutes
    python tests/fuzz/flips.py --flips 500

Which files there are is not written down anywhere: the verbs are run and what appears is looked at. `KINDS` says of
each how it is read again, or whose format it is, in which there is no place for a sum; a file of no kind is an error,
so that a new one cannot be forgotten.
"""

import argparse
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share

import verbs
from damaging import Flips, flip

from dsmr.console.files import read_json

Door = Callable[[Path], Any]


def _beside(name: str) -> Callable[[Path], bool]:
    return lambda path: (path.parent / name).is_file()


def _corpus(path: Path) -> Any:
    from dsmr.corpus.store import Corpus

    return Corpus.open(path if path.suffix == ".dsmr" else path.parent)


def _model(path: Path) -> Any:
    from dsmr.model.transformer import DSMRModel

    return DSMRModel.from_pretrained(path.parent)


def _vocabulary(path: Path) -> Any:
    from dsmr.music.vocabulary import Vocabulary

    return Vocabulary.load(path)


def _settings(path: Path) -> Any:
    from dsmr.runs.checkpoint import RunDirectory, load_settings

    return load_settings(RunDirectory(path.parent))


def _checkpoint(path: Path) -> Any:
    from dsmr.runs.checkpoint import load_checkpoint

    return load_checkpoint(path)


def _metrics(path: Path) -> Any:
    from dsmr.runs.checkpoint import Metrics

    return Metrics(path).read()


def _state(path: Path) -> Any:
    from dsmr.model.state import DSMRState

    return DSMRState.load(path)


def _export(path: Path) -> Any:
    from dsmr.exported.model import ExportedModel

    return ExportedModel.load(path.parent)


def _row(path: Path) -> Any:
    from dsmr.experiments.rows import read_row

    return read_row(path)


def _engines(path: Path) -> Any:
    from dsmr_kernels.backends.sdpa.tuned import read

    return read(path)


@dataclass(frozen=True)
class Kind:
    """A kind of file: which names it has, and how it is read again; or why it carries no sum."""

    name: str
    pattern: str
    door: Door | None
    why: str = ""
    where: Callable[[Path], bool] = lambda path: True


KINDS = (
    Kind(
        "corpus",
        r"(manifest|sources|tokenizer)\.json|index\.npz|(tokens|labels)\.bin",
        _corpus,
        "",
        _beside("manifest.json"),
    ),
    Kind("packed corpus", r".*\.dsmr", _corpus),
    Kind("export", r"export\.json|model\.onnx|tokenizer\.json", _export, "", _beside("export.json")),
    Kind("model", r"config\.json|model\.safetensors", _model),
    Kind("tokeniser", r"tokenizer\.json", _vocabulary),
    Kind("settings of a run", r"train\.json", _settings),
    Kind("checkpoint", r"last\.pt", _checkpoint),
    Kind("metrics", r"metrics\.jsonl", _metrics),
    Kind("saved stream", r"kept(-live)?", _state),
    Kind("row of a cell", r"row\.json", _row),
    Kind("tuned engines", r"engines\.json", _engines),
    Kind("report or measurement", r".*\.json", read_json),
    Kind("MIDI", r".*\.midi?", None, "the standard has no sum: what cannot be read right is refused"),
    Kind("picture", r".*\.png", None, "of PNG, whose chunks have CRCs that viewers check"),
    Kind("sound", r".*\.wav", None, "the format has no sum"),
    Kind("page", r".*\.html", None, "for browsers"),
    Kind("text", r".*\.(md|log|toml)|\.dsmr-demo", None, "for readers"),
)


def kind_of(path: Path) -> Kind | None:
    """The first kind that fits."""
    return next((kind for kind in KINDS if re.fullmatch(kind.pattern, path.name) and kind.where(path)), None)


def unknown(folder: Path) -> list[str]:
    """The files below a folder that are of no kind."""
    return sorted(str(path.relative_to(folder)) for path in _files(folder) if kind_of(path) is None)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def write_by_verbs(folder: Path, wanted: list[str]) -> Path:
    """Run verbs in a new place below `folder`; returns the folder that holds what they wrote, and nothing else."""
    place = verbs.place(folder / "place")
    brought = set(_files(place))
    for verb in wanted:
        with verbs.silent():
            code = verbs.run(verb, place)
        if code != verbs.CODES.get(verb, 0):
            raise RuntimeError(f"{verb} ended with {code}")
    for path in brought:
        path.unlink()
    return place


def main() -> int:
    """Run the verbs, flip, print a table."""
    parser = argparse.ArgumentParser(description="Flip bits in every file that any verb writes.")
    parser.add_argument("--flips", type=int, default=60, help="of a file, besides those of its seal")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    verbs.stand_in()
    with tempfile.TemporaryDirectory() as folder:
        place = write_by_verbs(Path(folder), list(verbs.VERBS))
        from dsmr_kernels.backends.sdpa.tuned import this_machine
        from dsmr_kernels.tools import tune_cpu

        tune_cpu.write(place / "engines.json", this_machine(), {"entries": [], "measured": []})  # of `tune`, in seconds
        if nameless := unknown(place):
            print(f"of no kind: {', '.join(nameless)}", file=sys.stderr)
            return 1
        rng, total, foreign = random.Random(asked.seed), Flips(), []
        print(f"{'file':56}{'flips':>7}{'found':>7}{'named':>7}")
        for path in _files(place):
            kind, name = kind_of(path), str(path.relative_to(place))
            assert kind is not None
            if kind.door is None:
                foreign.append((name, kind))
                continue
            found = flip(path, lambda path=path, door=kind.door: door(path), str(path.parent), asked.flips, rng)
            print(f"{name:56}{found.flips:7,}{found.found:7,}{found.named:7,}  {found.first_missed}", flush=True)
            total.flips, total.found, total.named = (
                total.flips + found.flips,
                total.found + found.found,
                total.named + found.named,
            )
        print(f"{'all':56}{total.flips:7,}{total.found:7,}{total.named:7,}")
        for kind in KINDS:
            if names := [name for name, own in foreign if own is kind]:
                print(f"no sum in {len(names)} files of {kind.name}: {kind.why}: {', '.join(names[:4])}")
    return int(total.named < total.flips)


if __name__ == "__main__":
    sys.exit(main())
