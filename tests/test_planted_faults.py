"""The tool that plants faults (`mutation.py`): what it names is there, and what it plants is a program."""

import ast
import os
import signal
import time

import mutation
import pytest
from mutation import EQUIVALENT, MODULES, ROOT
from planted_faults import faults_of


def test_every_module_and_every_file_of_its_tests_is_there() -> None:
    for module, tests in MODULES.items():
        assert (ROOT / module).is_file(), module
        assert any(one.startswith("tests/") for one in tests)
        for one in tests:
            assert (ROOT / one).is_file() or not one.startswith("tests/"), f"{one}, of {module}"


def test_what_is_said_to_mean_the_same_can_be_planted() -> None:
    """A key holds a line of the module: when that changes, what was said of it is to be looked at again."""
    modules = {key.split(": ")[0] for key in EQUIVALENT}
    keys = {fault.key for module in modules for fault in faults_of(module, (ROOT / module).read_text())}
    assert set(EQUIVALENT) <= keys


SOURCE = '''
def first(values: list[int], most: int = 3) -> int:
    """Docstrings and annotations stay."""
    assert values
    if not values and most > 0:
        raise ValueError("one of 5 words")
    values.sort()
    return min(values) + 1 if len(values) <= most else -1
'''


def test_a_fault_is_a_change_of_one_place_of_a_program() -> None:
    faults = faults_of("a.py", SOURCE)
    program = ast.dump(ast.parse(SOURCE))
    assert len({fault.key for fault in faults}) == len(faults)
    assert len({ast.dump(ast.parse(fault.planted)) for fault in faults} - {program}) == len(faults)
    assert [f"{fault.place[0]}: {fault.name.split(': ', 1)[1]}" for fault in faults] == [
        "2: 3 → 4",
        "5: not values → (values)",
        "5: not values and most > 0 → (not (not values and most > 0))",
        "5: not values and most > 0 → (not values or most > 0)",
        "5: most > 0 → (most >= 0)",
        "5: 0 → 1",
        '6: raise ValueError("one of 5 words") → pass',
        "7: values.sort() → pass",
        "8: min → max",
        "8: min(values) + 1 → (min(values) - 1)",
        "8: 1 → 2",
        "8: len(values) <= most → (len(values) < most)",
        "8: len(values) <= most → (not (len(values) <= most))",
        "8: -1 → (1)",
        "8: 1 → 2",
    ]
    assert faults[0].lines is None  # run when the module is imported
    assert [fault.lines for fault in faults[1:7]] == [range(5, 6)] * 5 + [range(6, 7)]


def asleep(seconds: float) -> int:
    """A process in a group of its own."""
    process = os.fork()
    if not process:
        try:
            time.sleep(seconds)
        finally:
            os._exit(0)
    os.setpgid(process, process)
    return process


def test_a_fault_that_waits_is_ended_and_tests_that_take_their_time_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is ended counts as found: a slow machine must not find more."""
    monkeypatch.setattr(mutation, "LOOKS", 4)
    monkeypatch.setattr(mutation, "LOOK", 0.01)
    assert mutation._ended(asleep(60), 0.0) == -signal.SIGKILL
    assert mutation._ended(asleep(0.5), 5.0) == 0


def test_who_interrupts_leaves_no_fault_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    process = asleep(60)
    monkeypatch.setattr(time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mutation._ended(process, 0.0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
