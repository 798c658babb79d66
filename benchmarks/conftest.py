"""How much the benchmarks measure: `DSMR_BENCH=quick` for small shapes and few rounds, or `full`."""

import os

import pytest
import torch


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"measuring on CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads), "
        f"torch {torch.__version__}, {'quick' if quick() else 'full'}"
    )


def quick() -> bool:
    """Whether small shapes and few rounds were asked for."""
    return os.environ.get("DSMR_BENCH", "full") == "quick"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if quick() and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="a shape of the full benchmark: run with DSMR_BENCH=full"))
