"""Plant one fault at a time and see whether a test finds it: by hand, on a sample.

    python tests/mutation.py --sample 80 --seed 0
    python tests/mutation.py --module dsmr_kernels/ring.py --sample 1000      # all of one module's
    python tests/mutation.py --list                                           # what would be planted, and runs nothing

A fault is one node of the syntax tree changed: a comparison, an operator, a constant, a condition turned round, a
statement left out. It is planted in a copy of the tree, and the quick tests of its module are run there until the first
fails. What survives is printed as a diff, to be looked at: either a test is missing, or the program means the same
(`EQUIVALENT` says which and why; those are not counted). mutmut and cosmic-ray do the same for a whole package, a
process and an import of PyTorch for each fault; here one process has imported it and is forked, which is three times as
fast.
"""

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    "visibility",
    "memory",
    "memory_value",
    "arrivals",
    "retention",
    "quantised",
    "decode",
    "call_options",
    "attention",
)
_OF_KERNELS = (*(f"tests/kernels/test_{name}.py" for name in KERNELS), "-k", "not triton")
MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "dsmr_kernels/ring.py",
            "dsmr_kernels/appending.py",
            "dsmr_kernels/visibility.py",
            "dsmr_kernels/memory.py",
            "dsmr_kernels/backends/reference.py",
        ),
        _OF_KERNELS,
    ),
    "dsmr/corpus/store.py": ("tests/corpus/test_corpus.py", "tests/runs/test_damage.py"),
    "dsmr/corpus/streams.py": ("tests/corpus/test_streams.py",),
    **dict.fromkeys(
        ("dsmr/music/midi_bytes.py", "dsmr/music/midi_file.py"),
        ("tests/music/test_every_note.py", "tests/corpus/test_trust.py"),
    ),
}
"""Each module, and the tests that concern it, in the order in which they are run."""
EQUIVALENT: dict[str, str] = {}
"""Faults that are none, as `--list` prints them, and why."""
LONG = 4.0  # times what the tests take without a fault: then it counts as found

Place = tuple[int, int, int, int]  # line, column in UTF-8 bytes, and where it ends


@dataclass(frozen=True)
class Fault:
    """A change of one place of a module."""

    module: str
    place: Place
    new: str
    source: str

    @property
    def planted(self) -> str:
        """The module's text with the fault."""
        lines = self.source.encode().split(b"\n")
        line, column, last, end = self.place
        head, tail = lines[line - 1][:column], lines[last - 1][end:]
        lines[line - 1 : last] = [head + self.new.encode() + tail]
        return b"\n".join(lines).decode()

    @property
    def name(self) -> str:
        old = ast.get_source_segment(self.source, _at(self.place)) or ""
        return f"{self.module}:{self.place[0]}:{self.place[1]}: {' '.join(old.split())} → {self.new}"

    @property
    def diff(self) -> str:
        before, after = self.source.splitlines(), self.planted.splitlines()
        return "\n".join(difflib.unified_diff(before, after, self.module, "with the fault", lineterm="", n=2))


def _at(place: Place) -> ast.expr:
    line, column, last, end = place
    return ast.Constant(None, lineno=line, col_offset=column, end_lineno=last, end_col_offset=end)


# What is planted.

OPERATORS: dict[type[ast.AST], Any] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult},
    **{ast.Mod: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift},
    **{ast.Invert: ast.UAdd, ast.USub: ast.UAdd},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin"}


def faults_of(module: str, source: str) -> list[Fault]:
    """Every fault that can be planted in a module."""
    found: dict[tuple[Place, str], Fault] = {}
    tree = ast.parse(source)
    skipped = _not_run(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        for place, new in _changes(node):
            found[place, new] = Fault(module, place, new, source)
    return [found[key] for key in sorted(found)]


def _not_run(tree: ast.AST) -> set[ast.AST]:
    """Annotations, docstrings and what only a type checker reads."""
    out: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            parts += [node.returns, *(one.annotation for one in arguments if one is not None), *node.decorator_list]
        if isinstance(node, ast.AnnAssign):
            parts.append(node.annotation)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            parts.append(node)
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert):  # what a sentence says; what can never be
            parts += list(ast.iter_child_nodes(node))
        for part in parts:
            out |= set(ast.walk(part)) if part is not None else set()
    return out


def _changes(node: ast.AST) -> Iterator[tuple[Place, str]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        ops = [OPERATORS[type(node.ops[0])](), *node.ops[1:]]
        yield _place(node), f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield _place(node), f"({ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield _place(node), f"({ast.unparse(ast.BoolOp(OPERATORS[type(node.op)](), node.values))})"
    elif isinstance(node, ast.UnaryOp):
        yield _place(node), f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield _place(node), str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
    elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
        name = node.id if isinstance(node, ast.Name) else node.attr
        if name in NAMES:
            whole = ast.unparse(node)
            yield _place(node), whole[: len(whole) - len(name)] + NAMES[name]
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _place(node.test), f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield _place(node), ast.unparse(ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value))
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield _place(node), "pass"


def _place(node: ast.expr | ast.stmt) -> Place:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


# Running.


def copy_of_the_tree(folder: Path) -> Path:
    """What git knows of the tree and of changes to it, in a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if name.startswith(("dsmr/", "dsmr_kernels/", "tests/", "pyproject.toml")) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def warm() -> None:
    """Import what is not ours; start no thread."""
    import hypothesis
    import numpy
    import pytest
    import safetensors
    import torch

    torch.set_num_threads(1)
    assert hypothesis
    assert numpy
    assert safetensors
    assert pytest
    for name in ("miditok", "symusic", "rich", "typer"):
        __import__(name)
    assert not any(name.split(".")[0] in ("dsmr", "dsmr_kernels") for name in sys.modules)


def passes(tree: Path, tests: tuple[str, ...], seconds: float) -> bool:
    """Whether the tests pass there, in no more than so many seconds."""
    there = [test for test in tests if not test.startswith("tests/") or (tree / test).exists()]
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setsid()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            os.chdir(tree)
            os.environ["PYTHONPATH"], sys.dont_write_bytecode = str(tree), True
            sys.path[:] = [str(tree), *(one for one in sys.path if not Path(one).resolve().is_relative_to(ROOT))]
            import pytest

            quick = ["-m", "not slow and not soak and not gpu"]
            plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark"]
            code = int(pytest.main([*plain, *quick, *there]))
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def main() -> int:
    """Plant, run, report."""
    parser = argparse.ArgumentParser(description="Plant faults and see whether tests find them.")
    parser.add_argument("--module", choices=sorted(MODULES), action="append", help="default: all")
    parser.add_argument("--sample", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="plant no more after so long")
    parser.add_argument("--list", action="store_true", help="print the sample and leave")
    asked = parser.parse_args()
    sources = {module: (ROOT / module).read_text() for module in asked.module or MODULES}
    every = [fault for module, source in sources.items() for fault in faults_of(module, source)]
    chosen = random.Random(asked.seed).sample(every, min(asked.sample, len(every)))
    if asked.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    warm()
    survivors, equivalent, found, until = [], 0, 0, time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory() as name:
        tree, took = copy_of_the_tree(Path(name)), {}
        for fault in chosen:
            if time.monotonic() > until:
                break
            tests = MODULES[fault.module]
            if tests not in took:
                began = time.monotonic()
                if not passes(tree, tests, 600):
                    print(f"without a fault {', '.join(tests)} fail", file=sys.stderr)
                    return 2
                took[tests] = time.monotonic() - began
            if re.sub(r":\d+:\d+:", ":", fault.name) in EQUIVALENT:
                equivalent += 1
                continue
            (tree / fault.module).write_text(fault.planted)
            survived = passes(tree, tests, LONG * took[tests] + 10)
            (tree / fault.module).write_text(fault.source)
            found += not survived
            print(f"{'survived' if survived else 'found'}: {fault.name}", flush=True)
            if survived:
                survivors.append(fault)
                print(f"{fault.diff}\n", flush=True)
    counted = found + len(survivors)
    print(
        f"{len(every):,} faults can be planted in {len(sources)} modules; "
        f"{counted + equivalent} were (seed {asked.seed})"
    )
    print(f"{found} of {counted} found, {found / max(counted, 1):.1%}; {equivalent} more mean the same program")
    return int(found < 0.95 * counted)


if __name__ == "__main__":
    sys.exit(main())
