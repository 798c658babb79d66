"""The benchmark of the paper's ratios: the schedules are the paper's, and the table divides what it should."""

from benchmarks.paper_ratios import PAPER, change, schedules, table
from dsmr.model.schedule import MemorySchedule


def row(peak: int, seconds: float) -> dict:
    return {"kv_bytes": [2**20, 2**20], "peak_bytes": peak, "tokens": 1000, "timings": {"all": {"median": seconds}}}


def test_the_papers_figures_give_the_papers_ratios() -> None:
    ratios = {name: change(gigabytes / PAPER["full"][0]) for name, (gigabytes, _) in PAPER.items()}
    assert (ratios["two_scale"], ratios["fhcr"]) == ("-59 %", "-65 %")
    assert [change(PAPER[name][1] or 0) for name in ("two_scale", "fhcr")] == ["+36 %", "+18 %"]


def test_schedules_are_those_of_the_paper() -> None:
    found = {name: MemorySchedule.parse(text) for name, text in schedules(8, 4096, 256).items()}
    assert set(found) == set(PAPER)
    assert found["two_scale"].horizons == found["reverse_two_scale"].horizons[::-1] == (4096, 4096, *[256] * 6)
    assert found["fhcr"].horizons == found["full"].horizons
    assert found["fhcr"].kv_heads == (2,) * 8


def test_the_table_sets_ours_beside_the_papers() -> None:
    texts = schedules(4, 64, 8)
    rows = {"full": row(100 * 2**20, 2.0), "two_scale": row(50 * 2**20, 1.0), "fhcr": {"error": "out of memory"}}
    lines = table(rows, texts).splitlines()
    assert "| 50.0 MiB | -50 % | -59 % | 1,000 | +100 % | +36 % |" in lines[3]
    assert "out of memory" in lines[4]
    lines = table({**rows, "full": {"error": "out of memory"}}, texts).splitlines()
    assert all("tokens" not in line for line in lines[2:])
