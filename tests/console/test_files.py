"""Files that are replaced whole, where the user pointed."""

import subprocess
import sys
from pathlib import Path

import pytest

from dsmr.console.errors import UserError
from dsmr.console.files import check_replaceable, write_json, write_text


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


def test_only_a_file_of_its_kind_is_replaced_by_a_result(tmp_path: Path) -> None:
    """Also a damaged one, and what `mktemp` made."""
    path = tmp_path / "a"
    for what, contents in {
        "JSON": (b"", b" \n", b'\xef\xbb\xbf {"a"', b"[]", b"{ cut short"),
        "a Chrome trace": (b'{"traceEvents"', b"\x1f\x8b\x08"),
        "a packed corpus": (b"", b"PK\x03\x04" + bytes(26) + b"manifest.jsonrest"),
    }.items():
        check_replaceable(path, what)
        for content in contents:
            path.write_bytes(content)
            check_replaceable(path, what)
        for content in (b"MThd\0\0\0\6", b"PK\x03\x04" + bytes(26) + b"maestro/a.mid", b"# notes", b"\0"):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"a is there already and is not {what}: choose another file"):
                check_replaceable(path, what)
        path.unlink()
    check_replaceable(None)
    check_replaceable(tmp_path)  # the writing says that it is a folder
    write_json(path, {"a": 1}, sealed=True)
    check_replaceable(path)


@pytest.mark.skipif(sys.platform == "win32", reason="devices")
def test_a_device_is_not_replaced_by_a_result() -> None:
    with pytest.raises(UserError, match="no ordinary file"):
        check_replaceable("/dev/null")
