"""Plant one fault at a time and see whether a test finds it: by hand, on a sample.

    python tests/mutation.py --sample 120 --seed 0
    python tests/mutation.py --module dsmr_kernels/ring.py --sample 1000      # all of one module's
    python tests/mutation.py --list                                           # what would be planted, and runs nothing

A fault (`planted_faults.py`) is planted in a copy of the tree, and the quick tests of its module are run there until
the first fails: only those that run the statement with the fault (`reach.py` has watched them once), because the others
cannot tell, and the quickest first. Each is given four times the processor's time that it takes without a fault, and
five seconds; a fault that waits takes none, and is ended some minutes after all of them should be over. What survives
is printed as a diff, to be looked at: either a test is missing, or the program means the same (`EQUIVALENT` says which
and why; those are not counted). One process has imported PyTorch and is forked for each fault. cosmic-ray starts a
process for each, which would import it; mutmut 3 forks too, and tells by function, not by statement, which tests run a
fault.
"""

import argparse
import contextlib
import hashlib
import importlib
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from planted_faults import Fault, faults_of
from reach import Part, Reach

ROOT = Path(__file__).resolve().parents[1]
_OF_KERNELS = (
    *(f"tests/kernels/test_{name}.py" for name in ("visibility", "memory", "retention", "reading_retained")),
    *(
        f"tests/kernels/test_{name}.py"
        for name in ("memory_value", "quantised", "decode", "call_options", "attention", "not_finite", "arrivals")
    ),
    "tests/kernels/test_recomputation.py",
    *("-k", "not triton"),
)
_OF_MUSIC = (
    *(f"tests/music/test_{name}.py" for name in ("midi_bytes", "every_note", "tokenizer", "vocabulary")),
    "tests/corpus/test_trust.py",
)
MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "dsmr_kernels/ring.py",
            "dsmr_kernels/appending.py",
            "dsmr_kernels/visibility.py",
            "dsmr_kernels/memory.py",
            "dsmr_kernels/retention.py",
            "dsmr_kernels/quantise.py",
            "dsmr_kernels/backends/reference.py",
        ),
        _OF_KERNELS,
    ),
    **dict.fromkeys(
        ("dsmr/corpus/store.py", "dsmr/corpus/streams.py"),
        ("tests/corpus/test_corpus.py", "tests/corpus/test_streams.py", "tests/runs/test_damage.py"),
    ),
    **dict.fromkeys(
        ("dsmr/music/midi_bytes.py", "dsmr/music/midi_file.py", "dsmr/music/tokenizer.py"),
        _OF_MUSIC,
    ),
    "dsmr/generation/heard.py": ("tests/generation/test_heard.py",),
    "dsmr/training/sharding.py": ("tests/training/test_sharding.py",),
    "dsmr/training/joining.py": ("tests/training/test_ranks.py", "-k", "not killed"),
}
"""Each module, and the tests that concern it."""
EQUIVALENT: dict[str, str] = {
    "dsmr_kernels/appending.py: if k_scale is not None and v_scale is not None:: k_scale is not None and v_scale is "
    "not None → (k_scale is not None or v_scale is not None)": "a memory has both scales or none",
    **dict.fromkeys(
        ("dsmr/generation/heard.py: CHUNK = 1 << 12: 12 → 13", "dsmr/generation/heard.py: CHUNK = 1 << 12: 1 → 2"),
        "any size will do that is small beside the rest of a process",
    ),
    "dsmr_kernels/backends/reference.py: if bias is not None and buckets is not None:: bias is not None and buckets "
    "is not None → (bias is not None or buckets is not None)": "the border refuses a bias without buckets, and buckets "
    "without a bias",
    "dsmr_kernels/backends/reference.py: return scores.masked_fill(broken.unsqueeze(-2) & seen, torch.nan), values."
    "masked_fill(broken.unsqueeze(-1), 0.0): -2 → (2)": "values have four dimensions",
    "dsmr/music/midi_file.py: midi = read_bytes(file.read(LARGEST), ends=False): False → True": "the ends of notes are "
    "not counted",
    "dsmr_kernels/quantise.py: scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0) + scale * 0  "
    "# NaN if it is not finite: torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0) + scale * 0 → "
    "(torch.where(scale >= torch.finfo(torch.float32).tiny, scale, 0.0) - scale * 0)": "0 or NaN, added or subtracted",
    "dsmr_kernels/retention.py: return [(False, tokens)]: False → True": "who appends within a segment has "
    "none that is over",
    "dsmr_kernels/retention.py: levels = torch.arange(62 - kept.bit_length(), device=numbers.device): "
    "62 - kept.bit_length() → (62 + kept.bit_length())": "no stream has 2**61 tokens",
    "dsmr_kernels/retention.py: return torch.where(place << level == numbers, slot, -1): 1 → 2": "who is passed by has "
    "a negative slot, whichever",
    "dsmr_kernels/memory.py: self._written = -1 if compiling else this_backward(): 1 → 2": "no backward pass has a "
    "negative number",
    **dict.fromkeys(
        (
            "dsmr_kernels/appending.py: tokens = k.shape[2] if k.dim() == 4 else -1: -1 → (1)",
            "dsmr_kernels/appending.py: tokens = k.shape[2] if k.dim() == 4 else -1: 1 → 2",
        ),
        "what has not four dimensions has none of these shapes, whatever number stands in them",
    ),
    **dict.fromkeys(
        (
            "dsmr_kernels/appending.py: capacity = storage[0].shape[2]: 0 → 1",
            "dsmr_kernels/appending.py: capacity, tokens = storage[0].shape[2], new[0].shape[2]: 0 → 1",
            "dsmr_kernels/appending.py: capacity, tokens = storage[0].shape[2], new[0].shape[2]: 0 → 1 (2)",
            "dsmr_kernels/appending.py: slots = (position[:, None] + torch.arange(-new[0].shape[2], 0, "
            "device=position.device)).remainder(: 0 → 1",
            "dsmr_kernels/appending.py: storage[0].shape[2]: 0 → 1",
            "dsmr_kernels/retention.py: capacity = storage[0].shape[2]: 0 → 1",
            "dsmr_kernels/retention.py: kept = storage[0].shape[2] - room: 0 → 1",
            "dsmr_kernels/retention.py: source = (done[:, None] + step).clamp(max=new[0].shape[2] - 1): 0 → 1",
        ),
        "of values there are as many as of keys",
    ),
    **dict.fromkeys(
        (
            "dsmr/music/midi_bytes.py: changes = np.array(tempos, dtype=np.int64).reshape(-1, 2): 1 → 2",
            "dsmr/music/midi_bytes.py: table = np.array(notes, dtype=np.int64).reshape(-1, 5): 1 → 2",
            "dsmr/music/midi_bytes.py: return Sounding(table, np.array(pedals, dtype=np.int64).reshape(-1, 2), never): "
            "1 → 2",
            "dsmr/music/tokenizer.py: ids = np.asarray(tokens, dtype=np.int64).reshape(-1): 1 → 2",
        ),
        "to NumPy any negative size is the one to be worked out",
    ),
}
"""Faults that are none, as `--list` prints them, and why."""
TIMES, MORE = 4.0, 5.0  # what a test takes without a fault, and seconds: beyond that it counts as failed
MEMORY = 8 << 30  # bytes, of a loop that does not end
# Looks at what is planted, and seconds between them: some minutes beyond what its tests take, counted so that time in
# which all stands still does not count. What waits for others takes no processor's time.
LOOKS, LOOK = 6000, 0.05


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


def warm(names: list[str]) -> None:
    """Import what is not ours, so that a fork has it."""
    for name in names:
        with contextlib.suppress(Exception):  # what can be imported behind another only, or not twice
            importlib.import_module(name)
    assert not any(name.split(".")[0] in ("dsmr", "dsmr_kernels") for name in sys.modules)


def _pytest(tree: Path, arguments: list[str], plugin: Any) -> int:
    """Run tests there, in this process; nothing random is another the next time, and nothing is kept for it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(one for one in sys.path if not Path(one or ".").resolve().is_relative_to(ROOT))]
    from hypothesis import Phase, settings

    settings.register_profile("here", derandomize=True, database=None, phases=[Phase.explicit, Phase.generate])
    settings.load_profile("here")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    plain = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not soak and not gpu"]
    return int(pytest.main([*plain, *arguments], [plugin]))


def watched(tree: Path, test: str, options: list[str], modules: list[str], kept: Path) -> dict[str, Part]:
    """Run a file of tests without a fault, unless that was done; what each of them runs of the modules, and how long
    it takes. What they import that is not ours is imported here too."""
    texts = [(tree / one).read_text() for one in (test, *modules)]
    found = kept / f"{hashlib.sha256(repr((options, modules, texts)).encode()).hexdigest()[:16]}.pickle"
    if not found.exists():
        process = os.fork()
        if not process:
            code = 1
            try:
                reach = Reach({str(tree / module): module for module in modules})
                code = _pytest(tree, [test, *options], reach)
                others = [name for name, one in sys.modules.items() if not _lies_in(tree, one)]
                found.with_suffix(".part").write_bytes(pickle.dumps((reach.tests, others)))
            finally:
                os._exit(code)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0:
            sys.exit(f"without a fault {test} fails")
        found.with_suffix(".part").rename(found)
    parts, others = pickle.loads(found.read_bytes())
    warm(others)
    return parts


def _lies_in(folder: Path, module: object) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or Path(file).is_relative_to(folder)


def parts_of(tree: Path, module: str, kept: Path) -> dict[str, Part]:
    """The tests that concern a module, watched."""
    tests = [one for one in MODULES[module] if one.startswith("tests/")]
    alike = [other for other, others in MODULES.items() if others == MODULES[module]]
    options = [*MODULES[module][len(tests) :]]
    return {name: part for test in tests for name, part in watched(tree, test, options, alike, kept).items()}


class Chosen:
    """Some tests, in an order, until one fails; each as long as it may take."""

    def __init__(self, tests: list[str], parts: dict[str, Part]) -> None:
        self.order = {name: number for number, name in enumerate(tests)}
        self.parts = parts

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((one for one in items if one.nodeid in self.order), key=lambda one: self.order[one.nodeid])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        # Of the processor's time, so that waiting does not count; nothing catches the signal that ends it.
        signal.setitimer(signal.ITIMER_PROF, TIMES * self.parts[item.nodeid].seconds + MORE)


def _in_order(tests: list[str], parts: dict[str, Part]) -> list[str]:
    """The quickest first, but one of each before the same with other arguments."""
    alike = Counter[str]()
    places: list[tuple[int, int, str]] = []
    for name in sorted(tests, key=lambda name: parts[name].seconds):
        alike[name.split("[")[0]] += 1
        places.append((alike[name.split("[")[0]], len(places), name))
    return [name for *_, name in sorted(places)]


def _ended(process: int, seconds: float) -> int:
    """How a process ended whose tests take `seconds` without a fault. One that is still there long after that is ended,
    and what it has started with it; so it is when this one is interrupted, of which its group is not told."""
    try:
        for _ in range(LOOKS + int(TIMES * seconds / LOOK)):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return os.waitstatus_to_exitcode(status)
            time.sleep(LOOK)
    except KeyboardInterrupt:
        os.killpg(process, signal.SIGKILL)
        raise
    os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def survives(fault: Fault, tree: Path, parts: dict[str, Part]) -> bool:
    """Whether the tests pass with this fault."""
    reached = [
        name
        for name, part in parts.items()
        if any(module == fault.module and (fault.lines is None or line in fault.lines) for module, line in part.ran)
    ]
    if not reached:
        return True
    tests = _in_order(reached, parts)
    files = dict.fromkeys(name.split("::")[0] for name in tests)
    (tree / fault.module).write_text(fault.planted)
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setpgrp()
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.dont_write_bytecode = True  # all but the module with the fault lies there already
            code = _pytest(tree, ["-x", *files], Chosen(tests, parts))
        finally:
            os._exit(code)
    code = _ended(process, sum(parts[name].seconds for name in tests))
    (tree / fault.module).write_text(fault.source)
    return code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def main() -> int:
    """Plant, run, report."""
    parser = argparse.ArgumentParser(description="Plant faults and see whether tests find them.")
    parser.add_argument("--module", choices=sorted(MODULES), action="append", help="default: all")
    parser.add_argument("--sample", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="plant no more after so long")
    parser.add_argument("--keep", type=Path, help="a folder for what was watched, which need not be watched again")
    parser.add_argument("--list", action="store_true", help="print the sample and leave")
    asked = parser.parse_args()
    sources = {module: (ROOT / module).read_text() for module in asked.module or MODULES}
    every = [fault for module, source in sources.items() for fault in faults_of(module, source)]
    chosen = random.Random(asked.seed).sample(every, min(asked.sample, len(every)))
    if asked.list:
        print("\n".join(fault.key for fault in chosen))
        return 0
    began = time.monotonic()
    os.environ.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")  # as tests/conftest.py has it
    warm(["torch", "hypothesis"])
    planted, found, equivalent = Counter[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        tree = copy_of_the_tree(Path(name).resolve())
        kept = asked.keep or Path(name)
        kept.mkdir(parents=True, exist_ok=True)
        reach = {module: parts_of(tree, module, kept) for module in dict.fromkeys(fault.module for fault in chosen)}
        for module in sources:  # else the compiled one would be taken for one with a fault, if it has the same size
            for compiled in (tree / module).parent.glob(f"__pycache__/{Path(module).stem}.*"):
                compiled.unlink()
        print(f"watched in {time.monotonic() - began:.0f} s", flush=True)
        for fault in chosen:
            if time.monotonic() > began + 60 * asked.minutes:
                break
            if fault.key in EQUIVALENT:
                equivalent += 1
                continue
            survived = survives(fault, tree, reach[fault.module])
            planted[fault.module] += 1
            found[fault.module] += not survived
            print(f"{'survived' if survived else 'found'}: {fault.name}", flush=True)
            if survived:
                print(f"{fault.key}\n{fault.diff}\n", flush=True)
    for module in planted:
        print(f"{found[module]:4} of {planted[module]:4}  {module}")
    counted = planted.total()
    print(
        f"{len(every):,} faults can be planted in {len(sources)} modules; {counted + equivalent} were (seed "
        f"{asked.seed}) in {(time.monotonic() - began) / 60:.0f} min\n"
        f"{found.total()} of {counted} found, {found.total() / max(counted, 1):.1%}; {equivalent} more mean the same"
    )
    return int(found.total() < 0.95 * counted)


if __name__ == "__main__":
    sys.exit(main())
