"""Not one bit of what we write changes unnoticed, and no content of any file of ours ends in a traceback."""

import hashlib
import io
import json
import lzma
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaging import WRONG, changed, flip, places
from our_files import EXPORTS, FORMATS, write_all
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_corpus import tiny_corpus

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, save_tensors, write_json
from dsmr.console.schema import Each, Maybe, Natural, Number, Real, check
from dsmr.console.seal import check_seal
from dsmr.corpus.pack import pack
from dsmr.corpus.store import Corpus
from dsmr.experiments.rows import lines_of, read_rows
from dsmr.exported.about import About
from dsmr.model.transformer import DSMRModel
from dsmr.music.vocabulary import Vocabulary
from dsmr.runs.checkpoint import Metrics, load_checkpoint, save_checkpoint
from dsmr.runs.settings import TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that we write and read again."""
    return write_all(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmr.training.loop.available", lambda: False)  # to be drawn, which takes longest


SEALED = [form for form in FORMATS.values() if form.sealed]
READERS = {form.file: form.open for form in SEALED if form.name != "metrics" and not form.name.startswith("cell")}


@pytest.mark.soak
@pytest.mark.parametrize("name", [form.file for form in SEALED])
def test_every_flipped_bit_is_found_and_the_file_named(tmp_path: Path, folder: Path, name: str) -> None:
    """Of 60 flips in last.pt 60 were resumed from in silence. Every file that a verb writes: tests/fuzz/flips.py."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    form = next(form for form in SEALED if form.file == name)
    door = read_json if form.name.startswith("cell") else lambda _: form.open(copy)  # else it would be measured anew
    found = flip(copy / name, lambda: door(copy / name), str(copy), 60, random.Random(name))
    assert found.flips == found.named, found


@pytest.mark.parametrize("name", list(READERS))
def test_a_file_cut_short_or_emptied_is_named(tmp_path: Path, folder: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        if length == len(whole) - 1 and name.endswith(("tokenizer.json", "engines.json")):
            continue  # no more than the last line's end
        (copy / name).write_bytes(whole[:length])
        with pytest.raises((UserError, ValueError), match=str(copy)):
            READERS[name](copy)


def test_a_damaged_checkpoint_says_what_is_left(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / "run" / "last.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "run" / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"last\.pt is damaged: .* the best weights until then, .*model\.safetensors"):
        load_checkpoint(copy / "run" / "last.pt")
    (copy / "run" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"last\.pt is damaged: .*; begin anew with --overwrite"):
        load_checkpoint(copy / "run" / "last.pt")


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [("pace", "validated", []), ("pace", "step", 1.5), ("pace", "seconds", -1.0), ("progress", "best_step", "two")],
)
def test_a_checkpoint_of_wrong_values_names_the_field(
    tmp_path: Path, folder: Path, record: str, field: str, value: Any
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "run" / "last.pt"
    tree = torch.load(file, weights_only=True)
    tree[record][field] = value
    torch.save(tree, file)
    with pytest.raises(UserError, match=rf"last\.pt is damaged: its {record}\.{field} is "):
        READERS["run/last.pt"](copy)
    torch.save({**tree, "format": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"last\.pt is a checkpoint of format tensor"):
        load_checkpoint(file)


def test_a_checkpoint_whose_parts_contradict_each_other_does_not_fit(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    file = copy / "run" / "last.pt"
    tree = torch.load(file, weights_only=True)
    kind, keys, *rest = tree["rng"]["numpy"]
    for change in (
        {"progress": {**tree["progress"], "best": 1.0, "best_step": None}},
        {"rng": {**tree["rng"], "numpy": (kind, [-1, *keys[1:]], *rest)}},
    ):
        torch.save({**tree, **change}, file)
        with pytest.raises(UserError, match=r"last\.pt does not fit its run: "):
            READERS["run/last.pt"](copy)


def test_files_without_a_seal_still_open(tmp_path: Path, folder: Path) -> None:
    """What earlier versions wrote. A checkpoint of theirs has the archive's own sums."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("run/config.json", "run/train.json", "corpus/manifest.json"):
        (copy / name).write_text(json.dumps(read_json(copy / name), indent=2))
        assert not check_seal(copy / name)
    for name in ("run/model.safetensors", "state.safetensors"):
        with safe_open(copy / name, "pt") as file:
            about = {key: value for key, value in file.metadata().items() if key != "seal"}
        save_file(load_file(copy / name), copy / name, about)
        assert not check_seal(copy / name)
    torch.save(torch.load(copy / "run" / "last.pt", weights_only=True), copy / "run" / "last.pt")
    assert not check_seal(copy / "run" / "last.pt")
    for read in READERS.values():
        read(copy)
    data = bytearray((copy / "run" / "last.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "run" / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(copy / "run" / "last.pt")


def test_sealed_files_are_ordinary_ones(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(3))
    for i in range(10):  # the same in, the same out, though the library shuffles metadata
        about = {"format": "pt", "b": 'a "quoted"\n name, 日本', "a": "/"}
        save_tensors(tmp_path / f"{i}.safetensors", {"x": torch.ones(3)}, about)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(10)}) == 1
    save_checkpoint(tmp_path / "a.pt", {"x": torch.ones(3)})
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["x"], torch.ones(3))
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None
    write_json(tmp_path / "a.json", {"x": 1}, sealed=True)
    assert json.loads((tmp_path / "a.json").read_text())["x"] == 1
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "a.json").write_text((tmp_path / "a.json").read_text().replace('"x": 1', '"x": 2'))
    with pytest.raises(UserError, match=r"a\.json is damaged: .* if you edited it by hand, take its seal out"):
        read_json(tmp_path / "a.json")


# Wrong types.

QUICK: dict[str, Callable[[Path], Any]] = {
    "run/config.json": lambda copy: DSMRModel.from_pretrained(copy / "run"),
    "run/tokenizer.json": lambda copy: Vocabulary.load(copy / "run" / "tokenizer.json"),
    "run/train.json": lambda copy: TrainConfig.of_run(copy / "run"),
    **({"export/export.json": lambda copy: About.load(copy / "export")} if EXPORTS else {}),
    "corpus/manifest.json": lambda copy: Corpus.open(copy / "corpus"),
    "corpus/sources.json": lambda copy: Corpus.open(copy / "corpus"),
    "results/cells/two_scale-s0/row.json": lambda copy: lines_of(read_rows(copy / "results")),
}


@pytest.mark.parametrize("name", list(QUICK))
def test_wrong_types_are_sentences(tmp_path: Path, folder: Path, name: str) -> None:
    """As whoever wants to would write them: without a seal, or with a right one."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    value = read_json(copy / name)
    refused = 0
    for path in places(value):
        for wrong in WRONG:
            spoiled = changed(value, path, wrong)
            if name == "run/tokenizer.json" and isinstance(spoiled, dict):
                spoiled.pop("hash", None)
            (copy / name).write_text(json.dumps(spoiled))
            try:
                QUICK[name](copy)
            except UserError:
                refused += 1
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise AssertionError(f"{path} = {wrong!r}") from error
    assert refused > 20


def test_metrics_of_any_content_are_read_or_refused(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    good = '{"kind": "train", "step": 1, "loss": 2.0}\n'
    for bad in ("[]", "1", "{}", '{"kind": 1, "step": 1}', '{"kind": "train", "step": "x"}', "{", "[" * 9999, "\\xff"):
        metrics.path.write_text(good + bad + "\n" + good)
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            metrics.cut(1, 1)
    metrics.path.write_text(good + '{"kind": "tra')
    metrics.cut(1, 1)
    assert metrics.path.read_text() == good[:-2] + ', "crc": "9b8f0fc9"}\n'
    assert metrics.read() == [json.loads(good)]


def test_a_shape_names_what_does_not_fit() -> None:
    shape = {"name": str, "files": Each({"bytes": Natural}), "rates?": [Real]}
    fits = {"name": "x", "files": {"a": {"bytes": 3}}, "more": None}
    assert check(fits, shape, "m.json") is fits
    assert check([None, 1.5, float("nan")], [Maybe(Number)], "m.json")
    for wrong in ("x", True, 10**400, [1]):
        with pytest.raises(UserError, match=r"its \[0\] is .*expected a number"):
            check([wrong], [Maybe(Number)], "m.json")
    for wrong, said in (
        ([], "m.json is damaged: it is [], expected a record"),
        ({"name": "x"}, "m.json is damaged: it lacks files"),
        ({**fits, "name": 1}, "m.json is damaged: its name is 1, expected text"),
        (
            {**fits, "files": {"a": {"bytes": -1}}},
            "m.json is damaged: its files.a.bytes is -1, expected a whole number",
        ),
        ({**fits, "files": {"a": {"bytes": True}}}, "its files.a.bytes is True"),
        ({**fits, "rates": [1, float("nan")]}, "its rates[1] is nan, expected a finite number"),
        ({**fits, "name": None}, "its name is nothing"),
    ):
        with pytest.raises(UserError) as caught:
            check(wrong, shape, "m.json")
        assert said in str(caught.value)


# Packed corpora.


def repacked(packed: Path, **new: bytes) -> None:
    with zipfile.ZipFile(packed) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in {**members, **{key.replace("_", "."): value for key, value in new.items()}}.items():
            file.writestr(name, content)


@pytest.mark.soak
@pytest.mark.parametrize("member", ["tokens", "sources", "index"])
def test_a_packed_corpus_that_expands_without_bound_is_refused_before_memory_is_taken(
    tmp_path: Path, member: str
) -> None:
    """2.1 MB took 4.4 GB."""
    corpus = tiny_corpus(tmp_path / "c")
    packed = pack(tmp_path / "c", tmp_path / "c.dsmr")
    size = 2**29
    if member == "tokens":
        manifest = {
            **corpus.manifest,
            "files": {**corpus.manifest["files"], "tokens.bin": {"bytes": size, "sha256": ""}},
        }
        squeezed = lzma.LZMACompressor()
        parts = [squeezed.compress(bytes(2**24)) for _ in range(size // 2**24)] + [squeezed.flush()]
        repacked(packed, manifest_json=json.dumps(manifest).encode(), tokens_bin_xz=b"".join(parts))
    elif member == "sources":
        repacked(packed, sources_json=bytes(size))
    else:
        repacked(packed, index_npz=bytes(size))
    assert packed.stat().st_size < 2**20
    code = (
        "import resource, sys; from dsmr.corpus.store import Corpus\n"
        "from dsmr.console.errors import UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: Corpus.open({str(packed)!r})\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, grown = ended.stdout.splitlines()
    assert "c.dsmr is refused: its " in said
    assert int(grown) < 32 * 1024  # KiB


def test_an_index_that_claims_more_than_it_holds_is_refused(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = read_json(copy / "corpus" / "manifest.json")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<i8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(copy / "corpus" / "index.npz", "w") as file:
        for name in ("offsets", "n_notes", "seconds", "split"):
            file.writestr(f"{name}.npy", huge.getvalue())
    data = (copy / "corpus" / "index.npz").read_bytes()
    manifest["files"]["index.npz"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(copy / "corpus" / "manifest.json", manifest)
    with pytest.raises(UserError, match="0 values of offsets, not 1000000000000"):
        Corpus.open(copy / "corpus")
