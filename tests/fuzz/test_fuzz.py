"""Whatever is done to a file of ours, opening it gives what it meant or a sentence that names it: some cases of each.

The same by the hour: `python tests/fuzz/formats.py`. What such hours found has tests of its own,
below or beside the door that it concerned.
"""

import json
import sys

import pytest

if not sys.platform.startswith("linux"):
    pytest.skip("bounds memory as Linux does", allow_module_level=True)

from formats import Bench, Fault, kinds_of, turn
from our_files import FORMATS

CASES = 30
SLOW = (
    "settings",
    "metrics",
    "checkpoint",
    "cell evaluation",
    "cell memory",
    "cell peak",
)  # doors that train or measure


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.soak
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_damaged_file_means_what_it_meant_or_is_refused_by_name(
    bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsmr.training.loop.available", lambda: False)
    form, faults, ended = FORMATS[name], [], []

    def note(found: str | Fault) -> None:
        (faults if isinstance(found, Fault) else ended).append(found)

    for kind in kinds_of(form):
        turn(bench, form, kind, None, CASES // 3 if name in SLOW else CASES, note)
    assert not faults, f"{len(faults)} faults; {faults[0].kind}: {faults[0].what}\n{faults[0].trace}"
    assert len(ended) >= CASES // 3


@pytest.mark.slow
def test_metrics_of_any_beginning_go_on_and_of_no_other_content(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process leaves the beginning of a line, which is dropped; a line that was changed is not."""
    monkeypatch.setattr("dsmr.training.loop.available", lambda: False)
    form = FORMATS["metrics"]
    whole = bench.whole(form)
    for length in (0, 1, len(whole) // 2, len(whole) - 2):
        assert bench.try_out(form, whole[:length], "blind") == "same"
    for changed in (whole[:-1] + b"\x0b", whole.replace(b'"crc"', b'"csc"'), whole[:-1] + b" \n", whole + b"\n"):
        assert bench.try_out(form, changed, "blind") == "refused"


@pytest.mark.slow
def test_rows_that_were_not_measured_alike_have_no_mean(bench: Bench) -> None:
    """A list of figures that is shorter in the second row ended in an IndexError."""
    from dsmr.console.errors import UserError
    from dsmr.experiments.rows import read_rows

    row = json.loads(bench.whole(FORMATS["row"]))
    del row["seal"]
    path = bench.folder / "rows.json"
    path.write_text(json.dumps([row, {**row, "seed": 1, "retain": row["retain"][:1]}]))
    with pytest.raises(UserError, match=r"rows\.json: rows of two_scale that were not measured alike"):
        read_rows(path)
