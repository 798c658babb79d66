"""Every kind of file that we write and read again, each with the door that a user opens it through.

`write_all` makes a folder with one of each, by what the verbs call. `FORMATS` says for each where it lies, how it is
opened and used, and what it then means: two files that mean the same may differ in their bytes, and a file that is
damaged means the same or is refused in a sentence that names it.
"""

import dataclasses
import hashlib
import importlib.util
import io
import os
import tarfile
import zipfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from small_table import small_corpus, small_table, toml
from tiny_corpus import tiny_corpus

from dsmr.console.files import read_json
from dsmr.corpus.maestro import locate, read_listing
from dsmr.corpus.pack import pack
from dsmr.corpus.store import Corpus
from dsmr.corpus.streams import StreamLoader
from dsmr.experiments.cell import CellFolder, run_cell
from dsmr.experiments.report import markdown
from dsmr.experiments.rows import lines_of, read_rows
from dsmr.experiments.runner import run_table
from dsmr.experiments.table import Table
from dsmr.generation.player import Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.saved_stream import load_player, save_player
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary
from dsmr.runs.settings import TrainConfig
from dsmr.training import loop
from dsmr.training.loop import train
from dsmr_kernels.backends.sdpa.tuned import read as read_engines
from dsmr_kernels.backends.sdpa.tuned import this_machine
from dsmr_kernels.tools import tune_cpu

EXPORTS = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))  # the extra `onnx`
MUSIC = all(importlib.util.find_spec(name) for name in ("miditok", "symusic"))  # the extra `music`


@dataclass(frozen=True)
class Format:
    """A kind of file of ours.

    Attributes:
        file: where one lies in the folder of `write_all`.
        open: opens and uses it, of a copy of that folder, and returns what it means.
        form: what it is made of: "json", "lines" of it, "safetensors", "zip" (of `torch.save`, too), "toml" or "bytes".
        sealed: not one bit of it changes unnoticed. What is not is written by others, or in their formats.
        same: what it means does not change unnoticed; so it is of archives, which have sums, but not of every byte.
        needs: the parts of the folder that the door opens, which it may also change.
    """

    name: str
    file: str
    open: Callable[[Path], Any]
    form: str
    needs: tuple[str, ...]
    sealed: bool = True
    same: bool = True


def quiet() -> Console:
    return Console(file=io.StringIO())


def write_all(out: Path) -> Path:
    """A folder with one file of each kind."""
    torch.manual_seed(0)
    corpus = tiny_corpus(out / "corpus", labels=True)
    pack(out / "corpus", out / "corpus.dsmr")
    train(_settings(out), corpus=corpus, console=quiet())
    model = DSMRModel.from_pretrained(out / "run")
    player = Player.begin(model, [1, 4, 5], Sampling(seed=1), Vocabulary.load(out / "run" / "tokenizer.json"))
    list(player.play(10))
    save_player(out / "stream", player)
    model.new_state(1, aligned=False).save(out / "state.safetensors")
    if EXPORTS:
        from dsmr.export.write import export_run

        export_run(out / "run", out / "export")
    small_corpus(out / "long")
    table = small_table("long")
    table["train"] |= {"steps": 3, "eval_every": 3}
    (out / "table.toml").write_text(toml(table))
    read = Table.parse(table)
    with _within(out):
        run_cell(read, read.cells[0], "long", CellFolder(Path("results"), read.cells[0].key), quiet())
        run_table(read, "results", console=quiet())
    tune_cpu.write(out / "engines.json", this_machine(), {"entries": ENGINES, "measured": []})
    if MUSIC:
        _write_music(out)
    return out


def _settings(folder: Path) -> TrainConfig:
    return TrainConfig(
        data=str(folder / "corpus"),
        out=str(folder / "run"),
        schedule="uniform(layers=2, horizon=8)",
        **{"d_model": 16, "n_heads": 2, "segment_length": 8, "batch_size": 2, "augment": False},
        **{"steps": 3, "eval_every": 2, "save_every": 2, "device": "cpu", "dtype": "float32"},
    )


ENGINES = [{"dtype": "float32", "pass": "forward", "engine": "products", "computed_in": "float32"}]


def _write_music(out: Path) -> None:
    from dsmr.composer.compose import compose

    compose(3, minutes=1.0).write_midi(out / "piece.mid")
    piece = (out / "piece.mid").read_bytes()
    listing = b"midi_filename,split\n2004/piece.mid,train\n"
    (out / "maestro").mkdir()
    (out / "maestro" / "maestro-v3.0.0.csv").write_bytes(listing)
    named = {"maestro/maestro-v3.0.0.csv": listing, "maestro/2004/piece.mid": piece}
    with zipfile.ZipFile(out / "archive.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in named.items():
            packed.writestr(name, content)
    with tarfile.open(out / "archive.tar.gz", "w:gz") as tar:
        for name, content in named.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


class _within:
    """Work in a folder, so that what is written names no other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.before = os.getcwd()
        os.chdir(self.folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self.before)


# The doors.


def open_corpus(path: Path) -> Any:
    corpus = Corpus.open(path)
    batch = next(StreamLoader(corpus, "train", 2, 16, 0))
    pieces = [corpus.piece(i) for i in range(corpus.n_pieces)], corpus.labels, corpus.source, corpus.split
    return corpus.digest, corpus.name, pieces, corpus.n_notes, corpus.seconds, corpus.vocabulary.hash, batch.tokens


def open_model(folder: Path) -> Any:
    """Load a run and play."""
    model, vocabulary = DSMRModel.from_pretrained(folder / "run"), Vocabulary.load(folder / "run" / "tokenizer.json")
    player = Player.begin(model, [1, 4, 5], Sampling(seed=1), vocabulary)
    return model.config.to_dict(), model.state_dict(), vocabulary.to_json(), list(player.play(3))


def resume(folder: Path) -> Any:
    """Go on with a run, which has ended: only what is there is read."""
    config = dataclasses.replace(TrainConfig.of_run(folder / "run"), data=str(folder / "corpus"))
    loop.available = lambda: False  # the loss curve, which takes longer to draw than all else
    result = train(config, resume=True, console=quiet())
    return result.step, result.loss, result.best, result.tokens, config.schedule


def open_stream(folder: Path) -> Any:
    model, vocabulary = DSMRModel.from_pretrained(folder / "run"), Vocabulary.load(folder / "run" / "tokenizer.json")
    player = load_player(folder / "stream", model, vocabulary)
    heard = [list(one) for one in player.tokens]
    return heard, dataclasses.asdict(player.sampling), player.on_one_instant, list(player.play(3))


def open_state(folder: Path) -> Any:
    from dsmr.model.state import DSMRState

    state = DSMRState.load(folder / "state.safetensors")
    model = DSMRModel.from_pretrained(folder / "run")
    held = state.tensors()
    return held, next(iter(model.generate([1, 4], sampling=Sampling(seed=1), max_tokens=3, state=state)))


def open_export(folder: Path) -> Any:
    from dsmr.exported.model import ExportedModel

    model = ExportedModel.load(folder / "export")
    return model.about, list(Player.begin(model, [1, 4, 5], Sampling(seed=1), model.vocabulary).play(3))


def report(folder: Path) -> Any:
    """What `experiments run` and `experiments report` read of cells that are finished."""
    with _within(folder):
        table = Table.load(Path("table.toml"))
        result = run_table(table, folder / "results", console=quiet())
    rows = read_rows(folder / "results")
    return result, rows, markdown(rows, lines_of(rows), [])


def finish_cell(folder: Path) -> Any:
    """Go on with a cell that was killed before its row was written."""
    with _within(folder):
        table = Table.load(Path("table.toml"))
        cell = CellFolder(folder / "results", table.cells[0].key)
        cell.row.unlink(missing_ok=True)
        loop.available = lambda: False
        run_cell(table, table.cells[0], "long", cell, quiet())
        row = read_json(cell.row)
    return {name: value for name, value in row.items() if name != "measured"}, row["measured"]["peak_bytes"]


def open_midi(folder: Path) -> Any:
    from dsmr.music.tokenizer import encode_midi, vocabulary_of

    return encode_midi(folder / "piece.mid", vocabulary_of())


def open_archive(folder: Path, name: str) -> Any:
    out = folder / "unpacked"
    root = locate(folder / name, out)
    return read_listing(root), {path.name: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def open_listing(folder: Path) -> Any:
    return read_listing(locate(folder / "maestro", folder / "unpacked"))


RUN, CELL = ("run", "corpus"), ("results", "table.toml", "long")
FORMATS: dict[str, Format] = {
    one.name: one
    for one in [
        *(
            Format(f"corpus {name}", f"corpus/{name}", lambda path: open_corpus(path / "corpus"), form, ("corpus",))
            for name, form in {
                "manifest.json": "json",
                "tokens.bin": "bytes",
                "labels.bin": "bytes",
                "index.npz": "zip",
                "sources.json": "json",
                "tokenizer.json": "json",
            }.items()
        ),
        Format("packed", "corpus.dsmr", lambda path: open_corpus(path / "corpus.dsmr"), "zip", ("corpus.dsmr",)),
        Format("config", "run/config.json", open_model, "json", ("run",)),
        Format("weights", "run/model.safetensors", open_model, "safetensors", ("run",)),
        Format("tokeniser", "run/tokenizer.json", open_model, "json", ("run",)),
        Format("settings", "run/train.json", resume, "json", RUN),
        Format("metrics", "run/metrics.jsonl", resume, "lines", RUN),
        Format("checkpoint", "run/last.pt", resume, "zip", RUN),
        Format("stream", "stream", open_stream, "safetensors", ("stream", "run")),
        Format("state", "state.safetensors", open_state, "safetensors", ("state.safetensors", "run")),
        *(
            Format(f"export {name}", f"export/{name}", open_export, form, ("export",))
            for name, form in {"export.json": "json", "model.onnx": "bytes", "tokenizer.json": "json"}.items()
            if EXPORTS
        ),
        Format("table", "table.toml", report, "toml", CELL, sealed=False, same=False),
        Format("results", "results/table.json", report, "json", CELL),
        Format("row", "results/cells/two_scale-s0/row.json", report, "json", CELL),
        *(
            Format(f"cell {name}", f"results/cells/two_scale-s0/{name}.json", finish_cell, "json", CELL)
            for name in ("evaluation", "memory", "peak")
        ),
        Format("tuned", "engines.json", lambda path: read_engines(path / "engines.json"), "json", ("engines.json",)),
        *(
            one
            for one in (
                Format("midi", "piece.mid", open_midi, "bytes", ("piece.mid",), sealed=False, same=False),
                Format(
                    "listing",
                    "maestro/maestro-v3.0.0.csv",
                    open_listing,
                    "bytes",
                    ("maestro",),
                    sealed=False,
                    same=False,
                ),
                *(
                    Format(name, name, lambda path, name=name: open_archive(path, name), "bytes", (name,), sealed=False)
                    for name in ("archive.zip", "archive.tar.gz")
                ),
            )
            if MUSIC
        ),
    ]
}


def meaning(value: Any) -> str:
    """A digest of what a door returned, by its values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().contiguous()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(
            value.view(torch.uint8).numpy().tobytes() if value.numel() and value.dim() else repr(value).encode()
        )
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key in value:
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple | array):
        digest.update(f"[{len(value)}".encode())
        for one in value:
            _feed(digest, one)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, bytes):
        digest.update(value)
    else:
        digest.update(f"<{value!r}>".encode())
