"""Tuning without a GPU: which configurations are tried, which wins, and which files are believed."""

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton, which is not installed", allow_module_level=True)

from dsmr_kernels import dispatch
from dsmr_kernels.backends.triton import launch, tuned
from dsmr_kernels.backends.triton.configs import Config, choose, from_table, trying
from dsmr_kernels.dispatch import use_tuned
from dsmr_kernels.measured import sealed
from dsmr_kernels.tools import tune
from dsmr_kernels.tools.targets import TARGETS

HERE = {"device": "Some GPU", "torch": "2", "triton": "3", "sources": "abc"}
FASTER = Config(64, 64, 4, 3)
CALL = ("forward", "sm_90", 96, torch.bfloat16)  # padded to 128


@pytest.fixture(autouse=True)
def _the_table_again() -> Iterator[None]:
    use_tuned(None)
    yield
    use_tuned(None)


def _file(path: Path, **change: object) -> Path:
    tune.write(path, HERE, "sm_90", {("forward", 128, "bfloat16"): FASTER}, [{"seconds": [0.1]}])
    if change:
        path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
    return path


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_are_few_distinct_and_may_fit(target: str, dtype: torch.dtype) -> None:
    for kernel in tune.KERNELS:
        for head_dim in (16, 64, 80, 128, 256):
            found = tune.candidates(kernel, target, head_dim, dtype)
            assert found[0] == from_table(kernel, target, head_dim, dtype)
            assert len(found) == len(set(found)) <= 15
            for config in found[1:]:
                assert min(config.bm, config.bn) >= 16
                assert config.stages >= 1
                streamed = config.bm if kernel == "dkv" else config.bn
                assert 2 * streamed * head_dim * dtype.itemsize <= TARGETS[target].shared
    assert len(tune.candidates("forward", "sm_90", 64, torch.bfloat16)) > 4


def test_the_fastest_is_chosen_over_all_shapes() -> None:
    table, quick, uneven, wrong, spills = (Config(16 << i, 16, 4, 1) for i in range(5))
    times = {table: [2.0, 4.0], quick: [1.0, 3.0], uneven: [0.9, 9.0]}

    def seconds(config: Config) -> list[float]:
        if config == wrong:
            raise AssertionError("out errs by 1, allowed 0.1\nand more")
        return times[config]

    choice = tune.select(
        [table, wrong, spills, uneven, quick], lambda config: "spills 8" if config == spills else None, seconds
    )
    assert choice.config == quick
    assert choice.speedup == pytest.approx((2 * 4 / 3) ** 0.5)
    assert [row.get("left_out") for row in choice.measured] == [
        None, "out errs by 1, allowed 0.1", "spills 8", None, None
    ]  # fmt: skip


def test_what_spills_is_tried_again_with_a_limit_of_registers() -> None:
    table, spills, wide, large = (Config(16, 16, *x) for x in ((4, 1), (8, 2), (16, 2), (4, 3)))
    asked = []

    def reasons(configs: list[Config]) -> list[str | None]:
        asked.append(configs)
        return [
            "spills 8" if c.warps > 4 and not c.most_registers else "beyond" if c == large else None for c in configs
        ]

    found = tune.refusals([table, spills, wide, large], "sm_90", reasons)
    again = [replace(spills, most_registers=255), replace(wide, most_registers=128)]
    assert asked == [[table, spills, wide, large], again]
    assert found == {table: None, spills: "spills 8", wide: "spills 8", large: "beyond"} | dict.fromkeys(again)
    assert tune.limited(again[0], "sm_90") is None
    assert tune.limited(spills, "gfx942") is None


def test_noise_does_not_displace_the_table() -> None:
    table, other = Config(16, 16, 4, 1), Config(32, 16, 4, 1)
    choice = tune.select([table, other], lambda config: None, lambda config: [1.0 if config == table else 0.985])
    assert (choice.config, choice.speedup) == (table, 1.0)


def test_a_table_that_cannot_be_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the table's own configuration .* cannot be measured: spills 8"):
        tune.select([Config(16, 16, 4, 1)], lambda config: "spills 8", lambda config: [1.0])


def test_a_file_comes_back_and_is_used_only_when_asked_for(tmp_path: Path) -> None:
    table = choose(*CALL)
    path = _file(tmp_path / "new" / "tuned.json")
    assert tuned.read(path, HERE) == tuned.Tuned("sm_90", {("forward", 128, "bfloat16"): FASTER})
    assert choose(*CALL) == table != FASTER
    use_tuned(path, machine=HERE)
    assert choose(*CALL) == FASTER
    assert choose("forward", "sm_90", 64, torch.bfloat16) == from_table("forward", "sm_90", 64, torch.bfloat16)
    assert choose("forward", "interpreter", 128, torch.bfloat16) != FASTER
    use_tuned(None)
    assert choose(*CALL) == table


def test_the_environment_names_a_file_that_every_way_to_the_kernels_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "this_machine", lambda: HERE)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(dispatch, "_why_no_triton", lambda: None)
    monkeypatch.setattr(dispatch, "_tiles_settled", False)  # as in a process that begins
    monkeypatch.setattr("dsmr_kernels.backends.triton.unsupported", lambda *call: None)
    q = torch.empty(1, 1, 1, 96, dtype=torch.bfloat16)
    monkeypatch.setenv("DSMR_TUNED", str(tmp_path / "none.json"))
    for _ in range(2):  # not only the first call complains
        with pytest.raises(ValueError, match="cannot be read: no such file"):
            dispatch.choose(q, "triton")
    monkeypatch.setenv("DSMR_TUNED", str(_file(tmp_path / "tuned.json")))
    assert choose(*CALL) == from_table(*CALL)
    dispatch.choose(q, "triton")
    assert choose(*CALL) == FASTER


def test_another_gpu_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are for sm_90, this GPU is sm_100"):
        use_tuned(_file(tmp_path / "tuned.json"), machine=HERE, architecture="sm_100")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("device", "made for 'other', here is 'Some GPU'"),
        ("torch", "made with torch 'other', here is '2'"),
        ("triton", "made with Triton 'other', here is '3'"),
        ("sources", "made with kernels of source hash 'other', here is 'abc'"),
    ],
)
def test_a_stale_file_says_what_changed(tmp_path: Path, key: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"are stale: {words}"):
        use_tuned(_file(tmp_path / "tuned.json", **{key: "other"}), machine=HERE)


ENTRY = {"kernel": "forward", "padded_head_dim": 64, "dtype": "float16", "bm": 64, "bn": 64, "warps": 4, "stages": 2}
ENTRY["most_registers"] = 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 7}, "must be of format 1, got 7"),
        ({"entries": [{"kernel": "forward"}]}, "damaged: 'dtype' is missing"),
        ({"entries": [ENTRY | {"bm": 48}]}, "tiles must be powers of two"),
        ({"entries": [ENTRY | {"warps": 64}]}, "tiles must be powers of two"),
        ({"entries": [ENTRY | {"stages": 0}]}, "must be positive integers"),
        ({"entries": [ENTRY | {"bn": "64"}]}, "must be positive integers"),
        ({"entries": [ENTRY | {"most_registers": 31}]}, "most_registers must be 0 or an integer from 32 to 255"),
        ({"entries": [ENTRY | {"most_registers": 256}]}, "most_registers must be 0 or an integer from 32 to 255"),
        ({"entries": [ENTRY | {"dtype": "int8"}]}, "dtype must be one of float16"),
        ({"entries": 3}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        use_tuned(_file(tmp_path / "tuned.json", **change), machine=HERE)
    assert "\n" not in str(refused.value)


def test_half_a_file_is_refused_and_falls_back_only_if_told(tmp_path: Path) -> None:
    path = _file(tmp_path / "tuned.json")
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="damaged: not JSON"):
        use_tuned(path, machine=HERE)
    with pytest.warns(UserWarning, match=r"damaged: not JSON.*; the fixed table is used"):
        use_tuned(path, machine=HERE, fallback=True)
    assert choose(*CALL) == from_table(*CALL)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter serves where there is no GPU")
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_a_configuration_is_checked_and_timed_through_the_interpreter(kernel: str) -> None:
    shapes, cpu = [tune.Shape(1, 1, 9, 20, 2)], torch.device("cpu")
    found = tune.measure(kernel, Config(32, 16, 4, 1), shapes, 16, torch.float32, cpu)
    assert len(found) == len(shapes)
    assert all(0 < seconds < 10 for seconds in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter serves where there is no GPU")
def test_a_configuration_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case: object, backend: str) -> None:
        raise AssertionError("triton: out errs by 1")

    monkeypatch.setattr(tune, "assert_agrees_with_oracle", wrong)
    monkeypatch.setattr(tune, "kernel_seconds", lambda *_: pytest.fail("was timed"))
    with pytest.raises(AssertionError, match="errs by 1"):
        tune.measure("dq", Config(16, 16, 4, 1), [tune.Shape(1, 2, 8, 5)], 16, torch.float32, torch.device("cpu"))


def test_a_trial_ends_with_its_block() -> None:
    with trying("forward", FASTER):
        assert choose("forward", "interpreter", 16, torch.float32) == FASTER
    assert choose("forward", "interpreter", 16, torch.float32) != FASTER


def test_sources_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tuned._sources()
    for name in ("forward.forward_kernel", "backward.dkv_kernel", "primitives.lowest_visible", "step.step_kernel"):
        assert f"dsmr_kernels.backends.triton.{name}" in sources
    before = tuned.kernel_sources()
    assert tuned.this_machine()["sources"] == before
    for name in sources:
        monkeypatch.setattr(tuned, "_sources", lambda name=name: sources | {name: sources[name] + "#"})
        assert tuned.kernel_sources() != before


def test_no_module_with_a_kernel_is_left_out_of_the_hash() -> None:
    room = Path(tuned.__file__).parent
    decorated = {path.stem for path in room.glob("*.py") if re.search(r"^@(triton|gluon)\.jit", path.read_text(), re.M)}
    hashed = {name.split(".")[-2] for name in tuned._sources() if name != "RUNTIME"}
    assert {"bias", "forward", "hopper"} <= decorated
    assert hashed == decorated - set(tuned.APART)
    assert set(tuned.APART) <= decorated


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--out", str(tmp_path / "tuned.json")]) == 1
    said = capsys.readouterr().err.strip()
    assert said == "tune measures on a GPU, and there is none here; the fixed table needs no tuning"
    assert not list(tmp_path.iterdir())
