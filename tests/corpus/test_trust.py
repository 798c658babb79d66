"""One bad file is that file's loss and no other's; every name, link and copy is dealt with, and the numbers add up."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_midi import melody, midi, off, on, track
from rich.console import Console
from small_scores import random_score, score_of, write_folder
from tiny_corpus import tiny_corpus

from dsmr.console.errors import UserError
from dsmr.corpus import prepare
from dsmr.corpus.copies import fingerprint, groups_of
from dsmr.corpus.pack import pack
from dsmr.corpus.prepare import prepare_midi
from dsmr.corpus.report import PrepareReport
from dsmr.corpus.splits import assign_splits
from dsmr.corpus.store import Corpus
from dsmr.music.tokenizer import build_tokenizer, encode_score, vocabulary_of

quietly = {"progress": False, "jobs": 1}


def text_of(report: PrepareReport) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


def test_the_numbers_of_the_report_add_up_and_it_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 3)
    report = prepare_midi(folder, tmp_path / "clean", **quietly)
    assert report.n_begun == report.total.notes == 120
    assert (
        "120 notes begin in these pieces, counted in the bytes of their files: all of them are in the corpus."
        in text_of(report)
    )
    open_ended = [*melody(60, 62), (0, on(64)), (0, on(10)), (0, on(36, channel=9)), (480, off(10)), (0, off(36, 9))]
    (folder / "open.mid").write_bytes(midi(track(*open_ended, (0, b"\xff\x2f\0"), *melody(70))))
    (folder / "low.mid").write_bytes(midi(track(*melody(1, 2, 3))))
    (folder / "junk.mid").write_bytes(b"junk")
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    assert report.dropped == {"pitch outside 21 to 108": 1, "on a drum track": 1, "behind the end of their track": 1}
    assert (report.n_begun, report.total.notes, report.n_skipped) == (126, 123, 3)
    assert report.n_begun == report.total.notes + sum(report.dropped.values())
    said = text_of(report)
    for line in (
        "126 notes begin in these pieces, counted in the bytes of their files: 123 are in the corpus, 3 are left out.",
        "1 notes changed: without an end (ended by the next of their pitch, or with the piece).",
        "3 notes begin in the skipped files, as far as these can be read.",
    ):
        assert line in said
    assert PrepareReport.from_json(Corpus.open(tmp_path / "c").manifest["report"]) == report
    report.n_begun += 1
    with pytest.raises(AssertionError, match="127 notes begun, 123 kept, 3 left out"):
        report.check()


@pytest.mark.parametrize("tokenizer", ["tsd", "remi"])
def test_music_before_its_beginning_or_hours_late_is_one_files_skip(tmp_path: Path, tokenizer: str) -> None:
    """Ticks beyond 2^31 wrap in the reader: with remi the negative ones ended the prepare at every retry."""
    folder = write_folder(tmp_path / "midi", 2)
    for name, gaps in (("negative", 9), ("late", 17)):
        far = [(2**28 - 1, b"\xff\x01\0")] * gaps
        (folder / f"{name}.mid").write_bytes(midi(track(*melody(60), *far, *melody(62, 64))))
    report = prepare_midi(folder, tmp_path / "c", tokenizer=tokenizer, **quietly)
    assert [source for source, _ in report.skipped] == ["late.mid", "negative.mid"]
    assert all("it is too long" in f"it is {reason}" for _, reason in report.skipped)
    assert report.total.pieces == 2


@pytest.mark.parametrize(
    "error", [KeyError("Bar_-3"), MemoryError(), RuntimeError("no"), AssertionError(), OSError(5, "x")]
)
def test_whatever_goes_wrong_in_one_file_is_that_files_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    work = prepare.encode_score

    def fails(source: Any, tokenizer: Any) -> Any:
        if "piece-01" in str(source):
            raise error
        return work(source, tokenizer)

    monkeypatch.setattr(prepare, "encode_score", fails)
    report = prepare_midi(write_folder(tmp_path / "midi", 3), tmp_path / "c", **quietly)
    ((source, reason),) = report.skipped
    assert source == "piece-01.midi"
    assert reason
    assert (report.total.pieces, report.n_skipped) == (2, 40)


@pytest.mark.slow
def test_a_file_of_a_million_notes_takes_little_memory_and_ends_nothing(tmp_path: Path) -> None:
    """3 MB of strikes in running status took 785 MB, and where they were not to be had the prepare ended."""
    folder = write_folder(tmp_path / "midi", 2)
    strikes = b"".join(bytes([1, 40 + i % 40, 64]) for i in range(1_000_000))
    (folder / "black.mid").write_bytes(midi(track((0, on(60)), (1, strikes[1:]))))
    code = (
        "import resource; from dsmr.corpus.prepare import prepare_midi\n"
        "from dsmr.music.tokenizer import vocabulary_of; vocabulary_of('tsd')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"report = prepare_midi({str(folder)!r}, {str(tmp_path / 'c')!r}, jobs=1, progress=False)\n"
        "print(report.skipped, report.total.pieces)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, grown = ended.stdout.splitlines()
    assert "black.mid" in said
    assert "it holds 1,000,001 notes, more than 250,000" in said
    assert said.endswith(" 2")
    assert int(grown) < 200 * 1024  # KiB


# Names and links.


@pytest.mark.soak
@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are Unicode")
@pytest.mark.parametrize("language", ["C", "C.UTF-8"])
def test_any_name_that_the_file_system_allows_is_prepared_and_printed(tmp_path: Path, language: str) -> None:
    folder = os.fsencode(tmp_path) + b"/m\xfcsik"
    os.mkdir(folder)
    names = [
        b"caf\xe9.mid",
        b"caf\xea.mid",
        b"[bold]x[b] :cat:.mid",
        b"a\nb.mid",
        b"\x1b[31mred.mid",
        "日本.mid".encode(),
    ]
    for i, name in enumerate(names):
        with open(folder + b"/" + name, "wb") as file:
            file.write(random_score(i, 30).dumps_midi())
        with open(folder + b"/no-" + name, "wb") as file:
            file.write(b"junk")
    out = os.fsencode(tmp_path) + b"/c\xff"
    environment = {**os.environ, "LC_ALL": language, "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "dsmr", "prepare", "midi", folder, "--out", out]
    ended = subprocess.run(line, capture_output=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.decode()
    assert "Traceback" not in ended.stderr.decode()
    for name in (r"no-caf\xe9.mid", r"no-[bold]x[b] :cat:.mid", r"no-a\nb.mid", r"no-\x1b[31mred.mid", r"c\xff"):
        assert name in said
    assert "\x1b" not in said
    corpus = Corpus.open(os.fsdecode(out))
    assert corpus.n_pieces == 6
    assert {r"caf\xe9.mid", r"caf\xea.mid", "a\nb.mid", "日本.mid"} < set(corpus.source)
    assert corpus.name == r"m\xfcsik"


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "around" / "midi", 4)
    write_folder(tmp_path / "elsewhere", 2)
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "deeper")
    (folder / "up").symlink_to(folder.parent)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone.mid").symlink_to(tmp_path / "nowhere.mid")
    (folder / "folder.mid").mkdir()
    os.mkfifo(folder / "pipe.mid")
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    sources = Corpus.open(tmp_path / "c").source
    assert sources == sorted([
        *(path.relative_to(folder).as_posix() for path in folder.rglob("piece*")),
        "linked/deeper/piece-00.mid",
        "linked/piece-01.midi",
    ])  # fmt: skip
    assert report.skipped == [
        ("gone.mid", "it is a link to nothing"),
        ("pipe.mid", "it is not a file"),
        ("up", "it is a link to a folder that holds this one"),
    ]


def test_what_our_programs_left_unfinished_is_no_piece(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 2)
    whole = (folder / "piece-01.midi").read_bytes()
    (folder / ".continued-ab12_x9z.mid").write_bytes(whole)
    (folder / "other-corpus" / ".prepare" / "unpacked").mkdir(parents=True)
    (folder / "other-corpus" / ".prepare" / "unpacked" / "a.mid").write_bytes(whole)
    code = (
        "import os, sys; from pathlib import Path; from dsmr.console.files import atomic_path\n"
        f"with atomic_path({str(folder / 'continued.mid')!r}) as path: path.write_bytes(b'half'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert len(list(folder.glob(".continued-*"))) == 2
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    assert report.total.pieces == 2
    assert [reason for _, reason in report.skipped] == ["it is what a program was writing when it was killed"] * 2


# Copies.


def test_copies_lie_in_one_split_and_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    folder.mkdir()
    for i in range(12):
        data = bytes(random_score(i, 60).dumps_midi())
        for name in (f"piece {i}.mid", f"piece {i} (1).mid", f"copy of piece {i}.mid"):
            (folder / name).write_bytes(data)
    report = prepare_midi(folder, tmp_path / "c", fractions=(0.5, 0.25, 0.25), **quietly)
    corpus = Corpus.open(tmp_path / "c")
    split = dict(zip(corpus.source, corpus.split.tolist(), strict=True))
    alone = dict(zip([f"piece {i}.mid" for i in range(12)], assign_splits(
        [(f"piece {i}.mid", None) for i in range(12)], (0.5, 0.25, 0.25)), strict=True))  # fmt: skip
    assert set(alone.values()) == {"train", "validation", "test"}
    for i in range(12):
        found = {split[name] for name in split if name in (f"piece {i} (1).mid", f"copy of piece {i}.mid")}
        assert found == {alone[f"piece {i}.mid"]} == {split[f"piece {i}.mid"]}
    assert report.n_copies == 24
    assert "24 pieces play the notes of another one (copies, performances): each lies in its split." in text_of(report)


def test_near_copies_are_known_and_other_pieces_are_not() -> None:
    tokenizer, words = build_tokenizer(), vocabulary_of()

    def known_by(notes: list[tuple[float, float, int]]) -> Any:
        return fingerprint(encode_score(score_of(notes), tokenizer)[0], words)

    rng = np.random.default_rng(3)
    pieces = []
    for _ in range(40):
        onsets = np.cumsum(rng.choice([0.0, 0.12, 0.25, 0.5], 300))
        pieces.append(
            [(float(at), 0.3, int(pitch)) for at, pitch in zip(onsets, rng.integers(40, 90, 300), strict=True)]
        )
    first = pieces[0]
    changed = {
        "slower": [(at * 1.1, long, pitch) for at, long, pitch in first],
        "higher": [(at, long, pitch + 3) for at, long, pitch in first],
        "shorter notes": [(at, long / 2, pitch) for at, long, pitch in first],
        "another performance": [(max(0, at + rng.uniform(-0.008, 0.008)), long, pitch) for at, long, pitch in first],
        "a tenth cut off": first[:270],
        "wrong notes": [(at, long, pitch + (i % 60 == 0)) for i, (at, long, pitch) in enumerate(first)],
        "later": [(at + 5, long, pitch) for at, long, pitch in first],
    }
    prints = [known_by(notes) for notes in [*pieces, *changed.values()]]
    assert groups_of(prints) == [*range(40), *[0] * len(changed)]
    short = [known_by([(0.0, 1.0, pitch)]) for pitch in (60, 61, 60)]
    assert groups_of(short) == [0, 1, 0]


def test_copies_of_one_piece_alone_are_not_spread_over_splits(tmp_path: Path) -> None:
    folder = tmp_path / "midi"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.mid").write_bytes(bytes(random_score(0, 40).dumps_midi()))
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    assert {split: counts.pieces for split, counts in report.splits.items() if counts.pieces} == {"train": 5}
    assert "All pieces are in the split 'train': all pieces are copies of one." in report.remarks


def test_copies_that_a_list_puts_apart_are_told(tmp_path: Path) -> None:
    report = PrepareReport("x", "o", "t", {})
    report.count_copies([0, 1, 0, 3], ["train", "train", "test", "validation"])
    assert (report.n_copies, report.n_apart) == (1, 1)
    assert (
        "1 pieces play the notes of another one (copies, performances): of 1 some lie in another split."
        in report.lines()
    )


def test_an_empty_folder_says_what_it_passed_over(tmp_path: Path) -> None:
    (tmp_path / "midi").mkdir()
    (tmp_path / "midi" / "gone.mid").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no MIDI file .*gone\.mid: it is a link to nothing"):
        prepare_midi(tmp_path / "midi", tmp_path / "c", **quietly)


def test_only_a_packed_corpus_is_replaced_by_one(tmp_path: Path) -> None:
    """The order of the arguments, or a glob, once cost a MIDI file."""
    corpus = tiny_corpus(tmp_path / "c")
    song = write_folder(tmp_path / "midi", 1).joinpath("song.mid")
    song.write_bytes(midi(track(*melody(60))))
    with pytest.raises(UserError, match=r"song\.mid is there already and is not a packed corpus"):
        pack(corpus.path, song)
    assert song.read_bytes() == midi(track(*melody(60)))
    packed = pack(corpus.path, tmp_path / "c.dsmr")
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    assert pack(corpus.path, packed).read_bytes() == whole
