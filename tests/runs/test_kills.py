"""Verbs that are killed at any moment run again to the same end and leave nothing: a few kills of each quick one.

By hand, two hundred and more over all verbs: `python tests/runs/kills.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("miditok")
pytest.importorskip("onnxruntime")


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_verb_runs_again_and_leaves_nothing(tmp_path: Path) -> None:
    """In a process of its own, because it forks and must have no thread."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "runs" / "kills.py"), "--quick", "--kills", "14", "--seed", "3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].split() == ["all", "14", done.stdout.split()[-2], "0"]
    left = [path.name for path in tmp_path.iterdir()]
    assert not [name for name in left if not name.startswith(("torchinductor_", ".ses"))]  # PyTorch's, ONNX Runtime's


@pytest.mark.slow
def test_an_export_that_was_killed_can_be_made_again(tmp_path: Path) -> None:
    """What it had written was taken for something else, and the same command refused."""
    from small_export import exported

    from dsmr.console.errors import UserError
    from dsmr.export.write import UNFINISHED, export_run

    exported(tmp_path)
    (tmp_path / "export" / "export.json").unlink()
    with pytest.raises(UserError, match=r"model\.onnx is there already, of something else"):
        export_run(tmp_path / "run", tmp_path / "export")
    (tmp_path / "export" / UNFINISHED).touch()
    export_run(tmp_path / "run", tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "export.json",
        "model.onnx",
        "tokenizer.json",
    ]
