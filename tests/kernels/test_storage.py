"""Files of the kernels' programs are whole, and what a killed process left of one is swept by the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmr_kernels.measured import is_whole, sealed
from dsmr_kernels.storage import write_text

LEAVE = "import os, sys; from dsmr_kernels import storage; os.replace = lambda *_: os._exit(9); "
LEAVE += "storage.write_text(sys.argv[1], 'half')"


def test_what_a_killed_process_was_writing_is_swept(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, "-c", LEAVE, str(path)], env=environment, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tuned-")
    mine = tmp_path / left.name.replace(left.name.split("-")[2], str(os.getpid()))
    mine.write_text("of a process that lives")
    write_text(path, "whole")
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted([mine.name, path.name])
    assert path.read_text() == "whole"


def test_a_measurement_that_was_changed_is_not_whole() -> None:
    made = sealed({"format": 1, "entries": [{"bm": 64}], "text": "é"})
    assert is_whole(made)
    assert is_whole({"format": 1})  # of an earlier version
    for changed in (
        {**made, "format": 2},
        {**made, "sum": "sha256:"},
        {"sun" if key == "sum" else key: value for key, value in made.items()},
        {**made, "more": 0},
        [made],
    ):
        assert not is_whole(changed)
    with pytest.raises(TypeError):
        sealed({"x": object()})
