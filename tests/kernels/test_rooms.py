"""Where things are: names from before the package had rooms say where they went, and nothing imports Triton unasked."""

import importlib
import subprocess
import sys

import pytest

import dsmr_kernels

ROOMS = {"aot": "tools", "targets": "tools", "tune": "tools"}
ROOMS |= dict.fromkeys(("cost", "ceilings", "predict", "prediction_check", "timing"), "costing")


@pytest.mark.parametrize(("module", "room"), ROOMS.items())
def test_a_module_that_moved_says_where_to(module: str, room: str) -> None:
    with pytest.raises(ModuleNotFoundError) as refused:
        importlib.import_module(f"dsmr_kernels.{module}")
    assert str(refused.value) == f"dsmr_kernels.{module} is now dsmr_kernels.{room}.{module}"
    assert refused.value.name == f"dsmr_kernels.{module}"


@pytest.mark.slow
def test_a_program_that_moved_says_so_on_the_command_line() -> None:
    result = subprocess.run([sys.executable, "-m", "dsmr_kernels.aot"], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "dsmr_kernels.aot is now dsmr_kernels.tools.aot" in result.stderr


def test_a_module_that_never_was_is_only_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dsmr_kernels\.abacus'"):
        importlib.import_module("dsmr_kernels.abacus")


@pytest.mark.parametrize("name", ["choose", "available_backends", "NAMES"])
def test_the_choice_of_a_backend_is_at_the_dispatcher(name: str) -> None:
    with pytest.raises(ImportError, match=rf"dsmr_kernels\.backends\.{name} is now dsmr_kernels\.dispatch\.{name}"):
        getattr(dsmr_kernels.backends, name)


def test_what_tests_have_always_asked_for_is_still_there() -> None:
    from dsmr_kernels.testing import Case, allowed_error, error, random_case

    case = random_case(horizon=3)
    assert isinstance(case, Case)
    assert error(case.q, case.q) == 0 < allowed_error("out", case.q, case.q, case.q.dtype)


@pytest.mark.slow
def test_importing_the_front_imports_neither_the_triton_room_nor_the_workshop_nor_dynamo() -> None:
    """Dynamo takes as long again as PyTorch: it is there once something is compiled."""
    code = "import sys, dsmr_kernels.api, dsmr_kernels.dispatch; print(list(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for room in ("backends.triton", "costing", "tools", "testing"):
        assert f"'dsmr_kernels.{room}" not in modules
    assert "'dsmr_kernels.dispatch'" in modules
    assert "'torch._dynamo" not in modules
