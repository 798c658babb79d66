"""A corpus opens as it was written, as a directory or packed, or says in one sentence what is wrong with it."""

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import tiny_corpus, tiny_piece, tiny_vocabulary

from dsmr.console.errors import UserError
from dsmr.console.files import read_json, write_json
from dsmr.corpus import store
from dsmr.corpus.pack import pack
from dsmr.corpus.store import Corpus, PieceRecord, write_corpus


def same(one: Corpus, other: Corpus) -> None:
    assert one.digest == other.digest
    assert one.vocabulary == other.vocabulary
    assert one.source == other.source
    for name in ("tokens", "offsets", "n_notes", "seconds", "split"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert (one.labels is None) == (other.labels is None)
    for i in range(one.n_pieces):
        np.testing.assert_array_equal(one.piece_labels(i), other.piece_labels(i))


@pytest.mark.parametrize("labels", [False, True])
def test_a_corpus_opens_as_it_was_written(tmp_path: Path, labels: bool) -> None:
    corpus = tiny_corpus(tmp_path / "c", labels=labels)
    assert isinstance(corpus.tokens, np.memmap)
    assert corpus.n_pieces == len(corpus) == 10
    assert corpus.pieces_of("train").tolist() == list(range(7))
    assert corpus.pieces_of("validation").tolist() == [7, 8, 9]
    assert corpus.pieces_of("test").size == 0
    for i in range(corpus.n_pieces):
        piece = corpus.piece(i)
        assert piece.dtype == np.int64
        assert (piece[0], piece[-1]) == (corpus.vocabulary.bos_id, corpus.vocabulary.eos_id)
        np.testing.assert_array_equal(piece[1:-1], tiny_piece(int(corpus.n_notes[i]), i))
        assert corpus.vocabulary.count_notes(piece) == corpus.n_notes[i]
        marks = corpus.piece_labels(i)
        assert len(marks) == len(piece)
        assert (marks[0], marks[-1]) == (0, 0)
        assert marks.any() == labels
    assert corpus.offsets[-1] == len(corpus.tokens)
    same(corpus, Corpus.open(tmp_path / "c"))


def test_the_manifest_tells_what_is_in_the_corpus_and_is_sealed(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c", labels=True)
    pieces = [PieceRecord(tiny_piece(n, n), "test", f"{n}.mid", n, n / 4) for n in (3, 5)]
    corpus = write_corpus(tmp_path / "c", pieces, tiny_vocabulary(), "two", {"asked": 2})
    numbers = {name: corpus.manifest[name] for name in ("name", "pieces", "tokens", "notes", "seconds", "report")}
    assert numbers == {
        "name": "two",
        "pieces": 2,
        "tokens": len(corpus.tokens),
        "notes": 8,
        "seconds": 2.0,
        "report": {"asked": 2},
    }
    assert corpus.pieces_of("test").tolist() == [0, 1]
    # No labels are left of the corpus that lay there before.
    written = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert written == ["index.npz", "manifest.json", "sources.json", "tokenizer.json", "tokens.bin"]
    assert sorted(corpus.manifest["files"]) == ["index.npz", "sources.json", "tokenizer.json", "tokens.bin"]
    text = (tmp_path / "c" / "manifest.json").read_text()
    (tmp_path / "c" / "manifest.json").write_text(text.replace('"notes": 8', '"notes": 9'))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        Corpus.open(tmp_path / "c")
    assert tiny_corpus(tmp_path / "d").manifest["report"] == {}


def test_no_mixture_of_two_corpora_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is stopped while its files take their places leaves a folder without a manifest."""
    tiny_corpus(tmp_path / "c", seed=1)
    replace, done = os.replace, []

    def stop(source: Path, target: Path) -> None:
        if not target.name.startswith("."):
            if done:
                raise KeyboardInterrupt
            done.append(target)
        replace(source, target)

    monkeypatch.setattr("dsmr.console.files.os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny_corpus(tmp_path / "c", seed=2)
    with pytest.raises(UserError, match="is unfinished"):
        Corpus.open(tmp_path / "c")


WHOLE = {
    "offsets": np.array([0, 3, 5]),
    "n_notes": np.array([0, 1]),
    "seconds": np.zeros(2),
    "split": np.array([0, 2], np.uint8),
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"n_notes": np.array([0])}, "2 names of pieces"),
        ({"seconds": np.zeros(3)}, "2 names of pieces"),
        ({"split": np.zeros(1, np.uint8)}, "2 names of pieces"),
        ({"offsets": np.array([0, 5])}, "2 names of pieces"),
        ({"offsets": np.array([0, 3, 4, 5])}, "2 names of pieces"),
        ({"offsets": np.array([1, 3, 5])}, "do not fill the 5 tokens"),
        ({"offsets": np.array([0, 0, 5])}, "do not fill the 5 tokens"),
        ({"offsets": np.array([0, 6, 5])}, "do not fill the 5 tokens"),
        ({"offsets": np.array([0, 3, 4])}, "do not fill the 5 tokens"),
        ({"offsets": np.array([0, 3, 6])}, "do not fill the 5 tokens"),
        ({"offsets": np.array([0, 1, 5])}, None),
        ({"split": np.array([0, 3], np.uint8)}, "a piece of no split"),
        ({"n_notes": np.array([-1, 1])}, "fewer notes than none"),
    ],
)
def test_an_index_that_contradicts_itself_is_known(change: dict[str, np.ndarray], said: str | None) -> None:
    for labels in (None, 5):
        found = store._contradiction({**WHOLE, **change}, ["a", "b"], 5, labels)
        assert (found is None) if said is None else (said in str(found))
    for labels in (0, 4, 6):
        assert f"{labels} labels for 5 tokens" in str(store._contradiction(WHOLE, ["a", "b"], 5, labels))
    nothing = {name: values[: name == "offsets"] for name, values in WHOLE.items()}
    assert store._contradiction(nothing, [], 0, None) is None


def rewritten(folder: Path, **files: bytes) -> None:
    """Put other contents into a corpus, and their sums into its manifest."""
    manifest = read_json(folder / "manifest.json")
    for name, content in files.items():
        name = name.replace("_", ".")
        (folder / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "manifest.json", manifest, sealed=True)


def test_files_that_do_not_belong_together_are_known_whatever_their_sums(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "c")
    tokens = (tmp_path / "c" / "tokens.bin").read_bytes()
    for token, said in ((28, "it holds the token 28, and its tokeniser has 28"), (27, None)):
        rewritten(tmp_path / "c", tokens_bin=tokens[:10] + bytes([token, 0]) + tokens[12:])
        assert Corpus.open(tmp_path / "c", verify=False).tokens[5] == token
        if said is None:
            Corpus.open(tmp_path / "c")
        else:
            with pytest.raises(UserError, match=said):
                Corpus.open(tmp_path / "c")
    rewritten(tmp_path / "c", tokens_bin=tokens, tokenizer_json=json.dumps(tiny_vocabulary(a=1).to_json()).encode())
    with pytest.raises(UserError, match="its tokeniser is another"):
        Corpus.open(tmp_path / "c")
    assert corpus.vocabulary.size == 28


def npz(**more: np.ndarray | bytes) -> bytes:
    """The index of one piece of five tokens, as numpy stores it, or with other members."""
    held: dict[str, np.ndarray | bytes] = {
        "offsets": np.array([0, 5]),
        "n_notes": np.array([1]),
        "seconds": np.zeros(1),
        "split": np.zeros(1, np.uint8),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, value in {**held, **more}.items():
            member = io.BytesIO(value if isinstance(value, bytes) else b"")
            if isinstance(value, np.ndarray):
                np.save(member, value)
            file.writestr(f"{name}.npy", member.getvalue())
    return out.getvalue()


def member(version: tuple[int, int], shape: tuple[int, ...], content: bytes = b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return out.getvalue()[:6] + bytes(version) + out.getvalue()[8:] + content


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, None),
        ({"seconds": member((1, 0), (1,), bytes(8))}, None),
        ({"seconds": member((1, 0), (2,), bytes(8))}, "holds 1 values of seconds, not 2"),
        ({"seconds": member((1, 0), (1,), bytes(16))}, "holds 2 values of seconds, not 1"),
        ({"seconds": member((2, 0), (1,), bytes(8))}, "holds seconds in another form"),
        ({"seconds": member((1, 1), (1,), bytes(8))}, "holds seconds in another form|1, 1"),
        ({"seconds": np.zeros((1, 1))}, r"holds seconds as float64 \(1, 1\)"),
        ({"seconds": np.zeros(1, np.float32)}, r"holds seconds as float32 \(1,\)"),
        ({"seconds": np.zeros(1 << 20)}, "claims 8,388,736 bytes for seconds"),
    ],
)
def test_an_index_is_read_as_it_was_stored_and_in_no_more_memory_than_its_bytes(more: dict, said: str | None) -> None:
    if said is None:
        assert {name: len(values) for name, values in store._read_index(npz(**more)).items()} == {
            "offsets": 2,
            "n_notes": 1,
            "seconds": 1,
            "split": 1,
        }
        return
    with pytest.raises(ValueError, match=said):
        store._read_index(npz(**more))


def test_a_packed_corpus_is_checked_against_its_manifest(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c")
    with zipfile.ZipFile(pack(tmp_path / "c", tmp_path / "c.dsmr")) as file:
        members = {name: file.read(name) for name in file.namelist()}
    members["sources.json"] = members["sources.json"].replace(b"piece 0", b"piece 9")
    with zipfile.ZipFile(tmp_path / "d.dsmr", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(UserError, match=r"the contents of sources\.json were changed"):
        Corpus.open(tmp_path / "d.dsmr")


@pytest.mark.parametrize("labels", [False, True])
def test_a_packed_corpus_is_the_same_corpus(tmp_path: Path, labels: bool) -> None:
    corpus = tiny_corpus(tmp_path / "c", 40, 3, labels=labels)
    packed = pack(tmp_path / "c", tmp_path / "c.dsmr")
    same(corpus, Corpus.open(packed))
    pack(tmp_path / "c", tmp_path / "again.dsmr")
    assert packed.read_bytes() == (tmp_path / "again.dsmr").read_bytes()


def test_a_long_corpus_packs_in_several_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsmr.corpus.pack.CHUNK", 1000)
    corpus = tiny_corpus(tmp_path / "c", 40, 3)
    same(corpus, Corpus.open(pack(tmp_path / "c", tmp_path / "c.dsmr")))


def test_pieces_and_splits_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "c")
    for index in (-1, 10):
        with pytest.raises(IndexError, match=r"\[0, 10\)"):
            corpus.piece(index)
    with pytest.raises(ValueError, match="train, validation, test"):
        corpus.pieces_of("valid")


@pytest.mark.parametrize("name", ["tokens.bin", "labels.bin", "index.npz", "sources.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "absent", "empty"])
def test_a_damaged_file_is_noticed_and_named(tmp_path: Path, name: str, damage: str) -> None:
    tiny_corpus(tmp_path / "c", labels=True)
    path = tmp_path / "c" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: {"cut": -1, "flip": None, "absent": 0, "empty": 0}[damage]])
    if damage == "absent":
        path.unlink()
    with pytest.raises(UserError, match="is damaged") as caught:
        Corpus.open(tmp_path / "c")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_two_corpora_do_not_mix(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "a", seed=1)
    tiny_corpus(tmp_path / "b", seed=2)
    shutil.copy(tmp_path / "a" / "index.npz", tmp_path / "b" / "index.npz")
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(tmp_path / "b")


def test_what_is_no_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no corpus at"):
        Corpus.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"not a prepared corpus: it has no manifest\.json"):
        Corpus.open(tmp_path)
    for content, said in (
        ("{", "not a JSON"),
        ("[]", "another kind"),
        ('{"files": {}, "digest": "", "format": 99}', "99"),
    ):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=said):
            Corpus.open(tmp_path)
    tiny_corpus(tmp_path / "c")
    manifest = read_json(tmp_path / "c" / "manifest.json")
    lacking = {name: value for name, value in manifest.items() if name != "vocabulary"}
    write_json(tmp_path / "c" / "manifest.json", lacking, sealed=True)
    with pytest.raises(UserError, match=r"c/manifest\.json is damaged: it lacks vocabulary"):
        Corpus.open(tmp_path / "c")
    empty = {"bytes": 0, "sha256": ""}
    for files in ({**manifest["files"], "more.bin": empty}, {"tokens.bin": empty}):
        write_json(tmp_path / "c" / "manifest.json", {**manifest, "files": files}, sealed=True)
        with pytest.raises(UserError, match="does not list the files of a corpus"):
            Corpus.open(tmp_path / "c")


def test_a_digest_is_of_the_tokens_and_of_where_pieces_begin(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "c")
    content = corpus.tokens.astype("<u2").tobytes() + corpus.offsets.astype("<i8").tobytes()
    assert corpus.digest == hashlib.sha256(content).hexdigest()


def test_what_was_just_written_is_not_read_through_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Corpus._open_directory
    asked = []
    monkeypatch.setattr(
        Corpus, "_open_directory", lambda where, verify: (asked.append(verify), opened(where, verify))[1]
    )
    tiny_corpus(tmp_path / "c")
    Corpus.open(tmp_path / "c")
    assert asked == [False, True]


def test_an_unfinished_corpus_does_not_open(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open(tmp_path / "c")
    (tmp_path / "d" / ".prepare").mkdir(parents=True)
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open(tmp_path / "d")


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    before = tiny_corpus(tmp_path / "c", seed=1).digest

    def pieces() -> Iterator[PieceRecord]:
        yield PieceRecord(tiny_piece(3, 0), "train", "a", 3, 1.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "c", pieces(), tiny_vocabulary(), "x")
    assert Corpus.open(tmp_path / "c").digest == before
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "new", pieces(), tiny_vocabulary(), "x")
    assert not list((tmp_path / "new").iterdir())


def test_a_full_disk_is_one_sentence_and_the_old_corpus_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dsmr.console.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*/c: no space left on device"):
        tiny_corpus(tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    monkeypatch.undo()
    before = tiny_corpus(tmp_path / "d", seed=1).digest
    monkeypatch.setattr("dsmr.console.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*/d: no space left on device"):
        tiny_corpus(tmp_path / "d", seed=2)
    monkeypatch.undo()
    assert Corpus.open(tmp_path / "d").digest == before


def test_records_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    good = {"tokens": tiny_piece(3, 0), "split": "train", "source": "a.mid", "n_notes": 3, "seconds": 1.0}
    wrong = (
        ({"tokens": np.array([5000])}, "below 28"),
        ({"tokens": np.array([28])}, "below 28"),
        ({"tokens": np.array([3, 28, 3])}, "below 28"),
        ({"tokens": tiny_piece(3, 0)[None]}, "must be one row"),
        ({"split": "dev"}, "'dev'"),
        ({"n_notes": 4}, "3 notes in the tokens, 4 in the record"),
        ({"labels": np.zeros(2, np.uint8)}, "2 labels for 12 tokens"),
    )
    for change, said in wrong:
        with pytest.raises(ValueError, match=said):
            write_corpus(tmp_path / "c", [PieceRecord(**{**good, **change})], tiny_vocabulary(), "x")
    labelled = PieceRecord(**good, labels=np.zeros(12, np.uint8))
    with pytest.raises(ValueError, match="either all pieces carry labels or none"):
        write_corpus(tmp_path / "c", [labelled, PieceRecord(**good)], tiny_vocabulary(), "x")
    with pytest.raises(UserError, match="no piece"):
        write_corpus(tmp_path / "c", [], tiny_vocabulary(), "x")


def test_a_damaged_pack_is_noticed(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c", 30, 3, labels=True)
    content = pack(tmp_path / "c", tmp_path / "c.dsmr").read_bytes()
    path = tmp_path / "bad.dsmr"
    rng = np.random.default_rng(0)
    for length in rng.integers(0, len(content), 10):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"bad\.dsmr"):
            Corpus.open(path)
    noticed = 0
    for place in rng.integers(0, len(content), 60):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:  # a byte of a date or the like may change without harm; music must not
            same(Corpus.open(path), Corpus.open(tmp_path / "c"))
        except UserError:
            noticed += 1
    assert noticed > 40


def test_what_is_no_pack_is_named(tmp_path: Path) -> None:
    text, archive = tmp_path / "a.dsmr", tmp_path / "b.dsmr"
    text.write_text("hello")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(UserError, match="not a packed corpus"):
        Corpus.open(text)
    with pytest.raises(UserError, match="holds no manifest"):
        Corpus.open(archive)
    with pytest.raises(UserError, match="no corpus directory"):
        pack(tmp_path / "absent", tmp_path / "c.dsmr")
    tiny_corpus(tmp_path / "c")
    with pytest.raises(UserError, match="it is a directory"):
        pack(tmp_path / "c", tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        pack(tmp_path / "c", text / "c.dsmr")
    with pytest.raises(UserError, match=r"is the corpus's tokens\.bin itself"):
        pack(tmp_path / "c", tmp_path / "c" / "tokens.bin")
    Corpus.open(tmp_path / "c")


def test_an_archive_that_another_program_damaged_or_locked_is_named(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c")
    with zipfile.ZipFile(tmp_path / "c.dsmr", "w", zipfile.ZIP_DEFLATED) as file:
        file.write(tmp_path / "c" / "manifest.json", "manifest.json")
    content = bytearray((tmp_path / "c.dsmr").read_bytes())
    start = len("manifest.json") + 30  # behind the member's local header
    for name, damaged in {
        "deflated": content[:start] + b"\xff" * 20 + content[start + 20 :],
        "locked": content[:6] + b"\1" + content[7:].replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1"),
    }.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            Corpus.open(tmp_path / name)


def test_a_pack_cannot_swell_beyond_its_manifest(tmp_path: Path) -> None:
    tiny_corpus(tmp_path / "c")
    packed = pack(tmp_path / "c", tmp_path / "c.dsmr")
    with zipfile.ZipFile(packed) as file:
        members = {name: file.read(name) for name in file.namelist()}
    manifest = json.loads(members["manifest.json"])
    manifest["files"]["tokens.bin"]["bytes"] = 10
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(packed, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(UserError, match="damaged"):
        Corpus.open(packed)
