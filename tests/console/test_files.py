"""Files that are replaced whole, where the user pointed."""

import subprocess
import sys
from pathlib import Path

from dsmr.console.files import write_text


def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "a.txt").write_text("old")
    for link, target in (("link.txt", "music/a.txt"), ("dangling.txt", "music/b.txt")):
        (tmp_path / link).symlink_to(target)
        write_text(tmp_path / link, "new")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "dangling.txt", "link.txt", "music"]


def test_an_empty_argument_is_refused(tmp_path: Path) -> None:
    """As a path it would be the working directory."""
    ended = subprocess.run(
        [sys.executable, "-m", "dsmr", "train", "--out", ""], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == "dsmr: an argument is empty: is a variable of the shell not set?\n"
    assert not list(tmp_path.iterdir())
