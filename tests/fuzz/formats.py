"""Damage every file format of ours and open it as a user does, for as long as there is time: by hand, for an hour.

    python tests/fuzz/formats.py --minutes 60                        # all formats in turn
    python tests/fuzz/formats.py --minutes 10 --format checkpoint    # one of them; --list names them

Two kinds of damage. *Blind*: bits flipped, bytes cut, deleted, inserted, spliced, repeated, in the file as it lies
there; it then means what it meant, or is refused. *Forged*: what whoever wants to would write, with the seal taken out
or the sums made right again: wrong types inside JSON, other headers, other trees in a checkpoint; it then means
anything, or is refused. Refused is a `UserError` or `ValueError` of one line that names the file. Everything else is a
fault: another exception, more than `ROOM` of memory, more than `LONG` seconds. A minute of it runs in continuous
integration (`test_fuzz.py`).
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # what the tests share

import torch
from bounded import bounded
from damaging import as_json, edited, edits, spoiled
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from our_files import FORMATS, Format, meaning, write_all

from dsmr.console.errors import UserError

ROOM = 1 << 30  # bytes that opening a file of some kilobytes may take beyond what the process has
LONG = 20  # seconds of computing
A_TURN = 40  # cases of a seed
SAME, OTHER, REFUSED = "same", "other", "refused"


class HungError(BaseException):
    """Opening took too long. Not an `Exception`, which a door may catch."""


@dataclass(frozen=True)
class Fault:
    """What went wrong with one file."""

    format: str
    kind: str
    what: str
    content: bytes
    trace: str = ""


class Bench:
    """One file of each kind, and what each of them means when nothing is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = write_all(folder / "world")
        self._means: dict[str, str] = {}

    def whole(self, form: Format) -> bytes:
        return (self.world / form.file).read_bytes()

    @contextlib.contextmanager
    def copy(self, form: Format) -> Iterator[Path]:
        """What the format's door needs, in a folder of its own."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="copy-") as name:
            for part in form.needs:
                target = Path(name) / part
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (self.world / part).is_dir() else shutil.copy)(self.world / part, target)
            yield Path(name)

    def means(self, form: Format) -> str:
        if form.name not in self._means:
            with self.copy(form) as folder:
                self._means[form.name] = meaning(form.open(folder))
        return self._means[form.name]

    def try_out(self, form: Format, content: bytes, kind: str) -> str | Fault:
        """Open the file with this content: how it ended, or what is wrong with that."""
        means = self.means(form)
        with self.copy(form) as folder:
            (folder / form.file).write_bytes(content)
            if kind == "forged":
                made_right(folder, form)
            try:
                with bounded(ROOM, LONG, HungError(), computing=True):
                    found = meaning(form.open(folder))
            except (UserError, ValueError) as error:
                return self._said(form, kind, content, str(error), folder)
            except MemoryError:
                return Fault(form.name, kind, "takes too much memory", content, traceback.format_exc())
            except HungError:
                return Fault(form.name, kind, "hangs", content, traceback.format_exc())
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                return Fault(form.name, kind, what, content, traceback.format_exc())
        if found == means:
            return SAME
        if kind == "blind" and form.same:
            return Fault(form.name, kind, "means something else, unnoticed", content)
        return OTHER

    def _said(self, form: Format, kind: str, content: bytes, said: str, folder: Path) -> str | Fault:
        names = {str(folder), form.file, Path(form.file).name, *form.needs}
        not_finite = kind == "forged" and "not finite" in said  # numbers that somebody wrote, found as they are used
        if "\n" in said or not (not_finite or any(name in said for name in names)):
            return Fault(form.name, kind, "is refused without its name", content, said)
        return REFUSED


# Forging.


def made_right(folder: Path, form: Format) -> None:
    """Make the sums right again that stand in another file."""
    listed = {"corpus": ("manifest.json", "files"), "export": ("export.json", "file")}
    part, _, name = form.file.partition("/")
    if part not in listed or name == listed[part][0]:
        return
    describing = folder / part / listed[part][0]
    about = json.loads(describing.read_text())
    about.pop("seal", None)
    content = (folder / form.file).read_bytes()
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if part == "corpus":
        about["files"][name] = new
    elif name == "model.onnx":
        about["file"] = new
    describing.write_text(json.dumps(about))


def forgeries(form: Format, whole: bytes) -> st.SearchStrategy[bytes]:
    """What may stand where the file `whole` stands, its own seal taken out."""
    made = _FORGERS.get(form.form)
    return _edited(whole) if made is None else made(whole)


def _edited(whole: bytes) -> st.SearchStrategy[bytes]:
    return edits(len(whole)).map(lambda asked: edited(whole, asked))


def _json(whole: bytes) -> st.SearchStrategy[bytes]:
    value = json.loads(whole)
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict):
        for name in ("seal", "sum", "hash"):
            first.pop(name, None)
    text = as_json(value)
    return st.one_of(spoiled(value).map(as_json), spoiled(value).map(as_json), _edited(text))


def _lines(whole: bytes) -> st.SearchStrategy[bytes]:
    records = [json.loads(line) for line in whole.splitlines()]
    for record in records:
        record.pop("crc", None)
    lines = b"".join(as_json(record) + b"\n" for record in records)
    wrong = st.lists(st.sampled_from(records).flatmap(spoiled).map(as_json), min_size=1, max_size=3)
    mixed = wrong.map(lambda found: lines + b"\n".join(found) + b"\n" + lines)
    return st.one_of(mixed, wrong.map(b"\n".join), _edited(lines))


def _safetensors(whole: bytes) -> st.SearchStrategy[bytes]:
    length = int.from_bytes(whole[:8], "little")
    header, values = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header["__metadata__"].pop("seal", None)

    def put(header: Any, values: bytes = values) -> bytes:
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + values

    texts = header["__metadata__"]
    other = st.tuples(st.sampled_from(sorted(texts) or [""]), st.text(max_size=8) | spoiled({}).map(json.dumps))
    told = other.map(lambda pair: put({**header, "__metadata__": {**texts, pair[0]: pair[1]}}))
    inner = [name for name, text in texts.items() if text[:1] in "[{"]
    if inner:
        deep = st.sampled_from(inner).flatmap(
            lambda name: spoiled(json.loads(texts[name])).map(
                lambda new: put({**header, "__metadata__": {**texts, name: json.dumps(new)}})
            )
        )
        told = told | deep
    plain = put(header)
    return st.one_of(spoiled(header).map(put), told, _edited(values).map(lambda v: put(header, v)), _edited(plain))


def _zip(whole: bytes) -> st.SearchStrategy[bytes]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def put(name: str, content: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for other, own in members.items():
                archive.writestr(other, content if other == name else own)
        return out.getvalue()

    small = sorted(members, key=lambda name: len(members[name]))
    one = st.sampled_from(small).flatmap(lambda name: _edited(members[name]).map(lambda new: put(name, new)))
    pickled = [name for name in members if name.endswith("data.pkl")]
    if pickled:
        tree = torch.load(io.BytesIO(whole), weights_only=True)
        return st.one_of(_tree(tree), _tree(tree), _edited(members[pickled[0]]).map(lambda new: put(pickled[0], new)))
    if "manifest.json" in members:
        manifest = _json(members["manifest.json"]).map(lambda new: put("manifest.json", new))
        return one | manifest
    return one


def _tree(tree: Any) -> st.SearchStrategy[bytes]:
    """A checkpoint with something else in it."""

    def put(tree: Any) -> bytes:
        out = io.BytesIO()
        torch.save(tree, out)
        return out.getvalue()

    others = st.sampled_from([torch.zeros(0), torch.full((2, 3), float("nan")), torch.tensor(-1), torch.ones(5).bool()])
    return spoiled(tree, others).map(put)


_FORGERS: dict[str, Callable[[bytes], st.SearchStrategy[bytes]]] = {
    "json": _json,
    "lines": _lines,
    "safetensors": _safetensors,
    "zip": _zip,
}


# Running.


def turn(
    bench: Bench, form: Format, kind: str, number: int | None, cases: int, note: Callable[[str | Fault], None]
) -> None:
    """So many cases of one format and kind; `number` seeds them (None: always the same ones)."""
    whole = bench.whole(form)
    drawn = _edited(whole) if kind == "blind" else forgeries(form, whole)

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=number is None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(content=drawn)
    def one(content: bytes) -> None:
        if content != whole:
            note(bench.try_out(form, content, kind))

    (one if number is None else seed(number)(one))()


def kinds_of(form: Format) -> tuple[str, ...]:
    return ("blind", "forged") if form.sealed else ("blind",)


def main() -> int:
    """Turn by turn until the time is over; a line a minute, a table at the end."""
    parser = argparse.ArgumentParser(description="Damage files of ours and open them.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--format", choices=sorted(FORMATS), help="one of them; default: all in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the first turn")
    parser.add_argument("--keep", type=Path, help="a folder for the files that were faults")
    parser.add_argument("--list", action="store_true", help="name the formats and leave")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{form.name:24} {form.file}" for form in FORMATS.values()))
        return 0
    torch.set_num_threads(1)
    os.environ.setdefault("MPLBACKEND", "agg")
    chosen = [FORMATS[asked.format]] if asked.format else list(FORMATS.values())
    counts: dict[str, collections.Counter[str]] = {form.name: collections.Counter() for form in chosen}
    faults: dict[tuple[str, str, str], Fault] = {}

    def note(found: str | Fault) -> None:
        counts[form.name]["files"] += 1
        counts[form.name][found if isinstance(found, str) else "faults"] += 1
        if isinstance(found, Fault) and (key := (found.format, found.kind, found.what)) not in faults:
            faults[key] = found
            print(f"{found.format}, {found.kind}: {found.what} (seed {number})\n{found.trace}", file=sys.stderr)
            if asked.keep is not None:
                asked.keep.mkdir(parents=True, exist_ok=True)
                (asked.keep / f"{len(faults)}-{found.kind}-{Path(form.file).name}").write_bytes(found.content)

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        end, said, number = time.monotonic() + 60 * asked.minutes, time.monotonic(), asked.seed
        while time.monotonic() < end:
            for form in chosen:
                for kind in kinds_of(form):
                    if time.monotonic() < end:
                        turn(bench, form, kind, number, A_TURN, note)
                if time.monotonic() - said > 60:
                    said = time.monotonic()
                    print(f"{sum(count['files'] for count in counts.values()):,} files", flush=True)
            number += 1
    columns = ("files", SAME, OTHER, REFUSED, "faults")
    print(f"{'format':24}" + "".join(f"{column:>10}" for column in columns))
    for name, count in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"{name:24}" + "".join(f"{count[column]:>10,}" for column in columns))
    print(f"seeds {asked.seed} to {number - 1}; {len(faults)} kinds of fault")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
