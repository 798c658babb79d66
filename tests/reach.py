"""Which tests run which lines of some modules, and how long they take: a plugin of pytest for `tests/mutation.py`.

A test is said to run a line if it does itself, if a fixture of it does, or if its file does when it is imported.
"""

import contextlib
import functools
import resource
import sys
import threading
import time
import types
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import pytest

Line = tuple[str, int]  # a module, and the line in it


@dataclass
class Part:
    """A test, a fixture, or a file that is collected: what it ran, and the processor's time that it took."""

    ran: set[Line] = field(default_factory=set)
    seconds: float = 0.0


class Reach:
    """After the session, `tests` has every test, by its node id; `modules` names what is watched, by its file."""

    def __init__(self, modules: dict[str, str]) -> None:
        self.modules = modules
        self.tests: dict[str, Part] = {}
        self._shared: dict[Any, Part] = {}  # by fixture, or by the file of tests
        self._open = [Part()]

    @contextlib.contextmanager
    def _part(self, part: Part) -> Generator[None]:
        """What is run here belongs to the part, and to no part around it."""
        self._open.append(part)
        began = _time()
        sys.settrace(self._called)
        threading.settrace(self._called)
        try:
            yield
        finally:
            self._open.pop()
            took = _time() - began
            part.seconds += took
            self._open[-1].seconds -= took
            if len(self._open) == 1:
                sys.settrace(None)
                threading.settrace(None)

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        return self._ran(frame, event, argument) if frame.f_code.co_filename in self.modules else None

    def _ran(self, frame: types.FrameType, event: str, argument: Any) -> Any:
        self._open[-1].ran.add((self.modules[frame.f_code.co_filename], frame.f_lineno))
        return self._ran

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Generator[None, Any, Any]:
        with self._part(self._shared.setdefault(collector.path, Part())):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":  # part of its test
            return (yield)
        with self._part(self._shared.setdefault(fixturedef, Part())):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Generator[None, Any, Any]:
        own = self.tests[item.nodeid] = Part()
        _forget()
        with self._part(own):
            result = yield
        fixtures = [one for several in item._fixtureinfo.name2fixturedefs.values() for one in several]
        for one in (item.path, *fixtures):
            shared = self._shared.get(one, Part())
            own.ran |= shared.ran
            own.seconds += shared.seconds if one is not item.path else 0
        return result


def _time() -> float:
    """The processor's, of this process and of those that it has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def _forget() -> None:
    """Empty every cache of ours, so that a test runs what it would run alone."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("dsmr", "dsmr_kernels"):
            for one in list(vars(module).values()):
                if isinstance(one, functools._lru_cache_wrapper):
                    one.cache_clear()
