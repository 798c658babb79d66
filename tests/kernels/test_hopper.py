"""The forwards with tensor descriptors: they serve where they were asked for and have agreed with the oracle, nowhere
else; their way over the keys is right, in Triton's interpreter; and what they are compiled to for Hopper is clean."""

import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import gluon_machine
import pytest
import torch

from dsmr_kernels import dispatch, trial
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.spec import AttentionSpec, Inputs
from dsmr_kernels.testing import assert_agrees_with_oracle

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton and its interpreter", allow_module_level=True)

from dsmr_kernels.backends import reference
from dsmr_kernels.backends.triton import bulk
from dsmr_kernels.backends.triton.training import bounded

PLAIN = bulk.Tile(0, 16, 1)  # the kernel that the interpreter can run, and that shares the index arithmetic


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_hopper_disagreements", {})
    monkeypatch.setattr(bulk, "serving", set())


def inputs(case: Case, **options: Any) -> Inputs:
    spec = AttentionSpec(
        **{"horizon": 40, "segment_length": None, "segment_offset": 0, "visibility": "segment"},
        **{"detach_segments": True, "scale": 0.125, "return_lse": True},
    )
    spec = spec._replace(**{name: options.pop(name) for name in list(options) if name in spec._fields})
    call = Inputs(case.q, case.k, case.v, case.memory, None, None, None, None, None, spec)
    return call._replace(**options)


def half(**options: Any) -> Case:
    return random_case(**({"head_dim": 64, "dtype": torch.float16, "seen": [50, 9], "queries": 5} | options))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"visibility": "sliding"}, "visibility by segment, not 'sliding'"),
        ({"alibi": torch.ones(4)}, "no pieces, ALiBi, bias or offsets"),
        ({"piece_start": torch.zeros(2, 5)}, "no pieces, ALiBi, bias or offsets"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, "no pieces, ALiBi, bias or offsets"),
        ({"memory": None}, None),
    ],
    ids=str,
)
def test_other_calls_are_left_to_the_other_kernels(change: dict[str, Any], said: str | None) -> None:
    found = bulk.unsupported(inputs(half(), **change))
    assert found is said if said is None else said in str(found)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (half(head_dim=80), "a head_dim of 64 or 128, of values as of keys, not 80 and 80"),
        (half(v_head_dim=128), "not 64 and 128"),
        (half(dtype=torch.float32), "not in torch.float32"),
        (half(stored=torch.int8), "a memory in the dtype of the call"),
    ],
    ids=["head_dim", "v_head_dim", "float32", "int8"],
)
def test_other_dtypes_and_head_dims_are_left_to_the_other_kernels(case: Case, said: str) -> None:
    assert said in str(bulk.unsupported(inputs(case)))


def test_what_a_descriptor_cannot_point_at_is_left_to_the_other_kernels() -> None:
    case = half()
    odd = torch.zeros(2, 2, 5, 65, dtype=torch.float16)[..., :64]
    shifted = torch.zeros(2 * 2 * 5 * 64 + 1, dtype=torch.float16)[1:].view(2, 2, 5, 64)
    spread = case.k[:, :1].expand(2, 2, 5, 64)
    for k in (odd, shifted, spread):
        assert "multiples of 16 bytes" in str(bulk.unsupported(inputs(case, k=k)))
    turned = torch.zeros(2, 5, 2, 64, dtype=torch.float16).transpose(1, 2)  # as a projection leaves it
    assert bulk.unsupported(inputs(case, k=turned, v=turned)) is None


def test_nothing_is_served_unasked() -> None:
    assert bulk.tile_for(inputs(half())) is None
    with bulk.trying(PLAIN):
        assert bulk.tile_for(inputs(half())) == PLAIN
        assert bulk.tile_for(inputs(half(), visibility="sliding")) is None
    assert bulk.tile_for(inputs(half())) is None


def test_grids_that_share_tiles_are_left_to_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    bulk.serving.add(("cpu", 64, torch.float16))
    programs = 2 * 4  # batch and heads; one tile of queries each
    monkeypatch.setattr(bulk, "processors", lambda device: programs)
    assert bulk.tile_for(inputs(half())) == bulk.TABLE[64]
    monkeypatch.setattr(bulk, "processors", lambda device: programs + 1)
    assert bulk.tile_for(inputs(half())) is None


@pytest.mark.parametrize("reason", [None, "AssertionError: out errs by 2"])
def test_asked_for_it_serves_after_its_trial_and_not_before(
    reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def disagreement(device: torch.device, head_dim: int, dtype: torch.dtype, biased: bool = False) -> str | None:
        assert bulk.tile_for(inputs(half())) == bulk.TABLE[64]  # the trial is of these kernels
        tried.append((str(device), head_dim, dtype))
        return reason

    monkeypatch.setattr(trial, "disagreement", disagreement)
    monkeypatch.setattr(bulk, "available", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    q = half().q
    dispatch.choose(q, "triton")
    assert not tried
    assert not bulk.serving
    monkeypatch.setenv("DSMR_HOPPER", "1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert dispatch.choose(q, "triton") is dispatch.choose(q, "triton")
    assert tried == [("cpu", 64, torch.float16)]
    assert bulk.serving == (set() if reason else {("cpu", 64, torch.float16)})
    assert len(said) == bool(reason)
    if reason:
        assert "fail on cpu at a head_dim of 64 in float16, and the other Triton kernels" in str(said[0].message)
        assert reason in str(said[0].message)


def test_asked_for_elsewhere_than_on_hopper_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSMR_HOPPER", "1")
    with pytest.warns(UserWarning, match=r"they are for compute capability 9\.x, this is interpreter"):
        dispatch.choose(half().q, "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(half().q, "triton")
        dispatch.choose(random_case(head_dim=32).q, "triton")  # none of theirs
    assert not bulk.serving


# Rings that are wrapped, full, part full, nearly empty and empty; segments that end within a tile; odd sizes.
WALKS: dict[str, dict[str, Any]] = {
    "wrapped": {"queries": 19, "capacity": 40, "seen": [57, 40], "horizon": 40},
    "few tokens held": {"queries": 7, "capacity": 40, "seen": [5, 23], "horizon": 40},
    "a short horizon": {"queries": 9, "capacity": 40, "seen": [30, 70], "horizon": 6},
    "segments": {"queries": 35, "capacity": 40, "seen": [57, 3], "horizon": 20, "segment_length": 8},
    "an offset": {"queries": 20, "capacity": 33, "seen": [50, 0], "horizon": 20, "segment_length": 12,
                  "segment_offset": 5},
    "no memory": {"queries": 37, "horizon": 10, "segment_length": 16},
    "fewer queries than tokens": {"queries": 5, "tokens": 30, "capacity": 20, "seen": [25, 20], "horizon": 20},
}  # fmt: skip


@pytest.mark.slow  # the interpreter takes seconds for each
@pytest.mark.parametrize("name", WALKS)
def test_the_walk_over_the_keys_agrees_with_the_oracle(name: str) -> None:
    case = random_case(head_dim=64, dtype=torch.float16, **WALKS[name])
    with bulk.trying(PLAIN):
        assert_agrees_with_oracle(case, "triton")


def unseen_are_nan(case: Case) -> Case:
    """The case with NaN in every slot of the memory that is not held."""
    memory = case.memory
    assert memory is not None
    held = torch.zeros(memory.k.shape[0], memory.capacity, dtype=torch.bool)
    for row, (length, position) in enumerate(zip(memory.length.tolist(), memory.position.tolist(), strict=True)):
        held[row, (position - 1 - torch.arange(length)) % memory.capacity] = True
    for x in (memory.k, memory.v):
        x.masked_fill_(~held[:, None, :, None], torch.nan)
    return case


@pytest.mark.slow
@pytest.mark.parametrize("seen", [[5, 23], [16, 1]], ids=str)
def test_what_a_row_does_not_hold_never_takes_part(seen: list[int]) -> None:
    case = random_case(queries=7, capacity=40, head_dim=64, horizon=40, seen=seen, dtype=torch.float16)
    assert case.memory is not None
    case.memory.position += 80  # so that what is held lies between rows that are not, on either side
    case.memory.length.clamp_(max=9)
    with bulk.trying(PLAIN):
        assert_agrees_with_oracle(unseen_are_nan(case), "triton")


@pytest.mark.slow  # a kernel to compile, some seconds
@pytest.mark.parametrize("head_dim", bulk.HEAD_DIMS)
def test_what_serves_compiles_clean_for_hopper(head_dim: int) -> None:
    code = (
        "from dsmr_kernels.backends.triton import bulk\n"
        "from dsmr_kernels.tools.hopper import compile_tile\n"
        f"found = compile_tile(bulk.TABLE[{head_dim}], {head_dim})\n"
        "print(found)\nassert not found.faults, found\nassert max(found.limits) >= 240, found"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow  # another Python, which imports PyTorch
def test_importing_the_triton_room_imports_no_gluon_kernel() -> None:
    code = "import sys, dsmr_kernels.backends.triton; print('dsmr_kernels.backends.triton.hopper' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert result.stdout.strip() == "False"


MACHINE: dict[str, dict[str, Any]] = {
    "wrapped": {"queries": 150, "capacity": 900, "seen": [1257], "horizon": 900},
    "few tokens held": {"queries": 30, "capacity": 200, "seen": [150], "horizon": 200},
    "segments": {"queries": 200, "capacity": 150, "seen": [170], "horizon": 150, "segment_length": 60},
    "no memory": {"queries": 300, "horizon": 64, "segment_length": 300},
}
TILES = {name: tile for name, tile in bulk.CANDIDATES.items() if tile.consumers}
SERVES = next(name for name, tile in TILES.items() if tile == bulk.TABLE[64])


@pytest.mark.slow  # threads that wait for one another, in the place of a GPU
@pytest.mark.parametrize(
    ("name", "tile"),
    [("wrapped", tile) for tile in TILES] + [(name, SERVES) for name in MACHINE if name != "wrapped"],
)
def test_partitions_agree_on_their_stages(name: str, tile: str) -> None:
    case = random_case(batch=1, heads=1, kv_heads=1, head_dim=64, dtype=torch.float16, **MACHINE[name])
    if case.memory is not None:
        if name == "few tokens held":
            case.memory.length.fill_(9)
        unseen_are_nan(case)
    wanted = case.to(torch.float64).computed_by(reference.memory_attention)
    for x, what in zip(computed_by_the_machine(case, TILES[tile]), ("out", "lse"), strict=True):
        torch.testing.assert_close(x, wanted[what].to(x.dtype), rtol=4e-3, atol=4e-3)


def computed_by_the_machine(case: Case, tile: bulk.Tile) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse by the Gluon kernel's source, launched as `bulk.forward` launches it."""
    call = inputs(case, **case.options)
    out, lse = torch.full_like(case.q, torch.nan), torch.full(case.q.shape[:3], torch.nan)

    class Kernel:
        def __getitem__(self, grid: tuple[int, int, int]) -> Any:
            def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
                assert num_warps == 4
                gluon_machine.run(arguments[:9], arguments[9:], grid[0], **constants)

            return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bulk, "_descriptor", lambda x, tile: gluon_machine.Descriptor(x, tile.bn))
        patch.setitem(sys.modules, "dsmr_kernels.backends.triton.hopper", SimpleNamespace(hopper_kernel=Kernel()))
        memory = case.memory
        bulk.forward(
            call, tile, bounded(call.spec, case.k.shape[2], 0 if memory is None else memory.capacity), out, lse
        )
    return out, lse
