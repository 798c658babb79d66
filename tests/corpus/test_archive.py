"""An archive is read to its last byte or refused: no changed bit, no unsafe size gets through, and nothing is left."""

import bz2
import gzip
import io
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from small_scores import random_score

from dsmr.console.errors import UserError
from dsmr.corpus import archive
from dsmr.corpus.archive import unpack
from dsmr.corpus.maestro import LISTING, WANTED

NEEDED = (WANTED, LISTING, "MAESTRO")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_tar(extra: Any = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        files = {f"m/{i}.mid": bytes(random_score(i, 40).dumps_midi()) for i in range(4)}
        for name, content in {**files, "m/maestro-v3.0.0.csv": b"split,midi_filename\n"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if extra is not None:
            extra(file)
    return buffer.getvalue()


def a_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(4):
            file.writestr(f"m/{i}.mid", bytes(random_score(i, 40).dumps_midi()))
        file.writestr("m/maestro-v3.0.0.csv", "split,midi_filename\n")
    return buffer.getvalue()


COMPRESSED = {
    "gz": lambda: gzip.compress(a_tar(), mtime=0),
    "bz2": lambda: bz2.compress(a_tar()),
    "xz": lambda: lzma.compress(a_tar()),
    "zip": a_zip,
}


@pytest.mark.parametrize("kind", list(COMPRESSED))
def test_no_flipped_bit_changes_what_is_unpacked(tmp_path: Path, kind: str) -> None:
    """In a .tar.gz 283 of 300 flips did, for tarfile does not read on to the sum at the end."""
    whole = COMPRESSED[kind]()
    (tmp_path / "whole").write_bytes(whole)
    unpack(tmp_path / "whole", tmp_path / "right", *NEEDED)
    right = contents(tmp_path / "right")
    assert len(right) == 5
    rng, refused = random.Random(0), 0
    for i in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "bad").write_bytes(data)
        try:
            unpack(tmp_path / "bad", tmp_path / str(i), *NEEDED)
        except UserError:
            refused += 1
        else:  # a date, say, or the name of the folder
            assert sorted(contents(tmp_path / str(i)).values()) == sorted(right.values())
    assert refused > 80


def test_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    for kind, make in COMPRESSED.items():
        whole = make()
        for share in (0.1, 0.5, 0.9, 0.999):
            (tmp_path / kind).write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(UserError, match=kind):
                unpack(tmp_path / kind, tmp_path / "out", *NEEDED)


def zeros(name: bytes, kind: bytes, size: int) -> bytes:
    """A gzip of a tar whose first member claims, and has, `size` zero bytes: made in pieces, a thousandth as long."""
    head = tarfile.TarInfo(name.decode())
    head.size, head.type = size, kind
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        file.write(head.tobuf(tarfile.GNU_FORMAT))
        block = bytes(1 << 24)
        for _ in range(size // len(block)):
            file.write(block)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a header", "a member", "many"])
def test_what_expands_without_bound_is_refused_before_memory_or_disk_is_taken(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2**29
    if kind == "a header":  # GNU's long names: tarfile reads them whole
        data = zeros(b"././@LongLink", tarfile.GNUTYPE_LONGNAME, size)
    elif kind == "a member":
        data = zeros(b"m/a.mid", tarfile.REGTYPE, size)
    else:
        data = zeros(b"m/a.wav", tarfile.REGTYPE, size)
    bomb = tmp_path / "bomb"
    bomb.write_bytes(data)
    assert len(data) < size / 200
    code = (
        "import resource, sys; from pathlib import Path; from dsmr.corpus import archive\n"
        "from dsmr.console.errors import UserError\n"
        "archive.LARGEST, archive.LONGEST_STREAM = 2**28, 2**28\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: archive.unpack(Path({str(bomb)!r}), Path({str(tmp_path / 'out')!r}), ('.mid',), '.*', 'it')\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, grown = ended.stdout.splitlines()
    assert "is refused: " in said
    assert int(grown) < 64 * 1024  # KiB
    assert not (tmp_path / "out").exists()


def test_a_stream_that_asks_for_much_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**26}]
    (tmp_path / "big.tar.xz").write_bytes(lzma.compress(a_tar(), filters=filters))
    unpack(tmp_path / "big.tar.xz", tmp_path / "out", *NEEDED)
    monkeypatch.setattr(archive, "XZ_MEMORY", 2**24)
    with pytest.raises(UserError, match="damaged: Memory usage limit"):
        unpack(tmp_path / "big.tar.xz", tmp_path / "other", *NEEDED)
