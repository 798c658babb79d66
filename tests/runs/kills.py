"""Kill every verb at a random moment, run it again, and look at what is there: by hand, two hundred times and more.

    python tests/runs/kills.py --kills 200 --seed 0
    python tests/runs/kills.py --kills 50 --verb train

A verb runs in a process group of its own, forked from this process so that it need not import PyTorch first, and its
group is killed (SIGKILL) after a random part of the time that it takes. Then: every file that is there is whole, or the
verb's own sentence says that it is unfinished; the same command again ends well (a training is resumed); what it makes
is byte for byte what an undisturbed one makes, wherever two undisturbed ones make the same; and nothing is left over:
no temporary file, no lock, no process. In every other kill the results of a former run lie there already and are
replaced.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))  # what the tests share
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import verbs
from flips import kind_of

from dsmr.console.errors import UserError

MEASURES = ("profile",)  # says what the machine has free, which two runs may or may not find alike
REPLACES = ("prepare composed", "prepare midi", "prepare maestro", "train", "export", "experiments run", "demo")
"""Verbs that leave what is there alone unless they are told `--overwrite`, or that go on with it."""
ENOUGH = 180.0  # seconds for a verb that was killed to end well
MUSIC = (".mid", ".midi")


def warm() -> None:
    """Import what verbs import, in this process once; start no thread."""
    import dsmr.cli.app
    import dsmr.corpus.prepare
    import dsmr.demo.run
    import dsmr.evaluation.returns
    import dsmr.experiments.report
    import dsmr.experiments.runner
    import dsmr.experiments.search
    import dsmr.export.write
    import dsmr.generation.continuation
    import dsmr.live.performance
    import dsmr.profiling.page
    import dsmr.training.loop  # noqa: F401
    from dsmr.console.figures import new_figure

    new_figure()
    torch.set_num_threads(1)
    verbs.stand_in()


def start(verb: str, folder: Path, again: bool, overwrite: bool) -> int:
    """The verb in a process group of its own; returns its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        with verbs.silent():
            code = verbs.run(verb, folder, again, ["--overwrite"] if overwrite else [])
    finally:
        os._exit(code)


def ended(process: int, seconds: float) -> int | None:
    """The wait status of a process; None if it has not ended after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def undisturbed(verb: str, folder: Path, again: bool = False, overwrite: bool = False) -> str:
    """Run the verb to its end; what is wrong with that, if anything."""
    process = start(verb, folder, again, overwrite)
    status = ended(process, ENOUGH)
    if status is None:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return f"had not ended after {ENOUGH:g} s"
    code = os.waitstatus_to_exitcode(status)
    return "" if code == verbs.CODES.get(verb, 0) else f"ended with {code}"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Known:
    """What a verb makes when nobody kills it, and how long it takes."""

    before: Path
    made: dict[str, bytes]
    same: set[str]
    seconds: float


@dataclass
class Tally:
    """How often a verb was killed, and what was wrong afterwards."""

    kills: int = 0
    replacing: int = 0
    wrong: list[str] = field(default_factory=list)


class Bench:
    """Every verb's place before it runs, and what it makes there; a verb's place is made when it is first asked for."""

    def __init__(self, folder: Path, wanted: list[str]) -> None:
        self.folder = folder
        self._place = verbs.place(folder / "place")
        self._known: dict[str, Known] = {}
        self._left = wanted

    def known(self, verb: str) -> Known:
        while verb not in self._known:
            self._learn(self._left.pop(0))
        return self._known[verb]

    def _learn(self, verb: str) -> None:
        before, twice = self.folder / f"before-{verb.replace(' ', '-')}", []
        shutil.copytree(self._place, before)
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                copy = Path(shutil.copytree(before, Path(name) / "place"))
                began = time.monotonic()
                if wrong := undisturbed(verb, copy):
                    raise RuntimeError(f"{verb} {wrong}")
                twice.append((time.monotonic() - began, files(copy)))
                if len(twice) == 2:
                    shutil.rmtree(self._place)
                    shutil.copytree(copy, self._place)
        (first, one), (second, other) = twice
        old = files(before)
        made = {name: content for name, content in one.items() if old.get(name) != content}
        same = {name for name in made if other.get(name) == made[name] and verb not in MEASURES}
        self._known[verb] = Known(before, made, same, min(first, second))

    def kill(self, verb: str, share: float, replacing: bool) -> list[str] | None:
        """Kill the verb when `share` of its time is over; what is wrong then and after it ran again, None if it had
        ended before."""
        known = self.known(verb)
        overwrite = replacing and verb in REPLACES
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            place = Path(shutil.copytree(known.before, Path(name) / "place"))
            if replacing:
                for made, content in known.made.items():
                    (place / made).parent.mkdir(parents=True, exist_ok=True)
                    (place / made).write_bytes(content)
            process = start(verb, place, False, overwrite)
            status = ended(process, share * known.seconds)
            if status is not None:
                return None
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            wrong = [f"killed: {said}" for said in not_whole(place, known.made)]
            resume = verb in verbs.RESUMED and not overwrite and (place / "run" / "train.json").exists()
            if said := undisturbed(verb, place, resume, overwrite):
                return [*wrong, f"again: {said}"]
            return wrong + [f"again: {said}" for said in self._compared(place, known)]

    def _compared(self, place: Path, known: Known) -> list[str]:
        there, before = files(place), set(files(known.before))
        wrong = [f"{name} is missing" for name in known.made if name not in there]
        wrong += [f"{name} is left over" for name in there if name not in before and name not in known.made]
        wrong += [f"{name} is another" for name in known.same if there.get(name) not in (None, known.made[name])]
        return wrong + not_whole(place, known.made)


def not_whole(place: Path, made: dict[str, bytes]) -> list[str]:
    """The verb's files that are there and cannot be read, though nothing says that they are unfinished."""
    wrong = []
    for name in made:
        path = place / name
        kind = kind_of(path)
        if not path.is_file() or kind is None or (kind.door is None and path.suffix not in MUSIC):
            continue
        try:
            _read(path, kind.door)
        except UserError as error:
            if "of another export" not in str(error):  # export.json, which names the graph, is written last
                wrong.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__} {error}")
    return wrong


def _read(path: Path, door: Callable[[Path], object] | None) -> None:
    if door is None:
        from dsmr.music.tokenizer import read_midi

        read_midi(path)
    elif path.name == "model.onnx" or (path.parent / "export.json").is_file():
        from dsmr.exported.about import About

        About.load(path.parent)  # without ONNX Runtime, whose threads may not be there when this process forks
    elif path.name == "model.safetensors" and not (path.parent / "config.json").is_file():
        from dsmr.console.seal import check_seal

        assert check_seal(path)  # the configuration, written after it, is not there yet
    elif path.name != "config.json" or (path.parent / "model.safetensors").is_file():
        door(path)


def main() -> int:
    """Verb by verb in turn until all kills are done; a table at the end."""
    parser = argparse.ArgumentParser(description="Kill verbs at random moments and run them again.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", choices=sorted(verbs.VERBS), help="one of them; default: all in turn")
    parser.add_argument(
        "--rarely", type=int, default=8, help="kill verbs that start processes only every so many turns"
    )
    parser.add_argument("--quick", action="store_true", help="without the verbs that start processes of their own")
    asked = parser.parse_args()
    warm()
    alone = [verb for verb in verbs.VERBS if verb not in (*verbs.SPAWNING, "experiments report")]
    wanted = alone if asked.quick else list(verbs.VERBS)
    rng, tallies = random.Random(asked.seed), collections.defaultdict(Tally)
    with tempfile.TemporaryDirectory() as folder:
        bench, number, said = Bench(Path(folder), list(wanted)), 0, time.monotonic()
        while sum(tally.kills for tally in tallies.values()) < asked.kills:
            for verb in [asked.verb] if asked.verb else wanted:
                if asked.verb is None and verb in verbs.SPAWNING and number % asked.rarely:
                    continue
                replacing, share = rng.random() < 0.5 and verb not in verbs.SPAWNING, rng.random()
                found = bench.kill(verb, share, replacing)
                if found is None:
                    continue
                tally = tallies[verb]
                tally.kills += 1
                tally.replacing += replacing
                tally.wrong += found
                for one in found:
                    print(
                        f"{verb}, killed at {share:.0%}{', replacing' * replacing}: {one}", file=sys.stderr, flush=True
                    )
                if sum(tally.kills for tally in tallies.values()) >= asked.kills:
                    break
            number += 1
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"{sum(tally.kills for tally in tallies.values())} kills", flush=True)
    print(f"{'verb':22}{'kills':>7}{'replacing':>11}{'wrong':>7}")
    for verb, tally in tallies.items():
        print(f"{verb:22}{tally.kills:7}{tally.replacing:11}{len(tally.wrong):7}")
    total = Tally(sum(t.kills for t in tallies.values()), sum(t.replacing for t in tallies.values()))
    wrong = sum(len(tally.wrong) for tally in tallies.values())
    print(f"{'all':22}{total.kills:7}{total.replacing:11}{wrong:7}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
