"""Ceilings are measured once and kept; predictions follow from counts; bad caches and folders do no harm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from known_ceilings import KNOWN, SHARE

from dsmr_kernels.costing import ceilings as program
from dsmr_kernels.costing import load as load_module
from dsmr_kernels.costing.cost import Call, Work, backward_parts, forward_parts, total
from dsmr_kernels.costing.predict import Ceilings, attention_seconds, bound_seconds, plain_seconds
from dsmr_kernels.costing.prediction_check import check, check_table
from dsmr_kernels.costing.timing import Timing, Yardstick, seconds_of

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSMR_CACHE_DIR", str(tmp_path))
    return tmp_path / "ceilings.json"


def counted_measure(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    asked: list[torch.device] = []
    monkeypatch.setattr(program, "measure", lambda device: asked.append(device) or KNOWN)
    return asked


def test_what_was_measured_is_kept_by_device_and_version(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counted_measure(monkeypatch)
    assert program.ceilings_of(CPU) == program.ceilings_of(CPU) == KNOWN
    assert len(asked) == 1
    program.ceilings_of(CPU, refresh=True)
    assert len(asked) == 2
    monkeypatch.setattr(torch, "__version__", "99.0")  # another PyTorch, other figures; the old ones stay
    program.ceilings_of(CPU)
    assert len(asked) == 3
    assert len(json.loads(cache.read_text())) == 2 + 1  # and their sum
    assert [path.name for path in cache.parent.iterdir()] == ["ceilings.json"]


BUSY = replace(KNOWN, load=4.0, cores=2, spread=0.1)


@pytest.mark.parametrize(
    ("kept", "now", "again"),
    [
        (BUSY, 0.2, True),
        (BUSY, 2.0, True),
        (BUSY, 2.1, False),  # hardly quieter
        (BUSY, None, False),
        (replace(KNOWN, load=0.5, cores=2, spread=0.5), 0.1, True),  # the rounds told of what the load did not
        (replace(KNOWN, load=0.1, cores=2, spread=0.5), 0.0, False),  # it would not help
        (replace(KNOWN, load=0.5, cores=2, spread=0.1), 0.0, False),  # nothing was wrong
        (KNOWN, 0.0, False),  # nobody knows
    ],
)
def test_ceilings_measured_under_load_are_measured_again_when_it_is_quieter(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kept: Ceilings, now: float | None, again: bool
) -> None:
    quiet = replace(KNOWN, copy_bytes=2e9, load=now, cores=2, spread=0.01)
    monkeypatch.setattr(program, "measure", lambda device: quiet)
    monkeypatch.setattr(program, "load_average", lambda: now)
    program.save(kept, CPU)
    said: list[str] = []
    assert program.ceilings_of(CPU, rough=True) == kept  # at once, however it came about
    found = program.ceilings_of(CPU, say=said.append)
    assert found == (quiet if again else kept)
    if again:
        assert "quieter now" in said[0]
        assert len(said) == (2 if quiet.disturbed else 1)  # better, but not good
        assert program.load(CPU) == quiet
        before = len(said)
        assert program.ceilings_of(CPU, say=said.append) == quiet  # and that is the end of it
        assert len(said) == before


def test_a_load_that_comes_back_keeps_the_better_figures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure", lambda device: replace(BUSY, load=9.0))
    monkeypatch.setattr(program, "load_average", lambda: 0.0)
    program.save(BUSY, CPU)
    said: list[str] = []
    assert program.ceilings_of(CPU, say=said.append) == BUSY
    assert "came back" in said[-1]


def test_figures_measured_under_load_are_said_to_be(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measure", lambda device: BUSY)
    said: list[str] = []
    assert program.ceilings_of(CPU, say=said.append) == BUSY
    assert len(said) == 1
    assert "a load average of 4.0 on 2 cores" in said[0]
    assert "under load" in program.table(BUSY)
    assert "under load" not in program.table(KNOWN)
    kept = json.loads(cache.read_text())
    kept.pop("sum")
    assert [(figures["load"], figures["spread"]) for figures in kept.values()] == [(4.0, 0.1)]


def test_figures_of_an_earlier_version_are_read(cache: Path) -> None:
    old = {name: value for name, value in KNOWN.to_json().items() if name not in ("load", "cores", "spread")}
    assert Ceilings.from_json(old) == KNOWN


def test_rough_figures_are_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(program, "measure", lambda device, rough=False: asked.append(rough) or KNOWN)
    assert program.ceilings_of(CPU, rough=True) == KNOWN
    assert asked == [True]
    assert not cache.exists()


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_measured_as_they_are_computed(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without bfloat16 computes in float32 and rounds."""
    asked, product = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: asked.add(a.dtype) or product(a, b, out=out))
    monkeypatch.setattr(program, "multiplies_bfloat16", lambda: fast)
    program.measure(CPU, rough=True)
    assert asked == ({torch.float32, torch.bfloat16} if fast else {torch.float32})


def test_our_own_threads_are_no_load_of_others() -> None:
    assert load_module.load_of_others(0.2, 2.1, ours=2) == pytest.approx(0.2)
    assert load_module.load_of_others(0.2, 4.0, ours=2) == pytest.approx(2.0)
    assert load_module.load_of_others(3.0, 2.0, ours=2) == 3.0
    assert load_module.load_of_others(None, 2.0, ours=2) is None
    assert not load_module.is_busy(None, 2)


@pytest.mark.parametrize("damage", ["{", "[]", '{"abacus": 1}'])
def test_a_damaged_cache_is_measured_anew(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    asked = counted_measure(monkeypatch)
    cache.write_text(damage)
    assert program.ceilings_of(CPU) == KNOWN
    assert program.load(CPU) == KNOWN
    assert len(asked) == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted_measure(monkeypatch)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSMR_CACHE_DIR", str(tmp_path / "file"))
    said: list[str] = []
    assert program.ceilings_of(CPU, say=said.append) == KNOWN
    assert len(said) == 1
    assert str(tmp_path / "file") in said[0]


def test_the_cache_follows_the_users_conventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSMR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.cache_file() == tmp_path / "dsmr" / "ceilings.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert program.cache_file() == tmp_path / "home" / ".cache" / "dsmr" / "ceilings.json"


@pytest.mark.slow
def test_the_program_measures_this_machine(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Small sizes, but the real measurements: every figure is a positive number, and the share of each is sane."""
    monkeypatch.setitem(program.COPIED, "cpu", 2**20)
    monkeypatch.setitem(program.SIDE, "cpu", 256)
    monkeypatch.setitem(program.REFERENCE, "cpu", {"batch": 1, "heads": 1, "queries": 64, "held": 256})
    monkeypatch.setattr(program, "ROUNDS", 2)
    monkeypatch.setattr(Yardstick, "TRIES", 1)
    assert program.main(["--device", "cpu", "--json"]) == 0
    found = Ceilings.from_json(json.loads(capsys.readouterr().out))
    figures = [found.copy_bytes, found.exponentials, found.operator_seconds, *found.attention_seconds.values()]
    assert all(figure > 0 for figure in [*figures, *found.matrix_flops.values()])
    for directions in found.attained.values():
        for share in directions.values():
            assert min(share["products"], share["exponentials"], share["own"]) > 0
            assert 0 <= share["edge"] <= 127.5
    assert found.cores >= 1
    assert found.spread is not None
    assert found.spread >= 0
    monkeypatch.setattr(program, "load_average", lambda: None)
    assert program.main(["--device", "cpu"]) == 0  # from the cache now
    printed = capsys.readouterr().out
    assert f"{found.copy_bytes / 1e9:.1f} GB/s" in printed
    assert "edge" in printed


def test_a_device_that_is_not_there_is_one_sentence(capsys) -> None:
    for device in ("abacus", "cuda:99", "meta"):
        assert program.main(["--device", device]) == 1
        said = capsys.readouterr().err.strip()
        assert device in said
        assert len(said.splitlines()) == 1


# --- Predictions --------------------------------------------------------------------------------------------------


def test_seconds_follow_from_the_counts_and_the_rates() -> None:
    call = Call(64, 128, held=128, heads=2, kv_heads=1)
    forward, backward = attention_seconds(call, KNOWN, "float32")
    for seconds, parts, start in ((forward, forward_parts, 1e-3), (backward, backward_parts, 2e-3)):
        work = total(parts(call).values())
        assert seconds == pytest.approx(work.flops / (1e9 * 0.5) + work.exponentials / (1e8 * 0.25) + 2 * start)
    assert attention_seconds(call, KNOWN, "bfloat16")[0] < forward


def test_the_edge_and_the_own_factor_touch_the_segment_alone() -> None:
    share = {**SHARE, "own": 0.5, "edge": 20.0}
    other = replace(KNOWN, attained={"float32": {"forward": share, "backward": share}})
    alone, behind = Call(64, 0), Call(64, 512, held=512)
    (plain, _), (edged, _) = (attention_seconds(alone, c, "float32") for c in (KNOWN, other))
    pairs = 64 * 65 / 2
    assert (edged - 1e-3) / (plain - 1e-3) == pytest.approx(2 * (pairs + 20 * 64) / pairs)
    past = [
        attention_seconds(behind, c, "float32")[0] - attention_seconds(alone, c, "float32")[0] for c in (KNOWN, other)
    ]
    assert past[0] == pytest.approx(past[1])
    short = [attention_seconds(Call(64, 0, segment_length=8), c, "float32")[0] - 8e-3 for c in (KNOWN, other)]
    assert short[1] / short[0] == pytest.approx(2 * 64 / 36)  # no more than the whole square of a segment


@pytest.mark.parametrize("edge", [0.0, 40.0, 127.5, 200.0, 511.5])
def test_the_edge_is_found_from_two_lengths(edge: float) -> None:
    def seconds(m: int) -> tuple[int, float]:
        return m, 1e-9 * m * ((m + 1) / 2 + min(edge, (m - 1) / 2))

    found = program.edges_of(seconds(256), seconds(1024))
    assert min(abs(candidate - edge) for candidate in found) < 1e-6


def test_products_and_exponentials_are_told_apart_by_two_widths() -> None:
    assert program.split_pair(3e-9 + 32e-11, 3e-9 + 128e-11, 1e-12, 1e-10) == pytest.approx((1e-11, 3e-9))
    for narrow, wide in ((1e-9, 9e-9), (5e-9, 5.1e-9), (1e-12, 1e-12)):  # noise: still no faster than the device is
        slope, rest = program.split_pair(narrow, wide, 1e-11, 2e-10)
        assert slope >= 1e-11
        assert rest >= 2e-10


def test_work_that_moves_much_and_computes_little_is_bound_by_bytes() -> None:
    assert bound_seconds(Work(flops=1e6, bytes_read=6e9, bytes_written=1e9), KNOWN, "float32") == 7.0
    assert plain_seconds(Work(flops=3e9, bytes_read=1e9, calls=4), KNOWN, "float32") == pytest.approx(3.0 + 4e-6)


def test_the_check_times_calls_beside_their_predictions() -> None:
    calls = [Call(16, 32, held=32, heads=2, kv_heads=1, head_dim=16), Call(32, 8, segment_length=8, head_dim=16)]
    rows = check(KNOWN, CPU, calls=calls, rounds=1)
    assert [(row["dtype"], row["direction"]) for row in rows[:2]] == [("float32", "forward"), ("float32", "backward")]
    assert len(rows) == 8
    for row, seconds in zip(rows[:2], attention_seconds(calls[0], KNOWN, "float32"), strict=True):
        assert row["predicted_ms"] == pytest.approx(1e3 * seconds)
        assert row["measured_ms"] > 0
        assert row["ratio"] == pytest.approx(row["predicted_ms"] / row["measured_ms"])
    close = [{**rows[0], "ratio": ratio} for ratio in (0.74, 0.75, 1.0, 1.25, 1.26)]
    assert "3 of 5 predictions" in check_table(close)


def test_timing_warms_up_and_stops_in_time() -> None:
    made: list[int] = []
    assert len(seconds_of(lambda: made.append(1), CPU, rounds=5, warmup=3)) == 5
    assert len(made) == 8
    assert len(seconds_of(lambda: made.append(1), CPU, rounds=50, limit=0.0)) == 1
    timing = Timing.of([3.0, 1.0, 2.0])
    assert (timing.median, timing.fastest, timing.rounds) == (2.0, 1.0, 3)
    assert timing.spread == pytest.approx(1.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 0.0, 1)


def test_a_disturbed_measurement_is_made_again() -> None:
    yardstick = Yardstick(CPU)
    answers = iter([True, False, True, True])  # before; after the first, the second and the third measurement
    yardstick.quiet = lambda: next(answers)
    figures = iter([(5.0, 1.0), (3.0, 2.0), (4.0, 4.0)])
    assert yardstick.fastest(lambda: next(figures)) == ((3.0, 1.0), True)
    yardstick.quiet = lambda: False
    made: list[int] = []
    assert yardstick.fastest(lambda: (made.append(1) or 1.0,)) == ((1.0,), False)
    assert len(made) == Yardstick.TRIES
    made.clear()
    once = Yardstick(CPU, tries=1)
    once.quiet = lambda: False
    assert once.fastest(lambda: (made.append(1) or 1.0,)) == ((1.0,), False)
    assert len(made) == 1


def test_a_yardstick_tells_how_far_its_rounds_lay_apart() -> None:
    yardstick = Yardstick(CPU)
    yardstick.seen = [1.0, 1.0, 1.0, 1.0]
    assert yardstick.spread == 0.0
    yardstick.seen = [1.0, 1.0, 2.0, 2.0]
    assert yardstick.spread > 0.5
    known = len(yardstick.seen)
    yardstick.quiet()
    assert len(yardstick.seen) == known + 1
