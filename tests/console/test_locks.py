"""Two at once: the second is told so, and a lock goes with its process, however that ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsmr.console.errors import UserError
from dsmr.console.locks import NAME, alone_in, locked

HOLD = """
import sys, time
from pathlib import Path
from dsmr.console.locks import alone_in
with alone_in(Path(sys.argv[1]), "a training is running"):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    """A process that works in `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_lock_goes_with_its_process(tmp_path: Path, number: int) -> None:
    process = holding(tmp_path)
    try:
        with (
            pytest.raises(UserError, match=rf"a training is running in .* \(process {process.pid}\): wait for it"),
            alone_in(tmp_path, "a training is running"),
        ):
            pass
    finally:
        process.send_signal(number)
        process.wait()
    with alone_in(tmp_path, "a training is running"):
        assert (tmp_path / NAME).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_for_nothing_is_taken_away_and_a_full_one_stays(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    with alone_in(empty, "work"):
        assert empty.is_dir()
    assert not empty.exists()
    with alone_in(full, "work"):
        (full / "result").touch()
    assert [path.name for path in full.iterdir()] == ["result"]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/\.lock: "), alone_in(tmp_path / "file", "work"):
        pass


def test_many_in_turn_are_never_two_at_once(tmp_path: Path) -> None:
    """Each takes the file away when it leaves, while others wait for it or are just opening it."""
    inside, most, turns = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, turns
        for _ in range(100):
            with locked(tmp_path / NAME, wait=True) as alone:
                assert alone
                inside += 1
                most, turns = max(most, inside), turns + 1
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, turns) == (1, 600)
    assert not (tmp_path / NAME).exists()
