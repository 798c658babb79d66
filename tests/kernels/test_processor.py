"""Which engine makes a pass on which processor, and which files of measured ones are believed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dsmr_kernels.backends.sdpa import processor, tuned
from dsmr_kernels.backends.sdpa.processor import Choice, instruction_set
from dsmr_kernels.backends.sdpa.tuned import choose
from dsmr_kernels.tools import tune_cpu

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
HERE = {"processor": "Some", "instruction_set": "AMX", "torch": "2", "sources": "abc"}
ENTRY = {"dtype": "bfloat16", "pass": "forward", "engine": "products", "computed_in": "float32"}


@pytest.fixture(autouse=True)
def _the_table_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.use(None)
    yield
    tuned.use(None)


def _has(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(processor, "instruction_sets", lambda: frozenset(flags))


@pytest.mark.parametrize(
    ("flags", "name", "forward", "backward"),
    [
        (("avx512_bf16", "amx_bf16"), "AMX", Choice("flash", BF16), Choice("products", BF16)),
        (("avx512_bf16",), "AVX-512 BF16", Choice("products", BF16), Choice("products", BF16)),
        (("bf16",), "ARM BF16", Choice("products", BF16), Choice("products", BF16)),
        ((), "AVX-512", Choice("flash", BF16), Choice("products", F32)),
        ((), "AVX2", Choice("flash", F32), Choice("products", F32)),
        ((), "DEFAULT", Choice("flash", F32), Choice("products", F32)),
    ],
)
def test_the_instruction_set_decides_over_bfloat16(
    flags: tuple[str, ...], name: str, forward: Choice, backward: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, *flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name.replace("AVX-512", "AVX512"))
    assert instruction_set() == name
    assert processor.multiplies_bfloat16() == (backward.dtype == BF16)
    assert (choose(BF16, "forward"), choose(BF16, "backward")) == (forward, backward)
    assert choose(F16, "forward").dtype == choose(F16, "backward").dtype == F32
    assert choose(F32, "forward") == Choice("flash", F32)


@pytest.mark.parametrize(
    ("held", "name"),
    [("AVX512_CORE_BF16", "AVX-512 BF16"), ("AVX512_CORE_VNNI", "AVX-512"), ("avx2", "AVX2"), ("DEFAULT", "AMX")],
    ids=str,
)
def test_what_onednn_is_held_short_of_does_not_count(held: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _has(monkeypatch, "avx512_bf16", "amx_bf16")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held)
    assert instruction_set() == name


def _file(path: Path, entry: dict[str, str] = ENTRY, **change: object) -> Path:
    tune_cpu.write(path, HERE | change, {"entries": [entry], "measured": [{"seconds": [0.1]}]})
    return path


def test_a_file_stands_in_the_tables_place_where_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _has(monkeypatch, "amx_bf16")
    monkeypatch.setattr(tuned, "this_machine", lambda: HERE)
    assert choose(BF16, "forward") == Choice("flash", BF16)
    monkeypatch.setenv(tuned.VARIABLE, str(_file(tmp_path / "new" / "tuned.json")))
    assert choose(BF16, "forward") == Choice("flash", BF16)  # read once a process
    tuned.use(None)
    assert choose(BF16, "forward") == Choice("products", F32)
    assert choose(BF16, "backward") == Choice("products", BF16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"processor": "Another"}, "are stale: made for 'Another', here is 'Some'; run `.*--device cpu` again"),
        ({"instruction_set": "AVX2"}, "are stale: made with 'AVX2', here is 'AMX'"),
        ({"torch": "1"}, "are stale: made with torch '1', here is '2'"),
        ({"sources": "x"}, "are stale: made with engines of source hash 'x'"),
    ],
)
def test_a_file_of_another_machine_is_refused(change: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        tuned.read(_file(tmp_path / "tuned.json", **change), HERE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engine": "blocks"}, "engine must be one of flash, products, got 'blocks'"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"pass": "sideways"}, "pass must be forward or backward, got 'sideways'"),
        ({"pass": "backward", "engine": "flash"}, "flash cannot make the backward of bfloat16 in float32"),
        ({"dtype": "float16", "computed_in": "float16"}, "products cannot make the forward of float16 in float16"),
    ],
)
def test_a_damaged_file_says_what_is_wrong_with_it(change: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"are damaged: {said}"):
        tuned.read(_file(tmp_path / "tuned.json", ENTRY | change), HERE)


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "none.json"
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    for _ in range(2):  # not only the first call complains
        with pytest.raises(ValueError, match="cannot be read: no such file"):
            choose(F32, "forward")
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged: not JSON"):
        tuned.read(path, HERE)
    path.write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="must be of format 1, got 9"):
        tuned.read(path, HERE)
    monkeypatch.setenv("DSMR_TUNED_FALLBACK", "1")
    with pytest.warns(UserWarning, match="the fixed table is used"):
        assert choose(F32, "forward") == Choice("flash", F32)


def test_what_is_faster_by_more_than_noise_wins() -> None:
    table = {"engine": "flash"}
    rows = [{"engine": "flash", "seconds": [2.0, 4.0]}, {"engine": "products", "seconds": [1.97, 3.95]}]
    assert tune_cpu.winner(rows, table) is None
    rows.append({"engine": "quick", "seconds": [1.0, 3.0]})
    rows.append({"engine": "wrong", "left_out": "out errs by 1, allowed 0.1"})
    assert tune_cpu.winner(rows, table) == {"engine": "quick"}


def test_the_engines_of_this_machine_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a shape of no size: which wins is noise, and what is written is believed here."""
    monkeypatch.setattr(tune_cpu, "SHAPES", (tune_cpu.SMALL,))
    found = tune_cpu.tune(["bfloat16"], rounds=1)
    tried = {(row["pass"], row["engine"], row["computed_in"]) for row in found["measured"] if "seconds" in row}
    assert {("forward", "flash", "float32"), ("backward", "products", "float32")} <= tried
    path = tmp_path / "tuned.json"
    tune_cpu.write(path, tuned.this_machine(), found)
    assert len(tuned.read(path)) == len(found["entries"])
