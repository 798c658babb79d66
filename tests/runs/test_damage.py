"""Not one bit of what we write changes unnoticed, and no content of any file of ours ends in a traceback."""

import hashlib
import importlib.util
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_corpus import tiny_corpus, tiny_vocabulary

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, save_tensors, write_json
from dsmr.console.schema import Each, Natural, Real, check
from dsmr.console.seal import check_seal
from dsmr.corpus.pack import pack
from dsmr.corpus.store import Corpus
from dsmr.export.write import export_run
from dsmr.exported.about import About
from dsmr.exported.model import ExportedModel
from dsmr.generation.player import Player
from dsmr.generation.sampling import Sampling
from dsmr.generation.saved_stream import load_player, save_player
from dsmr.model.transformer import DSMRConfig, DSMRModel
from dsmr.music.vocabulary import Vocabulary
from dsmr.runs.checkpoint import Metrics, RunDirectory, load_checkpoint, load_settings, save_checkpoint
from dsmr.runs.settings import TrainConfig, run_settings


def model() -> DSMRModel:
    torch.manual_seed(0)
    size = tiny_vocabulary().size
    return DSMRModel(DSMRConfig(size, "uniform(layers=2, horizon=8)", d_model=16, n_heads=2, segment_length=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file that we write and read again."""
    out = tmp_path_factory.mktemp("run")
    net = model()
    net.save_pretrained(out)
    tiny_vocabulary().save(out / "tokenizer.json")
    optimizer = torch.optim.AdamW(net.parameters())
    save_checkpoint(out / "last.pt", {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 3})
    corpus = tiny_corpus(out / "corpus", labels=True)
    config = TrainConfig(data="corpus", out=str(out))
    write_json(out / "train.json", run_settings(config, corpus, net.config, torch.float32), sealed=True)
    pack(out / "corpus", out / "corpus.dsmr")
    player = Player.begin(net, [1, 4, 5], Sampling(seed=1))
    list(player.play(10))
    save_player(out / "stream", player)
    net.new_state(1, aligned=False).save(out / "state.safetensors")
    if EXPORTS:
        export_run(out, out / "export")
    return out


READERS: dict[str, Callable[[Path], Any]] = {
    "last.pt": lambda path: load_checkpoint(path / "last.pt"),
    "model.safetensors": DSMRModel.from_pretrained,
    "config.json": DSMRModel.from_pretrained,
    "tokenizer.json": lambda path: Vocabulary.load(path / "tokenizer.json"),
    "train.json": lambda path: load_settings(RunDirectory(path)),
    "state.safetensors": lambda path: type(model().new_state(1)).load(path / "state.safetensors"),
    "stream": lambda path: load_player(path / "stream", model()),
    "corpus/manifest.json": lambda path: Corpus.open(path / "corpus"),
    "corpus/index.npz": lambda path: Corpus.open(path / "corpus"),
    "corpus/tokens.bin": lambda path: Corpus.open(path / "corpus"),
    "corpus/sources.json": lambda path: Corpus.open(path / "corpus"),
}


EXPORTS = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))  # the extra `onnx`
if EXPORTS:
    READERS["export/export.json"] = lambda path: About.load(path / "export")
    for part in ("model.onnx", "tokenizer.json"):
        READERS[f"export/{part}"] = lambda path: ExportedModel.load(path / "export")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(READERS))
def test_every_flipped_bit_is_found_and_the_file_named(tmp_path: Path, folder: Path, name: str) -> None:
    """Of 60 flips in last.pt 60 were resumed from in silence."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    READERS[name](copy)
    whole = (copy / name).read_bytes()
    rng = random.Random(name)
    places = [rng.randrange(len(whole)) for _ in range(60)]
    if (seal := whole.find(b'"seal"')) >= 0:
        places += range(seal, min(seal + 90, len(whole)))  # the seal itself, its name and what stands around it
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        (copy / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            READERS[name](copy)
        assert str(copy) in str(caught.value), place
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(READERS))
def test_a_file_cut_short_or_emptied_is_named(tmp_path: Path, folder: Path, name: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    whole = (copy / name).read_bytes()
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        if name.endswith(".json") and length == len(whole) - 1 and name.endswith("tokenizer.json"):
            continue  # no more than the last line's end
        (copy / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=str(copy)):
            READERS[name](copy)


def test_a_damaged_checkpoint_says_what_is_left(tmp_path: Path, folder: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / "last.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"last\.pt is damaged: .* the best weights until then, .*model\.safetensors"):
        load_checkpoint(copy / "last.pt")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"last\.pt is damaged: .*; begin anew with --overwrite"):
        load_checkpoint(copy / "last.pt")


def test_files_without_a_seal_still_open(tmp_path: Path, folder: Path) -> None:
    """What earlier versions wrote. A checkpoint of theirs has the archive's own sums."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for name in ("config.json", "train.json", "corpus/manifest.json"):
        (copy / name).write_text(json.dumps(read_json(copy / name), indent=2))
        assert not check_seal(copy / name)
    for name in ("model.safetensors", "state.safetensors"):
        with safe_open(copy / name, "pt") as file:
            about = {key: value for key, value in file.metadata().items() if key != "seal"}
        save_file(load_file(copy / name), copy / name, about)
        assert not check_seal(copy / name)
    torch.save(torch.load(copy / "last.pt", weights_only=True), copy / "last.pt")
    assert not check_seal(copy / "last.pt")
    for read in READERS.values():
        read(copy)
    data = bytearray((copy / "last.pt").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "last.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(copy / "last.pt")


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

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, 1e400, 10**30, "", "x", [], [[]], {}, {"a": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Every place in a nested value, but no more than a few elements of a long list."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 2)):
            yield from places(value[i], (*path, i))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    out = dict(value) if isinstance(value, dict) else list(value)
    out[path[0]] = changed(value[path[0]], path[1:], new)
    return out


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "train.json",
        *["export/export.json"] * EXPORTS,
        "corpus/manifest.json",
        "corpus/sources.json",
    ],
)
def test_wrong_types_are_sentences(tmp_path: Path, folder: Path, name: str) -> None:
    """As whoever wants to would write them: without a seal, or with a right one."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    value = read_json(copy / name)
    refused = 0
    for path in places(value):
        for wrong in WRONG:
            spoiled = changed(value, path, wrong)
            if name == "tokenizer.json" and isinstance(spoiled, dict):
                spoiled.pop("hash", None)
            (copy / name).write_text(json.dumps(spoiled))
            try:
                READERS[name](copy)
                if name == "train.json":
                    TrainConfig.of_run(copy)
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
    assert metrics.path.read_text() == good


def test_a_shape_names_what_does_not_fit() -> None:
    shape = {"name": str, "files": Each({"bytes": Natural}), "rates?": [Real]}
    fits = {"name": "x", "files": {"a": {"bytes": 3}}, "more": None}
    assert check(fits, shape, "m.json") is fits
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
