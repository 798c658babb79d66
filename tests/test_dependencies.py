"""What is imported is declared, what is declared is used and pinned, and nothing asks its users for a licence of its
kind.

Known weaknesses of the pinned versions: `pip-audit` (docs/development.md), which asks a service that tests cannot.
"""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_AS = {
    "pyyaml": "yaml",
    "python-rtmidi": "rtmidi",
    "pytest-benchmark": "pytest_benchmark",
    "x-transformers": "x_transformers",
    "import-linter": "importlinter",
    "mkdocs-material": "material",
}
BY_COMMAND = {"ruff", "mypy", "import-linter", "pytest-xdist", "mkdocs-material", "mkdocstrings", "pytest-benchmark"}
"""Declared for what they do when called, or as a plugin: not imported by us."""
WITHIN = {
    "miditok": "imported by name",
    "tinysoundfont": "imported by name",
    "python-rtmidi": "mido's backend",
    "triton": "what kernels are written in",
    "symusic": "of MidiTok",
}
OPTIONAL = {"flash_attn", "tokenizers", "huggingface_hub", "symusic", "grimp", "pyaudio", "mkdocs"}
"""Imported where they are there anyway: peers to be measured, parts of what is declared."""
COPYLEFT = re.compile(r"\b(A?GPL|GNU (Affero )?General)", re.IGNORECASE)


def declared() -> set[str]:
    """The names in setup.py's requirements, extras included."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.fullmatch(r"([A-Za-z][\w.-]*)(\[[\w,]+\])?>=[\d.]+(;.*)?", node.value)
            if named and named[1] != "python":
                found.add(named[1].lower())
    return found


def imported(*folders: str) -> set[str]:
    """The packages, not ours and not Python's own, that files below these folders import anywhere."""
    found: set[str] = set()
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dsmr", "dsmr_kernels"}


def names(requirements: set[str]) -> set[str]:
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in requirements}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_what_the_packages_import_is_declared() -> None:
    assert imported("dsmr", "dsmr_kernels") - names(declared()) <= OPTIONAL


def test_what_is_declared_is_used() -> None:
    used = imported("dsmr", "dsmr_kernels", "tests", "benchmarks", "docs")
    unused = {name for name in declared() - BY_COMMAND if not names({name}) & used}
    assert unused <= set(WITHIN)


def test_what_is_declared_is_pinned_once() -> None:
    assert declared() <= set(pinned())


def test_no_licence_of_what_is_installed_binds_its_users() -> None:
    """Of what is pinned and installed here, by its own metadata."""
    bound = []
    for name, version in pinned().items():
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        said = [about.get("License-Expression") or about.get("License") or "", *(about.get_all("Classifier") or [])]
        lines = [text.splitlines()[0] for text in said if text and ("::" not in text or text.startswith("License"))]
        if any(COPYLEFT.search(line) and "LGPL" not in line for line in lines):
            bound.append(f"{name} {version}: {lines}")
    assert not bound
