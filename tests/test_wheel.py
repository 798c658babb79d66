"""The wheel: pure Python, whole, nothing besides; it installs and answers where there is no compiler and no Triton."""

import email
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dsmr", "dsmr_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as `pip wheel .` does it; the tree that the tests stand in stays clean."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        source = Path(__import__(name).__file__).parent
        shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("tests", "benchmarks"):  # which must not come along
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        tree,
    ]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "CC": "/bin/false"})
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow  # builds the wheel
def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == set(PACKAGES)
    code = {name for name in names if ".dist-info/" not in name}
    for package in PACKAGES:
        source = Path(__import__(package).__file__).parent
        kept = (
            path for path in source.rglob("*") if path.suffix in (".py", ".js", ".css")
        )  # the latter of profile.html
        files = {path.relative_to(source.parent).as_posix() for path in kept} | {f"{package}/py.typed"}
        assert {name for name in code if name.startswith(f"{package}/")} == files


@pytest.mark.slow  # builds the wheel
def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    said = email.message_from_bytes(archive.read(name))
    assert said["Requires-Python"] == ">=3.11"
    needed = [line for line in said.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in needed if line.lower().startswith("triton")]
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for extra in said.get_all("Provides-Extra"):
        assert f"| `{extra}` |" in table, extra
    assert any(name.endswith("LICENSE") for name in archive.namelist())


@pytest.mark.slow  # makes an environment
def test_the_wheel_answers_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """What it needs lies beside it; no Triton, no GPU, no compiler."""
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = tmp_path / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    quiet = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run = {"env": {**quiet, "CUDA_VISIBLE_DEVICES": "", "CC": "/bin/false"}, "cwd": tmp_path, "text": True}
    program = """
import sys
sys.modules["triton"] = None
import torch
from dsmr import DSMRConfig, DSMRModel
import dsmr, dsmr_kernels
model = DSMRModel(DSMRConfig(9, "uniform(layers=1, horizon=4)", d_model=8, n_heads=2, segment_length=4))
out = model(torch.arange(6)[None], targets=torch.arange(6)[None])
out.loss.backward()
print(dsmr.__file__, dsmr_kernels.__file__, dsmr_kernels.available_backends())
"""
    said = subprocess.run([python, "-c", program], check=True, capture_output=True, **run).stdout
    assert said.count(str(site)) == 2
    assert "triton" not in said.split("(", 1)[1]
    said = subprocess.run([tmp_path / "bin" / "dsmr", "--help"], check=True, capture_output=True, **run).stdout
    assert "generate" in said


def test_an_older_python_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    version = namedtuple("version", "major minor micro")
    monkeypatch.setattr(sys, "version_info", version(3, 10, 13))
    with pytest.raises(SystemExit, match=r"DSMR needs Python 3\.11 or newer, but this is Python 3\.10"):
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
