"""Many Python programs for the price of one start: a process imports what they need, once, and forks for each.

Importing PyTorch takes seconds, and a test that kills ten processes would spend them ten times. What is forked is a
process like any other: its own arguments, files and signals, and what Python does at its end.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = (
    *("dsmr.cli.app", "dsmr.experiments.cell", "dsmr.training.loop", "dsmr.evaluation"),
    *("torch._dynamo", "dsmr.training.sharding", "matplotlib.figure", "matplotlib.backends.backend_agg"),
)

# A line asks for a process, or whether one has ended, and is answered by its number, or by its exit code or None.
_SERVER = """
import contextlib, importlib, json, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
for name in sys.argv[1:]:
    with contextlib.suppress(ModuleNotFoundError):  # whoever needs it says so
        importlib.import_module(name)
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    asked = json.loads(line)
    if "ended" in asked:
        number, status = os.waitpid(asked["ended"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if number else None
    elif (answer := os.fork()) == 0:
        break
    print(json.dumps(answer), file=answers, flush=True)
else:
    sys.exit()
answers.close()
for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
    opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(opened, number)
    os.close(opened)
os.environ.update(asked["environment"])
sys.argv[:] = ["-c", *(os.fsdecode(bytes.fromhex(argument)) for argument in asked["arguments"])]
if asked["module"]:
    runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
else:
    exec(compile(asked["code"], "<string>", "exec"), globals())
"""


@dataclass
class Forked:
    """A process under way: its number, and `code` once it has been seen to have ended, negative for a signal."""

    pid: int
    folder: tempfile.TemporaryDirectory[str]
    server: "WarmStart"
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.code is None:
            self.code = self.server._asked({"ended": self.pid})
        return self.code

    def send(self, number: int) -> None:
        """A signal to it."""
        os.kill(self.pid, number)

    def wait(self, seconds: float = 300.0) -> "subprocess.CompletedProcess[str]":
        """Its end, and all that it said; killed, and `subprocess.TimeoutExpired`, if that takes longer."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise subprocess.TimeoutExpired("a forked process", seconds)
            time.sleep(0.005)
        assert self.code is not None
        said = [(Path(self.folder.name) / name).read_bytes().decode() for name in ("out", "err")]
        return subprocess.CompletedProcess([], self.code, *said)


class WarmStart:
    """The process that forks, with `modules` imported; `environment` in place of this process's."""

    def __init__(self, modules: Sequence[str] = OURS, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def _asked(self, what: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        return json.loads(answer)

    def start(
        self,
        arguments: Sequence[str | bytes],
        *,
        module: str = "dsmr",
        code: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Forked:
        """A process like `python -m MODULE ARGUMENTS`, or, with `code`, `python -c CODE ARGUMENTS`; `environment` is
        added to what it has, and read by what is imported only then.
        """
        folder = tempfile.TemporaryDirectory()
        asked = {
            "arguments": [os.fsencode(argument).hex() for argument in arguments],
            "module": "" if code else module,
            "code": code,
            "environment": dict(environment or {}),
            "out": f"{folder.name}/out",
            "err": f"{folder.name}/err",
        }
        return Forked(self._asked(asked), folder, self)

    def run(
        self, arguments: Sequence[str | bytes], *, module: str = "dsmr", code: str = "", seconds: float = 300.0
    ) -> "subprocess.CompletedProcess[str]":
        """Start one, and wait for its end."""
        return self.start(arguments, module=module, code=code).wait(seconds)

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
