"""The Triton kernels compile for GPUs that this machine does not have, without spills: see `dsmr_kernels.tools.aot`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmr_kernels.tools.aot import KERNELS, WITHOUT_PRODUCTS, Case, Compiled, every_case, markdown, merged, sample
from dsmr_kernels.tools.targets import TARGETS

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from dsmr_kernels.backends.triton.configs import DTYPES, OLDER_INSTRUCTIONS, TABLE, Config, choose, family, from_table


def _aot(*arguments: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dsmr_kernels.tools.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.mark.slow  # sixteen kernels to compile, a few seconds each
def test_a_sample_of_every_target_and_kernel_compiles_clean(tmp_path: Path) -> None:
    found = {(case.kernel, case.target) for case in sample()}
    assert {kernel for kernel, _ in found} == set(KERNELS)
    assert {target for _, target in found} == set(TARGETS)
    report = tmp_path / "aot.json"
    result = _aot("--json", str(report), "--markdown", str(tmp_path / "aot.md"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "configurations are clean" in result.stdout
    rows = json.loads(report.read_text())["rows"]
    assert {row["target"] for row in rows} == set(TARGETS)
    assert len(rows) == len(list(sample()))
    assert (tmp_path / "aot.md").read_text().count("| none |") == len(found)
    for row in rows:
        assert 0 < row["registers"] <= 512
        assert 0 < row["occupancy"] <= 1
        assert (row["kernel"] != "table") <= row["shared"] <= row["shared_limit"]
        assert (row["matrix"] > 0) == (row["dtype"] != "float32" and row["kernel"] not in WITHOUT_PRODUCTS)
        assert (row["tensor_columns"] > 0) == (row["target"] == "sm_100")


def test_older_instructions_pass_only_where_it_is_said() -> None:
    assert {(kernel, target) for kernel, target, _ in OLDER_INSTRUCTIONS} == {("dkv", "sm_100")}
    assert {target for _, target, _ in OLDER_INSTRUCTIONS} <= {name for name, part in TARGETS.items() if part.older}


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("DSMR_AOT") != "full", reason="compiles hundreds of kernels: DSMR_AOT=full, an hour and a half"
)
def test_every_configuration_compiles_clean() -> None:
    result = _aot("--full", seconds=7200)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_a_configuration_that_spills_fails_the_report() -> None:
    only = ["--target", "sm_90", "--dim", "128", "--dtype", "bfloat16", "--kernel", "forward", "--variant", "bare"]
    result = _aot(*only, "--config", "128,128,4,2")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "spills" in result.stdout
    assert "1 configurations must not be shipped" in result.stdout


@pytest.mark.slow
def test_under_the_interpreter_it_refuses() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "dsmr_kernels.tools.aot"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "unset TRITON_INTERPRET" in result.stderr


def _compiled(**change: object) -> Compiled:
    case = Case("forward", str(change.pop("target", "sm_100")), 64, str(change.pop("dtype", "bfloat16")), "bare")
    values: dict = {"registers": 100, "spilled": 0, "shared": 1000, "tensor_columns": 256, "matrix": 8, "seconds": 1.0}
    return Compiled(case, Config(128, 64, 8, 2), **(values | change))


def _row(case: Case) -> dict:
    return Compiled(case, Config(16, 16, 4, 1), 100, 0, 1000, 0, 8, 1.0).row()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8"),
        ({"shared": 300_000}, "wants 300000 of 232448 bytes of shared memory"),
        ({"tensor_columns": 768}, "wants 768 of 512 columns of tensor memory"),
        ({"matrix": 0}, "uses no matrix instructions"),
        ({"matrix": 0, "dtype": "float32"}, None),
    ],
)
def test_faults(change: dict, fault: str | None) -> None:
    assert _compiled(**change).faults == ([] if fault is None else [fault])


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "columns", "expected"),
    [
        ("sm_90", 8, 128, 1024, 0, 16 / 64),  # two blocks by registers
        ("sm_90", 8, 129, 1024, 0, 8 / 64),  # 136 registers a thread: one
        ("sm_90", 4, 64, 100 * 1024, 0, 8 / 64),  # two by shared memory
        ("sm_80", 4, 32, 1024, 0, 64 / 64),  # as many as there may be
        ("sm_89", 4, 255, 99 * 1024, 0, 4 / 48),
        ("sm_100", 8, 64, 1024, 512, 8 / 64),  # one by tensor memory
        ("gfx942", 4, 128, 16 * 1024, 0, 16 / 32),
        ("sm_90", 8, 64, 400 * 1024, 0, 0.0),
    ],
)
def test_occupancy(target: str, warps: int, registers: int, shared: int, columns: int, expected: float) -> None:
    found = TARGETS[target].occupancy(warps=warps, registers=registers, shared=shared, tensor_columns=columns)
    assert found == pytest.approx(expected)


def test_a_report_in_pieces_is_one_report() -> None:
    def report(*rows: dict, sources: str = "a") -> dict:
        return {"triton": "3", "sources": sources, "rows": list(rows)}

    first, second = _compiled().row(), _compiled(target="sm_90", tensor_columns=0).row()
    both = merged(report(first), report(second))
    assert [row["target"] for row in both["rows"]] == ["sm_90", "sm_100"]
    assert merged(both, report(first | {"seconds": 0.0}))["rows"] == both["rows"]  # a cached one keeps its time
    assert merged(both, report(first, sources="b"))["rows"] == [first]
    assert merged(None, report(first))["rows"] == [first]


def test_the_table_shows_the_worst_case_of_each_kernel_and_target() -> None:
    rows = [_compiled().row(), _compiled(registers=200, spilled=8).row(), _compiled(target="sm_90").row()]
    lines = markdown({"triton": "3.7", "sources": "abc", "rows": rows}).splitlines()
    assert "| forward | sm_100 | 2 | 200 | 8 | 1000 | 232448 | 256 | 12.5% | spills 8 |" in lines
    assert sum(line.startswith("| forward") for line in lines) == 2
    assert "3 cases, 2 of them faulty, with Triton 3.7 from kernels of source hash `abc`" in lines[0]
    every = markdown({"triton": "3.7", "sources": "abc", "rows": [_row(case) for case in every_case()]})
    assert len(every.splitlines()) <= 80


def test_the_table_has_an_entry_for_every_target_and_dtype() -> None:
    assert set(TABLE) == set(TARGETS)
    assert {case.target for case in every_case()} == set(TARGETS)
    for target in TARGETS:
        for dtype in DTYPES:
            for head_dim in (16, 40, 64, 96, 128, 200, 256):
                assert all(isinstance(choose(kernel, target, head_dim, dtype), Config) for kernel in KERNELS)


@pytest.mark.parametrize(
    ("architecture", "served"),
    [("sm_86", "sm_89"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")],
)
def test_a_part_that_is_not_named_is_served_by_its_family(architecture: str, served: str) -> None:
    assert TABLE[family(architecture)] is TABLE[served]


def test_limits_of_registers_fit_a_block_and_are_for_nvidia_alone() -> None:
    limited = Config(16, 16, 8, 1, 255)
    assert limited.launch_options("sm_90") == {"num_warps": 8, "num_stages": 1, "maxnreg": 255}
    assert limited.launch_options("gfx942") == {"num_warps": 8, "num_stages": 1}
    assert "maxnreg" not in Config(16, 16, 8, 1).launch_options("sm_90")
    limits = set()
    for case in every_case():
        config = from_table(case.kernel, case.target, case.head_dim, getattr(torch, case.dtype))
        limits.add(config.most_registers)
        assert 32 * config.warps * config.most_registers <= 65536
    assert 255 in limits
