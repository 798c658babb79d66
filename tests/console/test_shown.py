"""What the user named is shown as it is: no markup, no escape sequence, nothing that the terminal would obey."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text
from warm_start import WarmStart

from dsmr.console.errors import UserError
from dsmr.console.files import atomic_path, check_apart, is_temporary, read_json, write_json, write_text
from dsmr.console.progress import ProgressLine
from dsmr.console.screen import Screen
from dsmr.console.shown import shown
from dsmr.corpus.pool import progress_bar

EVIL = "[bold]a[/x] :cat: \x1b]0;owned\x1b[31mred\udcff\u202egnp.mid"
SAFE = r"[bold]a[/x] :cat: \x1b]0;owned\x1b[31mred\xff\u202egnp.mid"


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert shown(EVIL) == SAFE
    assert shown("naïve 日本 🎹 é.mid") == "naïve 日本 🎹 é.mid"
    assert shown("a\r\nb\x9b") == r"a\r\nb\x9b"
    assert shown(Path("x/y")) == "x/y"


def test_a_sentence_for_the_user_stays_one_line_whatever_it_quotes() -> None:
    assert str(UserError(f"there is no {EVIL}\n")) == rf"there is no {SAFE}\n"


def test_the_screen_shows_user_text_as_it_is() -> None:
    file = io.StringIO()
    screen = Screen(file=file, width=200)
    screen.print(EVIL)
    screen.print(f"two\nlines {EVIL}", soft_wrap=True)
    assert file.getvalue().count(SAFE) == 2
    table = Table(title=EVIL, caption=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    screen.print(table)
    assert file.getvalue().count("[bold]a[/x] :cat:") == 7
    assert not {"\x1b", "\x07", "\udcff", "\u202e"} & set(file.getvalue())


def test_progress_shows_user_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine() as line:
        line.update(EVIL)
        line.say(EVIL)
    with progress_bar("[/x] [red]", 1) as advance:
        advance()
    said = capsys.readouterr().err
    assert said.count(SAFE) == 2
    assert "[/x] [red]" in said


def test_nothing_is_cut_on_a_narrow_terminal() -> None:
    file = io.StringIO()
    table = Table("schedule", "loss", "bytes")
    table.add_row("two_scale", "27.4123456", "1,234,567,890")
    Screen(file=file, width=20).print(table)
    assert "…" not in file.getvalue()
    columns = zip(*(line.split("│")[1:4] for line in file.getvalue().splitlines() if line.startswith("│")), strict=True)
    assert ["".join(map(str.strip, column)) for column in columns] == ["two_scale", "27.4123456", "1,234,567,890"]


def test_a_progress_line_goes_on_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    with ProgressLine(Screen(file=file, width=20)) as line:
        line.update("step 1,234/10,000 · 1:02:03 left · loss 27.412 nats a token")
        assert line._live is not None
        line._live.refresh()
    said = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", " ", file.getvalue()).split())
    assert "step 1,234/10,000 · 1:02:03 left · loss 27.412 nats a token" in said
    assert "…" not in said


@pytest.mark.soak
def test_no_command_obeys_what_a_path_says(tmp_path: Path, warm_start: WarmStart) -> None:
    """Brackets were eaten, or ended in a traceback; escape sequences reached the terminal."""
    name = b"[/x] \x1b[31m\xff"
    place = os.fsencode(tmp_path) + b"/" + name
    for line in (
        ["prepare", "midi", place, "--jobs", "1", "--out", place],
        ["prepare", "composed", "--pieces", "3", "--jobs", "1", "--out", place],
        ["pack", place, place + b".dsmr"],
        ["train", "--data", place + b"?", "--out", place, "--schedule", "[/x]\x1b[31m"],
        ["eval", place],
        ["generate", place, "--prompt", place],
        ["[/x]\x1b[31m"],
        ["budget", "--schedule", "[/x]\x1b[31m"],
        ["budget", "--schedule", "uniform(layers=1, horizon=8)", "--heads", "[/x]\x1b[31m"],
        ["prepare", "midi", place, "--[/x]\x1b[31m"],
    ):
        ended = warm_start.run(line)
        said = ended.stdout + ended.stderr
        assert "Traceback" not in said
        assert "\x1b[31m" not in said
        assert "[/x]" in said or "valid integer" in said


# Files of ours.


def test_text_that_is_not_unicode_comes_back_from_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"path": "caf\udce9", "name": "日本"})
    assert read_json(tmp_path / "a.json") == {"path": "caf\udce9", "name": "日本"}


def test_a_name_as_long_as_the_file_system_allows_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 251 + ".mid"), "whole")
    write_text(tmp_path / ("日" * 84 + ".mi"), "whole")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="processes")
def test_what_a_killed_process_was_writing_is_swept_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from dsmr.console.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path: path.write_bytes(b'half'); os._exit(9)"
    )
    target = tmp_path / "music [1].mid"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, target], cwd=Path(__file__).parents[2], check=False)
    (left,) = tmp_path.iterdir()  # the second swept what the first had left
    assert is_temporary(left.name)
    (tmp_path / "music [1]-2.mid").write_text("another's")
    with atomic_path(tmp_path / "music [1]-2.mid") as living, atomic_path(target) as path:
        assert living.exists()
        path.write_text("whole")
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "music [1]-2.mid", living, path])
        living.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["music [1]-2.mid", "music [1].mid"]


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_no_output_is_an_input_or_another_output(tmp_path: Path) -> None:
    """By whatever name: `play --out` or `--save-state` onto the prompt destroyed it."""
    prompt = tmp_path / "a.mid"
    prompt.write_text("music")
    (tmp_path / "link.mid").symlink_to(prompt)
    os.link(prompt, tmp_path / "hard.mid")
    (tmp_path / "folder").mkdir()
    for output in ("a.mid", "link.mid", "hard.mid", "folder/../a.mid"):
        with pytest.raises(UserError, match="is the prompt itself, which would be overwritten"):
            check_apart([tmp_path / output], {"the saved stream": None, "the prompt": prompt})
    with pytest.raises(UserError, match=r"is named for two results .*b\.mid"):
        check_apart([tmp_path / "b.mid", None, tmp_path / "folder" / ".." / "b.mid"], {})
    check_apart([tmp_path / "b.mid", tmp_path / "c.mid", None], {"the prompt": prompt})
