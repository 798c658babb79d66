"""Cells on a system without what Unix alone has, as far as one system can play another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_table import small_corpus, small_table, toml

TAKEN_AWAY = """
import builtins, io, os, sys

sys.modules |= dict.fromkeys(("fcntl", "resource", "termios", "tty"))
for name in ("nice", "setpgrp", "sched_getaffinity"):
    delattr(os, name)
opened = builtins.open


def without_proc(path, *options, **more):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return opened(path, *options, **more)


builtins.open = io.open = without_proc
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "nice"), reason="nothing to take away: this is such a system")
def test_a_table_is_run(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(TAKEN_AWAY)
    small_corpus(tmp_path / "corpus")
    (tmp_path / "small.toml").write_text(toml(small_table(tmp_path / "corpus", cells={"none": [0]})))
    command = [sys.executable, "-m", "dsmr", "experiments", "run", str(tmp_path / "small.toml")]
    command += ["--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}  # its workers are without, too
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    row = json.loads((tmp_path / "out" / "cells" / "none-s0" / "row.json").read_text())
    assert (row["steps"], row["measured"]["peak_bytes"]) == (24, 0)
