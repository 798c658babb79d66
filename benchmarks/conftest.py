"""What a run of the benchmarks keeps: the rows that were timed, and those that were not, with the reason.

`DSMR_BENCH=quick` asks for small shapes and few rounds, `full` (the default) for all of them.
"""

from typing import Any

import pytest

from benchmarks.parts.rows import about, quick

UNTIMED = pytest.StashKey[list[dict[str, str]]]()
SAID = ("question", "case", "contender", "dtype")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[UNTIMED] = []


def pytest_report_header(config: pytest.Config) -> str:
    machine = ", ".join(f"{name} {said}" for name, said in about().items())
    return f"measuring ({'quick' if quick() else 'full'}): {machine}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if quick() and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a shape of the full benchmark: run with DSMR_BENCH=full"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Keep the rows that were skipped or that failed."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    said = getattr(benchmark, "extra_info", {})
    if "question" in said and call.when == "call" and call.excinfo is not None:
        reason = str(call.excinfo.value).strip().splitlines() or [call.excinfo.typename]
        row = {name: said[name] for name in SAID} | {"status": report.outcome, "reason": reason[0][:300]}
        item.config.stash[UNTIMED].append(row)
    return report


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, str]:
    """What a figure depends on, and nothing else of the machine."""
    return about()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["untimed"] = config.stash[UNTIMED]
    output_json["profile"] = "quick" if quick() else "full"
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
