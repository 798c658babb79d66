"""Prepare keeps or reports every file and every note, goes on where it was killed, and spoils nothing that is there."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_scores import random_score, score_of, write_folder
from symusic import ControlChange

from dsmr.console.errors import UserError
from dsmr.console.locks import alone_in
from dsmr.corpus import pool, prepare
from dsmr.corpus.prepare import assign_splits, prepare_composed, prepare_maestro, prepare_midi
from dsmr.corpus.report import PrepareReport
from dsmr.corpus.store import Corpus

quietly = {"progress": False, "jobs": 1}


def text_of(report: PrepareReport) -> str:
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table())
    return console.export_text()


def test_a_folder_becomes_a_corpus_with_every_piece_and_note(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 12)
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.n_pieces == report.total.pieces == 12
    assert corpus.n_notes.tolist() == [40] * 12
    assert sorted(corpus.source) == corpus.source
    assert "deeper/piece-00.mid" in corpus.source
    assert report.total.tokens == len(corpus.tokens)
    assert report.total.seconds == pytest.approx(corpus.seconds.sum())
    for split in ("train", "validation", "test"):
        assert report.splits[split].pieces == len(corpus.pieces_of(split))
    assert not report.skipped
    assert not report.dropped
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "index.npz",
        "manifest.json",
        "sources.json",
        "tokenizer.json",
        "tokens.bin",
    ]
    assert PrepareReport.from_json(corpus.manifest["report"]) == report


def test_pedals_that_the_tokeniser_does_not_write_are_told(tmp_path: Path) -> None:
    """With the default none are, in files that are full of them."""
    folder = tmp_path / "midi"
    folder.mkdir()
    for number in range(3):
        score = random_score(seed=number, pedals=False)
        score.tracks[0].controls.extend([ControlChange(10 + 40 * n, 64, 127 * (1 - n % 2)) for n in range(2 * number)])
        score.dump_midi(folder / f"{number}.mid")
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    said = "3 pedals left out: the tokeniser has none (tsd_pedal does)."
    assert said in report.lines()
    assert said in text_of(PrepareReport.from_json(Corpus.open(tmp_path / "c").manifest["report"]))
    assert report.n_pedals == 3
    assert prepare_midi(folder, tmp_path / "d", tokenizer="tsd_pedal", **quietly).n_pedals == 0


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_corpus(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 6)
    prepare_midi(folder, tmp_path / "one", **quietly)
    prepare_midi(folder, tmp_path / "two", jobs=2, progress=False)
    assert Corpus.open(tmp_path / "one").digest == Corpus.open(tmp_path / "two").digest


def test_files_that_cannot_be_used_are_skipped_with_a_reason(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 3)
    (folder / "junk.mid").write_bytes(b"not music")
    score_of([]).dump_midi(str(folder / "silent.mid"))
    score_of([(0.0, 1.0, 5)]).dump_midi(str(folder / "whale.mid"))
    (folder / "readme.txt").write_text("not MIDI at all, and not counted")
    score_of([(0.0, 1.0, 5), (0.0, 1.0, 60), (1.0, 20.0, 61)]).dump_midi(str(folder / "partly.mid"))
    report = prepare_midi(folder, tmp_path / "c", **quietly)
    reasons = dict(report.skipped)
    assert set(reasons) == {"junk.mid", "silent.mid", "whale.mid"}
    assert "not a readable MIDI file" in reasons["junk.mid"]
    assert reasons["silent.mid"] == "no notes"
    assert "pitch outside" in reasons["whale.mid"]
    assert report.dropped["pitch outside 21 to 108"] == 1
    assert report.changed["longer than 10 s (cut to it)"] == 1
    assert report.total.pieces == 4
    table = text_of(report)
    for piece in ("junk.mid", "3 files skipped", "tokens/note", "1 notes left out: pitch outside", "longer than 10 s"):
        assert piece in table
    assert str(tmp_path / "midi") not in "".join(reasons.values())


def test_a_folder_with_nothing_to_prepare_is_one_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no MIDI file"):
        prepare_midi(empty, tmp_path / "c", **quietly)
    with pytest.raises(UserError, match="there is no folder"):
        prepare_midi(tmp_path / "absent", tmp_path / "c", **quietly)
    (empty / "junk.mid").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"none of the 1 files can be used; the first is junk\.mid"):
        prepare_midi(empty, tmp_path / "c", **quietly)
    with pytest.raises(UserError, match="is not a folder"):
        prepare_midi(empty / "junk.mid", tmp_path / "c", **quietly)
    with pytest.raises(UserError, match="unknown tokeniser 'abc'"):
        prepare_midi(empty, tmp_path / "c", tokenizer="abc", progress=False)
    with pytest.raises(UserError, match="jobs must be at least 1"):
        prepare_midi(empty, tmp_path / "c", jobs=0, progress=False)
    assert not (tmp_path / "c").exists()


def test_what_is_in_the_output_is_not_spoiled(tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "midi", 3), tmp_path / "c"
    prepare_midi(folder, out, **quietly)
    digest = Corpus.open(out).digest
    with pytest.raises(UserError, match="another tokeniser"):
        prepare_midi(folder, out, tokenizer="remi", **quietly)
    assert Corpus.open(out).digest == digest
    prepare_midi(folder, out, **quietly)  # the same again is no harm
    assert Corpus.open(out).digest == digest
    prepare_midi(folder, out, tokenizer="remi", overwrite=True, **quietly)
    assert Corpus.open(out).vocabulary.scheme == "REMI"
    with pytest.raises(UserError, match="holds the corpus 'midi', not 'composed"):
        prepare_composed(out, 3, **quietly)
    with pytest.raises(UserError, match="both the data set and the corpus"):  # said before anything is fetched
        prepare_maestro(out, out, download=True, **quietly)
    (tmp_path / "silent").mkdir()
    score_of([]).dump_midi(str(tmp_path / "silent" / "silent.mid"))
    digest = Corpus.open(out).digest
    with pytest.raises(UserError, match="no notes"):  # what is overwritten stays until there is something better
        prepare_midi(tmp_path / "silent", out, overwrite=True, **quietly)
    with pytest.raises(UserError, match="there is no folder or archive"):
        prepare_maestro(tmp_path / "typo.zip", out, overwrite=True, **quietly)
    assert Corpus.open(out).digest == digest
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        prepare_midi(folder, tmp_path / "d", **quietly)
    with pytest.raises(UserError, match="other files"):
        prepare_midi(folder, folder, **quietly)
    with pytest.raises(UserError, match="it is a file"):
        prepare_midi(folder, tmp_path / "d" / "thesis.txt", **quietly)
    assert (tmp_path / "d" / "thesis.txt").read_text() == "do not lose me"


@pytest.mark.parametrize(
    "names", [("config.json", "last.pt", "tokenizer.json"), ("export.json", "tokenizer.json"), ("thesis.txt",)]
)
def test_files_of_no_corpus_are_not_overwritten_even_where_that_is_asked(tmp_path: Path, names: tuple[str]) -> None:
    """A run's or an export's tokenizer.json became the corpus's, and the rest stayed."""
    folder = write_folder(tmp_path / "midi", 1)
    for out in (tmp_path / "fresh", tmp_path / "corpus"):
        if out.name == "corpus":
            prepare_midi(folder, out, **quietly)
        out.mkdir(exist_ok=True)
        for name in names:
            (out / name).write_text("mine")
        with pytest.raises(UserError, match=rf"holds other files \({names[0]}.*\): choose an empty folder"):
            prepare_midi(folder, out, overwrite=True, **quietly)
        assert {(out / name).read_text() for name in names} == {"mine"}


def test_a_tokeniser_that_lies_alone_is_replaced_only_where_that_is_asked(tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "midi", 1), tmp_path / "c"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds a tokenizer\.json, but no corpus"):
        prepare_midi(folder, out, **quietly)
    assert (out / "tokenizer.json").read_text() == "mine"
    prepare_midi(folder, out, overwrite=True, **quietly)
    assert Corpus.open(out).n_pieces == 1


def test_two_prepares_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        alone_in(tmp_path / "out", "another prepare is at work"),
        pytest.raises(UserError, match=rf"another prepare is at work in .* \(process {os.getpid()}\): wait for it"),
    ):
        prepare_composed(tmp_path / "out", pieces=2, minutes=0.1, progress=False)


def test_an_unwritable_output_is_one_sentence(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare_midi(folder, tmp_path / "file" / "c", **quietly)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_prepare_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "midi", 40, n=100)
    prepare_midi(folder, tmp_path / "whole", **quietly)
    out = tmp_path / "c"
    code = (
        "import sys, time; from dsmr.corpus import prepare\n"
        "work = prepare.encode_task\n"
        "prepare.encode_task = lambda task, **more: (time.sleep(0.1), work(task, **more))\n"
        f"prepare.prepare_midi({str(folder)!r}, {str(out)!r}, jobs=1, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while len(list(out.glob(".prepare/results/[0-9a-f]*.npz"))) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="unfinished"):
        Corpus.open(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob(".prepare/results/[0-9a-f]*.npz")}
    assert 5 <= len(kept) < 40
    next(out.glob(".prepare/results/[0-9a-f]*.npz")).write_bytes(b"damaged by the crash")

    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        work = prepare.encode_task
        patch.setattr(prepare, "encode_task", lambda task, **more: (made.append(task.source), work(task, **more)))
        prepare_midi(folder, out, **quietly)
    assert len(made) == 40 - len(kept) + 1
    assert Corpus.open(out).digest == Corpus.open(tmp_path / "whole").digest
    assert not (out / ".prepare").exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_file_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "midi", 3)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_corpus", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_midi(folder, tmp_path / "c", **quietly)
    random_score(99, 7).dump_midi(str(folder / "piece-01.midi"))
    prepare_midi(folder, tmp_path / "c", **quietly)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.n_notes[corpus.source.index("piece-01.midi")] == 7


def work_or_die(task: int, *, folder: str) -> None:
    if task in (3, 8):
        os._exit(1)
    (Path(folder) / str(task)).touch()


@pytest.mark.slow
def test_a_task_that_kills_its_process_is_found_and_the_others_are_done(tmp_path: Path) -> None:
    crashed: list[int] = []
    steps: list[int] = []
    work = partial(work_or_die, folder=str(tmp_path))
    pool.run_all(work, list(range(10)), 2, lambda: steps.append(1), crashed.append)
    assert sorted(crashed) == [3, 8]
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [0, 1, 2, 4, 5, 6, 7, 9]
    assert len(steps) == 10


def test_splits_follow_from_names_and_none_that_matters_is_empty() -> None:
    fractions = (0.9, 0.05, 0.05)
    names = [(f"piece {i}", None) for i in range(2000)]
    splits = dict(zip([name for name, _ in names], assign_splits(names, fractions), strict=True))
    counts = [list(splits.values()).count(split) for split in ("train", "validation", "test")]
    assert counts[0] == pytest.approx(1800, abs=60)
    assert counts[1] == pytest.approx(100, abs=40)
    some = names[::3]
    assert assign_splits(some, fractions) == [splits[name] for name, _ in some]
    for start in range(100):
        for count in (1, 2, 3, 5):
            found = assign_splits(names[start : start + count], fractions)
            assert "train" in found
            assert count < 2 or "validation" in found
    assert assign_splits([("a", "test"), ("b", "train")], fractions) == ["test", "train"]
    with pytest.raises(UserError, match="add up to 1"):
        assign_splits(names, (0.9, 0.2, 0.1))


def test_composed_pieces_carry_labels_for_every_token(tmp_path: Path) -> None:
    from dsmr.composer.compose import compose

    report = prepare_composed(tmp_path / "c", pieces=3, seed=5, minutes=1.0, **quietly)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.split.tolist() == ["train", "validation", "test"]
    assert corpus.labels is not None
    assert not report.dropped
    for i in range(3):
        piece, marks = corpus.piece(i), corpus.piece_labels(i)
        composed = compose(5_000_000 + i, minutes=1.0)
        is_note = corpus.vocabulary.is_note[piece]
        expected = composed.labels_for(composed.notes["onset"])
        np.testing.assert_array_equal(np.bincount(marks[is_note]), np.bincount(expected))
        assert set(marks.tolist()) == {0, 1, 2}
    prepare_composed(tmp_path / "d", pieces=3, seed=5, minutes=1.0, progress=False, jobs=2)
    assert Corpus.open(tmp_path / "d").digest == corpus.digest
    for pieces, seed in ((0, 0), (3, -1)):
        with pytest.raises(UserError, match="must"):
            prepare_composed(tmp_path / "e", pieces=pieces, seed=seed, **quietly)


def test_the_progress_bar_tells_the_time_to_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_midi(write_folder(tmp_path / "midi", 2), tmp_path / "c", jobs=1)
    said = capsys.readouterr()
    assert said.out == ""
    assert "2/2" in said.err
    shutil.rmtree(tmp_path / "c")


def test_without_semaphores_one_process_does_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container without /dev/shm has none."""

    def none(*arguments: object, **options: object) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("dsmr.corpus.pool.ProcessPoolExecutor", none)
    report = prepare_composed(tmp_path / "out", pieces=4, minutes=1.0, jobs=2, progress=False)
    assert sum(counts.pieces for counts in report.splits.values()) == 4
