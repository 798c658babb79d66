"""Every verb is known to the programs that damage and kill, and every file that one writes to `flips.py`."""

from pathlib import Path

import pytest

pytest.importorskip("miditok")
pytest.importorskip("onnxruntime")
import verbs
from damaging import flip
from flips import KINDS, kind_of, unknown, write_by_verbs


def test_every_verb_is_known() -> None:
    assert sorted(verbs.names()) == sorted(verbs.VERBS)


@pytest.mark.soak
def test_every_file_that_a_verb_writes_is_sealed_or_of_another_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All verbs but those that start other processes, whose files `test_demo.py` and `test_runner.py` look at. A few
    flips a file; 60 by `python tests/fuzz/flips.py`."""
    import random

    import dsmr.demo.run
    import dsmr.live.performance
    import dsmr.profiling.profile
    from dsmr_kernels.costing import ceilings

    for module, name in (
        (dsmr.live.performance, "OutputPort"),
        (dsmr.profiling.profile, "measured_row"),
        (ceilings, "ceilings_of"),
        (dsmr.demo.run.DemoSize.__init__, "__defaults__"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # which `stand_in` replaces
    verbs.stand_in()
    wanted = [verb for verb in verbs.VERBS if verb not in verbs.SPAWNING and verb != "experiments report"]
    place = write_by_verbs(tmp_path, wanted)
    assert not unknown(place)
    rng, seen = random.Random(0), set()
    for path in sorted(place.rglob("*")):
        kind = kind_of(path) if path.is_file() else None
        if kind is not None and kind.door is not None and (kind.name, path.name) not in seen:
            seen.add((kind.name, path.name))
            found = flip(path, lambda path=path, door=kind.door: door(path), str(path.parent), 6, rng)
            assert found.named == found.flips, f"{path.relative_to(place)}: {found}"
    assert {kind.name for kind in KINDS if kind.door} - {name for name, _ in seen} <= {"row of a cell", "tuned engines"}
