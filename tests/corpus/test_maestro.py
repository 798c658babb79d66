"""MAESTRO is read from folders and archives with its own split, fetched through broken connections, never unsafely."""

import csv
import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_scores import random_score

from dsmr.console.errors import UserError
from dsmr.corpus import archive as archive_room
from dsmr.corpus import download, maestro
from dsmr.corpus.prepare import prepare_maestro
from dsmr.corpus.store import Corpus
from dsmr.music.midi_file import NO_END
from dsmr.music.tokenizer import build_tokenizer, encode_score, load_midi

quietly = {"progress": False, "jobs": 1}
SPLITS = {"2004/a.midi": "train", "2004/b.midi": "validation", "2018/c.midi": "test", "2018/d.midi": "train"}
real = pytest.mark.skipif("DSMR_MAESTRO_DIR" not in os.environ, reason="DSMR_MAESTRO_DIR names no copy of MAESTRO")


def make(root: Path, listing: str = "csv") -> Path:
    """A data set laid out as MAESTRO is, of random notes."""
    for i, name in enumerate(SPLITS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_score(i, 30).dump_midi(str(root / name))
    if listing == "csv":
        rows = [f'Someone,"A, B",{split},2004,{name},x.wav,1.0' for name, split in SPLITS.items()]
        heading = "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration"
        (root / "maestro-v3.0.0.csv").write_text("\n".join([heading, *rows]))
    else:
        columns = {"midi_filename": dict(enumerate(SPLITS)), "split": dict(enumerate(SPLITS.values()))}
        (root / "maestro-v3.0.0.json").write_text(json.dumps(columns))
    return root


def zipped(root: Path, archive: Path, prefix: str = "maestro-v3.0.0") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(root.rglob("*")):
            file.write(path, f"{prefix}/{path.relative_to(root).as_posix()}")
    return archive


def tarred(root: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:xz" if archive.suffix == ".xz" else "w:gz") as file:
        file.add(root, "maestro")
    return archive


@pytest.mark.parametrize("kind", ["folder", "folder around it", "json", "zip", "tar.xz", "tar.gz"])
def test_every_form_gives_the_same_corpus_with_the_official_split(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path / "around" / "maestro-v3.0.0", "json" if kind == "json" else "csv")
    source = {
        "folder": lambda: root,
        "json": lambda: root,
        "folder around it": lambda: root.parent,
        "zip": lambda: zipped(root, tmp_path / "m.zip"),
        "tar.xz": lambda: tarred(root, tmp_path / "m.tar.xz"),
        "tar.gz": lambda: tarred(root, tmp_path / "m.tar.gz"),
    }[kind]()
    report = prepare_maestro(source, tmp_path / "c", **quietly)
    corpus = Corpus.open(tmp_path / "c")
    assert dict(zip(corpus.source, corpus.split.tolist(), strict=True)) == SPLITS
    assert report.total.notes == 4 * 30
    assert "not the whole of MAESTRO" in report.remarks[0]
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]


def test_an_archive_is_held_against_the_published_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "m")
    archive = zipped(root, tmp_path / "m.zip")
    assert prepare_maestro(archive, tmp_path / "c", **quietly).remarks[1:] == [
        "The archive is not byte for byte the published one."
    ]
    monkeypatch.setattr(maestro, "OFFICIAL_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert maestro.provenance(archive) == ["The archive is byte for byte the published one (SHA-256)."]
    assert maestro.provenance(root) == []
    with tarfile.open(tmp_path / "m.tar", "w") as file:
        file.add(root, "maestro")
    assert "damage in it would not be seen" in maestro.provenance(tmp_path / "m.tar")[0]


def test_files_that_the_listing_names_but_are_not_there_are_reported(tmp_path: Path) -> None:
    root = make(tmp_path / "m")
    (root / "2004/a.midi").unlink()
    report = prepare_maestro(root, tmp_path / "c", **quietly)
    assert report.skipped == [("2004/a.midi", "named in maestro-v3.0.0.csv but not there")]
    assert report.total.pieces == 3


def test_the_published_counts_are_recognised_and_differences_told() -> None:
    entries = tuple(maestro.Entry(f"{i}.midi", "train") for i in range(1276))
    listing = maestro.Listing("maestro-v3.0.0.csv", entries)
    from dsmr.corpus.report import PrepareReport, SplitCounts

    splits = {split: SplitCounts(pieces, notes) for split, (pieces, notes) in maestro.PUBLISHED.items()}
    report = PrepareReport("MAESTRO", "out", "TSD", splits)
    assert "exactly those of the published" in maestro.compare(listing, report)[0]
    report.changed[NO_END] = 1
    splits["test"].notes += 1
    assert "exactly those of the published data set, but for 1 that never end" in maestro.compare(listing, report)[0]
    report.changed.clear()
    splits["test"].notes -= 2
    (said,) = maestro.compare(listing, report)
    assert said.startswith("test: 177 pieces and 741,409 notes, published are 177 and 741,410")


def test_what_is_not_maestro_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("holiday/photo.jpg", b"")
    text = tmp_path / "text.zip"
    text.write_text("not an archive")
    cut = tmp_path / "cut.tar.xz"
    content = tarred(make(tmp_path / "m"), tmp_path / "m.tar.xz").read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    listed = make(tmp_path / "l")
    for source, said in (
        (tmp_path / "absent", "there is no folder or archive"),
        (tmp_path / "empty", "is not MAESTRO"),
        (other, r"other\.zip is not MAESTRO: it holds no maestro-v3\.0\.0\.csv"),
        (text, "neither a folder nor a zip or tar archive"),
        (cut, "damaged|neither"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            prepare_maestro(source, tmp_path / "c", **quietly)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "c").exists()
    for content_, said in (("a,b\n1,2\n", "not a listing"), ("split,midi_filename\n", "names no performance")):
        (listed / "maestro-v3.0.0.csv").write_text(content_)
        with pytest.raises(UserError, match=said):
            prepare_maestro(listed, tmp_path / "c", **quietly)
    (listed / "maestro-v3.0.0.csv").write_text("split,midi_filename\ndev,2004/a.midi\n")
    with pytest.raises(UserError, match="split 'dev'"):
        prepare_maestro(listed, tmp_path / "c", **quietly)
    with pytest.raises(UserError, match="name the folder"):
        prepare_maestro(None, tmp_path / "c", **quietly)


def test_a_damaged_zip_is_one_sentence(tmp_path: Path) -> None:
    archive = zipped(make(tmp_path / "m"), tmp_path / "m.zip")
    content = bytearray(archive.read_bytes())
    content[60:90] = bytes(30)
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.zip is damaged"):
        prepare_maestro(archive, tmp_path / "c", **quietly)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["/etc/evil.mid", "../evil.mid", "a/../../evil.mid", "C:/evil.mid", "a\\..\\evil.mid"])
@pytest.mark.parametrize("kind", ["zip", "tar", "listing"])
def test_unsafe_paths_are_refused_and_nothing_is_written(tmp_path: Path, name: str, kind: str) -> None:
    root = make(tmp_path / "in" / "m")
    source = tmp_path / f"m.{kind}"
    if kind == "zip":
        zipped(root, source)
        with zipfile.ZipFile(source, "a") as file:
            file.writestr(name, b"evil")
    elif kind == "tar":
        with tarfile.open(source, "w") as file:
            file.add(root, "maestro")
            member = tarfile.TarInfo(name)
            member.size = 4
            file.addfile(member, io.BytesIO(b"evil"))
    else:
        source = root
        with open(root / "maestro-v3.0.0.csv", "a") as listing:
            listing.write(f"\nSomeone,X,train,2004,{name},x.wav,1.0")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="refused: it names the unsafe path"):
        prepare_maestro(source, tmp_path / "c", **quietly)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, "zip"])
def test_links_and_devices_are_refused(tmp_path: Path, kind: Any) -> None:
    root = make(tmp_path / "m")
    source = tmp_path / "m.archive"
    if kind == "zip":
        zipped(root, source)
        with zipfile.ZipFile(source, "a") as file:
            info = zipfile.ZipInfo("maestro-v3.0.0/link.mid")
            info.external_attr = 0o120777 << 16
            file.writestr(info, "/etc/passwd")
    else:
        with tarfile.open(source, "w") as file:
            file.add(root, "maestro")
            member = tarfile.TarInfo("maestro/link.mid")
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    with pytest.raises(UserError, match="is a link or a device"):
        prepare_maestro(source, tmp_path / "c", **quietly)
    assert not (tmp_path / "c").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(make(tmp_path / "m"), tmp_path / "m.zip")
    monkeypatch.setattr(archive_room, "LARGEST", 1000)
    with pytest.raises(UserError, match="refused: it unpacks to more than"):
        prepare_maestro(archive, tmp_path / "c", **quietly)


# Downloading.


class Server(ThreadingHTTPServer):
    """Serves one file; `breaks` connections end after a third of what was asked for."""

    content = b""
    breaks = 0
    ranges = True
    status = 0
    asked: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.server.status:
            self.send_error(self.server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        content = self.server.content
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        rest = content[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            self.wfile.write(rest[: len(rest) // 3])
            self.close_connection = True
            return
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.001)
    made = Server(("127.0.0.1", 0), Handler)
    made.content = zipped(make(tmp_path / "served"), tmp_path / "served.zip").read_bytes()
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def get(server: Server, out: Path, content: bytes | None = None) -> Path:
    digest = hashlib.sha256(server.content if content is None else content).hexdigest()
    return maestro.download(out, f"http://127.0.0.1:{server.server_address[1]}/m.zip", digest, progress=False)


def test_a_broken_download_goes_on_at_the_byte_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    path = get(server, tmp_path / "m.zip")
    assert path.read_bytes() == server.content
    third = len(server.content) // 3
    assert server.asked[:2] == [None, f"bytes={third}-"]
    assert len(server.asked) == 4
    assert not (tmp_path / "m.zip.part").exists()
    get(server, tmp_path / "m.zip")
    assert len(server.asked) == 4  # what is there and right is not fetched again


def test_a_later_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m.zip.part").write_bytes(server.content[:1000])
    assert get(server, tmp_path / "m.zip").read_bytes() == server.content
    assert server.asked == ["bytes=1000-"]
    (tmp_path / "n.zip.part").write_bytes(server.content)
    assert get(server, tmp_path / "n.zip").read_bytes() == server.content


def test_a_server_that_cannot_resume_starts_again(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, 1
    assert get(server, tmp_path / "m.zip").read_bytes() == server.content


def test_a_wrong_checksum_is_told_and_the_part_removed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not what it should be: its SHA-256 is"):
        get(server, tmp_path / "m.zip", b"something else")
    (tmp_path / "m.zip.part").write_bytes(b"x" * (len(server.content) + 5))
    with pytest.raises(UserError, match="SHA-256"):
        get(server, tmp_path / "m.zip")
    assert not list(tmp_path.glob("m.zip*"))


def test_another_file_of_that_name_is_not_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "m.zip").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"m\.zip is not the file at http.*move it"):
        get(server, tmp_path / "m.zip")
    assert (tmp_path / "m.zip").read_bytes() == b"mine"
    assert server.asked == []


def test_what_the_server_refuses_is_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.status = 404
    with pytest.raises(UserError, match="the server answers 404"):
        get(server, tmp_path / "m.zip")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(UserError, match=r"503.*next try goes on"):
        get(server, tmp_path / "m.zip")
    with pytest.raises(UserError, match=r"cannot fetch http://127\.0\.0\.1:1/"):
        maestro.download(tmp_path / "m.zip", "http://127.0.0.1:1/x.zip", "", progress=False)
    with pytest.raises(UserError, match="cannot fetch nonsense"):
        maestro.download(tmp_path / "m.zip", "nonsense", "", progress=False)


def test_prepare_fetches_beside_the_corpus(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch = maestro.download
    url, digest = f"http://127.0.0.1:{server.server_address[1]}/m.zip", hashlib.sha256(server.content).hexdigest()
    monkeypatch.setattr(maestro, "download", lambda out, progress: fetch(out, url, digest, progress))
    server.breaks = 1
    prepare_maestro(None, tmp_path / "data" / "c", download=True, **quietly)
    assert Corpus.open(tmp_path / "data" / "c").n_pieces == 4
    assert (tmp_path / "data" / maestro.ARCHIVE_NAME).exists()


def test_the_download_shows_its_progress(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(server.content).hexdigest()
    maestro.download(tmp_path / "m.zip", f"http://127.0.0.1:{server.server_address[1]}/", digest)
    assert "fetching m.zip" in capsys.readouterr().err


# The data set itself.


@real
@pytest.mark.maestro
def test_notes_of_maestro_are_counted_and_kept() -> None:
    root = Path(os.environ["DSMR_MAESTRO_DIR"])
    listing = maestro.read_listing(root)
    assert len(listing.entries) == 1276
    stats = {}
    if (root / "per_file_stats.csv").is_file():
        with open(root / "per_file_stats.csv", newline="") as file:
            stats = {row["midi_filename"]: int(row["notes"]) for row in csv.DictReader(file)}
    tokenizer = build_tokenizer()
    for entry in listing.entries[::60]:
        score = load_midi(root / entry.filename)
        _, report = encode_score(score, tokenizer)
        assert not report.dropped
        assert report.n_notes == sum(len(track.notes) for track in score.tracks)
        assert report.n_notes == stats.get(entry.filename, report.n_notes)


@real
@pytest.mark.maestro
@pytest.mark.slow
def test_the_whole_of_maestro_has_its_published_counts(tmp_path: Path) -> None:
    """Slow: it tokenises seven million notes."""
    report = prepare_maestro(os.environ["DSMR_MAESTRO_DIR"], tmp_path / "c", progress=False)
    found = {s: (c.pieces, c.notes) for s, c in report.splits.items()}
    # One note of 2009/…03_R1_2009_08_WAV.midi never ends: the published count, and symusic, leave it out.
    assert found == {**maestro.PUBLISHED, "train": (962, 5_659_329)}
    assert report.n_begun == 7_040_164
    assert report.changed[NO_END] == 1
    assert "exactly those of the published data set, but for 1 that never end" in report.remarks[0]
    assert not report.skipped
    assert not report.dropped
