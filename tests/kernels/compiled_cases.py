"""The Triton kernels as compiled for a GPU, with the tiles of the table, on the machine of `virtual_gpu`.

    DSMR_VIRTUAL_GPU=sm_90 python -m pytest tests/kernels/compiled_cases.py

`test_compiled.py` runs a sample of it for sm_90 and sm_80, and all of it by hand. The variable works with the other
tests of the Triton kernels, too. An access out of bounds or out of line, a race, or anything asynchronous used too
early fails here.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from attention_cases import pieces
from guard import Buffers, guarded, surrounded_case

from dsmr_kernels import KVMemory, append_rotated, decode_attention
from dsmr_kernels.cases import filled_memory, random_case
from dsmr_kernels.testing import assert_agrees_with_oracle, run, run_plain
from dsmr_kernels.tolerance import allowed_error, error
from dsmr_kernels.trial import disagreement

if not os.environ.get("DSMR_VIRTUAL_GPU"):
    pytest.skip("set DSMR_VIRTUAL_GPU to a part, for example sm_90", allow_module_level=True)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def buffers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buffers]:
    yield from guarded(monkeypatch)


@pytest.mark.parametrize(
    "options",
    [
        {"stored": torch.int8, "lse_gradient": True, "v_head_dim": 32, "segment_offset": torch.tensor([9, 3])},
        {"learning": "k", "v_head_dim": 70},
        {"learning": "v"},
        {"biased": True, "segment_offset": torch.tensor([9, 3])},
        {"biased": True, "stored": torch.int8, "learning": "b", "alibi_slopes": torch.tensor([0.5, 0.1])},
    ],
    ids=[
        "int8, gradient of lse, values narrower, offsets",
        "keys alone, values wider",
        "values alone",
        "bias",
        "bias alone, int8",
    ],
)
def test_what_else_a_call_may_be_told(options: dict) -> None:
    sizes = {"head_dim": 64, "heads": 2, "kv_heads": 1, "queries": 40, "seen": [57, 30], "capacity": 40, "horizon": 30}
    assert_agrees_with_oracle(random_case(**sizes, segment_length=16, dtype=BF16, **options), "triton")


EVERYTHING = {
    "heads": 2,
    "kv_heads": 1,
    "queries": 140,
    "tokens": 150,
    "capacity": 90,
    "seen": [230, 17],
    "horizon": 80,
    "segment_length": 60,
    "segment_offset": 7,
    "piece_start": pieces([-1] * 70 + [70] * 80, [0] * 5 + [5] * 145),
    "alibi_slopes": torch.tensor([0.5, 0.1]),
}


@pytest.mark.parametrize(("visibility", "detached"), [("segment", True), ("sliding", False)])
def test_everything_at_once(visibility: str, detached: bool) -> None:
    """Ring wrapped and part full, groups, more keys than queries, segments, pieces, ALiBi; NaN around every tensor."""
    case = random_case(head_dim=64, dtype=BF16, visibility=visibility, detach_segments=detached, **EVERYTHING)
    exact, plain = run(case.to(torch.float64), "reference"), run_plain(case)
    for name, x in run(surrounded_case(case), "triton").items():
        assert error(x, exact[name]) <= allowed_error(name, plain[name], exact[name], BF16), name


@pytest.mark.parametrize(
    ("head_dim", "dtype", "sizes"),
    [
        (128, BF16, {"queries": 150, "capacity": 150, "seen": [170], "horizon": 150}),
        (64, BF16, {"queries": 200}),
        (40, F16, {"queries": 70, "capacity": 50, "seen": [77], "horizon": 30, "segment_length": 32}),
        (16, BF16, {"queries": 65, "capacity": 64, "seen": [64]}),
        (256, BF16, {"queries": 65, "capacity": 40, "seen": [50], "horizon": 40}),
        (64, F32, {"queries": 33, "capacity": 40, "seen": [50], "horizon": 40}),
    ],
    ids=["128", "64, no memory", "40, float16", "16", "256", "64, float32"],
)
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype, sizes: dict) -> None:
    case = random_case(
        **{"batch": 1, "heads": 2, "kv_heads": 1, "horizon": 64, **sizes}, head_dim=head_dim, dtype=dtype
    )
    assert_agrees_with_oracle(case, "triton")


@pytest.mark.parametrize(
    "options",
    [{"stored": torch.int8, "lse_gradient": True, "visibility": "sliding"}, {"v_head_dim": 32}],
    ids=["int8, gradient of lse, sliding", "values narrower"],
)
def test_tiles_that_programs_share(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmr_kernels.backends.triton import configs, training

    monkeypatch.setattr(training, "LEAST_KEYS", 64)
    monkeypatch.setattr(training, "LEAST_QUERIES", 64)
    monkeypatch.setattr(configs, "generation", configs.generation + 1)  # what is kept was worked out by other rules
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "queries": 70, "seen": [230], "capacity": 110, "horizon": 110}
    assert_agrees_with_oracle(random_case(**sizes, head_dim=64, dtype=BF16, **options), "triton")


@pytest.mark.parametrize("stored", [BF16, torch.int8], ids=["as computed", "int8"])
@pytest.mark.parametrize(
    ("new", "group", "dtype"), [(1, 2, BF16), (5, 8, BF16), (3, 2, F16)], ids=["one", "five", "three, float16"]
)
def test_storing_and_decoding(new: int, group: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Both kernels of decoding and the sum of their splits, over a ring that is wrapped in one row only."""
    stored = dtype if stored.is_floating_point else stored
    memory = filled_memory(2, 2, 300, 64, [513, 40]).to(dtype=stored)
    other = memory.clone()
    q, k, v = (torch.randn(2, heads, new, 64).to(dtype) for heads in (2 * group, 2, 2))
    cos, sin = torch.randn(2, 2, 1, new, 32)
    turned = append_rotated(q, k, v, memory, cos=cos, sin=sin, backend="triton")
    assert torch.equal(turned, append_rotated(q, k, v, other, cos=cos, sin=sin, backend="reference"))
    for name, x in memory.tensors().items():
        assert torch.equal(x, getattr(other, name)), name
    visible = torch.tensor([200, 40], dtype=torch.int32)
    held = KVMemory(*memory.values(torch.float32), memory.length, memory.position).to(dtype=torch.float64)
    more = {"alibi_slopes": torch.rand(2 * group), "sinks": torch.rand(2 * group)}
    bias = {"distance_bias": torch.randn(2 * group, 3), "distance_buckets": torch.tensor([0, 1, 1, 2])}
    for options in ({}, {"visible": visible, **more}, {"visible": visible, **bias}):
        out = decode_attention(turned, memory, backend="triton", **options)
        exact = decode_attention(turned.double(), held, backend="reference", **options)
        assert error(out, exact) <= 8 * torch.finfo(dtype).eps * float(held.v.abs().max())


def test_the_trial_of_a_gpu_passes() -> None:
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert disagreement(torch.device("cpu"), 64, BF16) is None
    assert torch.equal(torch.get_rng_state(), before)  # or a resumed run would not be the one that was killed
