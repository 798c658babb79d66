"""What a training run keeps on disk, so that it can be killed at any moment and go on as if nothing had happened.

A run directory holds the best weights as a model that `DSMRModel.from_pretrained` loads (`config.json`,
`model.safetensors`, `tokenizer.json`), the whole state of the latest checkpoint (`last.pt`), what was asked for
(`train.json`), one line per step and validation (`metrics.jsonl`) and the loss curve (`loss.png`). Every file but the
metrics is replaced atomically; the metrics are cut back to the checkpoint when a run is resumed.
"""

import json
import random
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, describe, read_json, write_text
from dsmr.console.schema import Natural, Real, check
from dsmr.console.seal import check_seal, seal_zip
from dsmr.corpus.layout import FILES as CORPUS_FILES
from dsmr.corpus.layout import WORK

FORMAT = 1
SETTINGS = ("train", "model", "dtype", "corpus", "tokenizer_hash")
"""What `train.json` holds, besides versions (see `dsmr.runs.settings.run_settings`)."""


LINE = {"kind": str, "step": Natural, "loss?": Real}
"""What every line of `metrics.jsonl` holds."""
SHAPE = {
    "train": {"data": str, "out": str},
    "model": dict,
    "dtype": str,
    "corpus": {"name": str, "digest": str},
    "tokenizer_hash": str,
}


class RunDirectory:
    """The files of one run, by name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.last = self.path / "last.pt"
        self.settings = self.path / "train.json"
        self.metrics = self.path / "metrics.jsonl"
        self.loss_png = self.path / "loss.png"
        self.model_config = self.path / "config.json"
        self.weights = self.path / "model.safetensors"
        self.tokenizer = self.path / "tokenizer.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """Everything that training writes, in the order in which it is deleted: `last.pt` and `train.json`, which make
        it a run, come first, and the metrics last, which until then say that one was here."""
        return (
            self.last,
            self.settings,
            self.loss_png,
            self.model_config,
            self.weights,
            self.tokenizer,
            self.metrics,
        )

    @property
    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.settings.exists() or self.last.exists()

    def check_free(self, *, resume: bool, overwrite: bool) -> None:
        """`UserError` if training here would replace what is not its own, whatever the user allows: a corpus's files,
        or a model of other origin. A former run is replaced with `overwrite` and goes on with `resume`."""
        own = {file.name for file in self.files}
        for name in (*CORPUS_FILES, WORK):
            if name not in own and (self.path / name).exists():
                raise UserError(
                    f"{self.path} holds a prepared corpus ({name}), which training would damage: choose another --out"
                )
        if resume:
            return
        if self.holds_run and not overwrite:
            raise UserError(
                f"{self.path} already holds a training run: resume it, overwrite it, or choose another --out"
            )
        there = [file.name for file in self.files if file.exists()]
        if there and not (overwrite and (self.holds_run or self.metrics.exists())):
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            left = "overwrite it, or " if self.metrics.exists() else ""
            raise UserError(
                f"{self.path} holds files that training would replace ({there[0]}{more}), but no training run: "
                f"{left}choose another --out"
            )

    def clear(self) -> None:
        """Delete a former run's files, and nothing else."""
        self._delete(self.files)

    def sweep(self) -> None:
        """Delete what a killed process had not finished writing (see `dsmr.console.files.atomic_path`)."""
        self._delete([left for file in self.files for left in self.path.glob(f".{file.stem}-*{file.suffix}")])

    def _delete(self, files: Iterable[Path]) -> None:
        try:
            for file in files:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot delete a former run's files in {self.path}: {describe(error)}") from error


_SUM = re.compile(r', "crc": "([0-9a-f]{8})"}')
_SUM_TRACES = re.compile(r'"crc"|"[0-9a-f]{8}"}')  # one of them outlives any single damage to the sum


class Metrics:
    """`metrics.jsonl`: one JSON object a line, each with its `kind` ("train" or "validation") and `step`.

    The last member of each is `crc`, the CRC-32 of the line without it, so that not one bit of it changes unnoticed;
    lines without one, which earlier versions wrote, are read as before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line; it is on its way to the disk when this returns."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {describe(error)}") from error

    def read(self) -> list[dict[str, Any]]:
        """All whole lines, without a last one that a killed process left unfinished; `UserError` for other damage."""
        records = []
        try:
            lines = self.path.read_bytes().decode("utf-8").split("\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {describe(error)}") from error
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {error}") from error
        unfinished = lines.pop()  # nothing, unless a process was killed while it wrote: then the beginning of a record
        if unfinished and _whole(unfinished):
            raise UserError(f"{self.path} is damaged: its last line is not ended")
        for number, line in enumerate(lines, 1):
            try:
                records.append(check(_record(line), LINE, f"line {number} of {self.path}"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self.path} is damaged: line {number} is not JSON ({error})") from error
        return records

    def cut(self, step: int, validated: int) -> None:
        """Keep what a checkpoint knows: training up to `step` and validations up to step `validated`."""
        limits = {"train": step, "validation": validated}
        kept = [record for record in self.read() if record["step"] <= limits.get(record["kind"], step)]
        write_text(self.path, "".join(map(_line, kept)))


def _line(record: Mapping[str, Any]) -> str:
    text = json.dumps(record)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def _record(line: str) -> Any:
    """What a line holds, its sum checked and taken away."""
    record = json.loads(line)
    if not _SUM_TRACES.search(line):
        return record
    found = _SUM.fullmatch(line, max(0, len(line) - 20))
    if found is None or int(found[1], 16) != zlib.crc32(f"{line[: found.start()]}}}".encode()):
        raise ValueError("its sum is wrong")
    del record["crc"]
    return record


def _whole(line: str) -> bool:
    """Whether a line holds a whole record, with or without something behind it; the beginning of one does not."""
    try:
        json.JSONDecoder().raw_decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path`, whole or not at all. `UserError` if the disk is full."""
    with atomic_path(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **checkpoint}, file)
            seal_zip(temporary)
        except RuntimeError as error:
            # PyTorch's writer hides the reason, a full disk for instance, behind an error of its own.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU, running no code from the file.

    With `mapped` its tensors lie in the file until they are copied, once for all processes of a machine. Its seal is
    checked, or the sums of the archive that it is where an earlier version did not seal it.
    """
    try:
        if not check_seal(path) and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the sum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError as error:
        raise UserError(f"{error}; {_what_is_left(path)}") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {describe(error)}") from error
    except Exception as error:  # what unpickling raises of damaged bytes is of any kind
        raise UserError(f"{path} is not a checkpoint of dsmr, or it is damaged; {_what_is_left(path)}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if type(found) is not int or found != FORMAT:  # a tensor may be neither equal nor unequal
        raise UserError(f"{path} is a checkpoint of format {found}, but this version of dsmr reads format {FORMAT}")
    return checkpoint


def _what_is_left(path: Path) -> str:
    """What can be done about a checkpoint that is damaged, as the end of a sentence."""
    weights = RunDirectory(path.parent).weights
    begin = "begin anew with --overwrite"
    try:
        whole = check_seal(weights)
    except (OSError, UserError):
        whole = False
    if not whole:
        return begin
    return f"the best weights until then, {weights}, are whole and can be evaluated and played; to train, {begin}"


def load_settings(run: RunDirectory) -> dict[str, Any]:
    """The contents of `train.json`; `UserError` if the directory holds no run."""
    if not run.settings.is_file():
        raise UserError(f"{run.path} holds no training run: it has no {run.settings.name}")
    settings = read_json(run.settings)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(f"{run.settings} was not written by this version of dsmr")
    if missing := [name for name in SETTINGS if name not in settings]:
        raise UserError(f"{run.settings} is damaged: it lacks {', '.join(missing)}")
    check(settings, SHAPE, run.settings)
    return settings


def check_same_run(run: RunDirectory, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the settings `now` continue the run that was started with `then` (both as train.json).

    What must agree is what the weights and the stream depend on; the length of the run, the learning rate and how
    often it is measured and saved may change.
    """
    if then["tokenizer_hash"] != now["tokenizer_hash"]:
        raise UserError(
            f"cannot resume {run.path}: it was trained with tokeniser {then['tokenizer_hash'][:16]}, "
            f"but the corpus {now['train']['data']} was prepared with {now['tokenizer_hash'][:16]}"
        )
    if then["corpus"]["digest"] != now["corpus"]["digest"]:
        raise UserError(
            f"cannot resume {run.path}: it was trained on the corpus {then['corpus']['name']} "
            f"({then['corpus']['digest'][:16]}), but {now['train']['data']} holds {now['corpus']['name']} "
            f"({now['corpus']['digest'][:16]})"
        )
    pairs = [(key, then["model"].get(key), now["model"].get(key)) for key in {**then["model"], **now["model"]}]
    pairs += [(key, then["train"].get(key, was), now["train"].get(key, was)) for key, was in FIXED.items()]
    for key, old, new in [*pairs, ("dtype", then["dtype"], now["dtype"])]:
        if old != new:
            raise UserError(f"cannot resume {run.path}: its {key} is {old}, but {new} was asked for")


FIXED: dict[str, Any] = {
    **dict.fromkeys(("batch_size", "segments_per_step", "seed", "augment")),
    "curriculum": 0.0,
    "returns": 0.0,
    "returns_nearest": 1000,
    "returns_farthest": 16000,
}
"""Training settings that a resumed run cannot change, besides the model's: they decide what the stream holds. Beside
each is what it was in runs of before there was such a setting."""


def rng_state() -> dict[str, Any]:
    """The state of every global random generator, in tensors and plain values."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (the global one is what others may use)
    version, internal, following = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(key) for key in keys], int(place), int(has_gauss), float(gauss)],
        "python": [version, list(internal), following],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Bring every global random generator back to where `rng_state` found it."""
    torch.set_rng_state(state["torch"])
    kind, keys, place, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, has_gauss, gauss))  # noqa: NPY002
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal), following))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
