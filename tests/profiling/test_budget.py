"""`dsmr budget`: the table agrees with the formula of DESIGN, with the bytes allocated, and with itself."""

import json

import pytest
import torch

from dsmr.console.errors import UserError
from dsmr.model.schedule import MemorySchedule
from dsmr.profiling.budget_table import budget_of, human_count
from dsmr_kernels import KVMemory

TWO_SCALE = "two_scale(layers=8, long=4096, short=512, n_long=2)"


def test_bytes_follow_the_formula():
    found = budget_of(TWO_SCALE, n_heads=8, head_dim=64, dtype="bfloat16", batch=3)
    assert found.bytes == 2 * 3 * 64 * 2 * (2 * 4096 * 8 + 6 * 512 * 8)
    assert found.bytes == sum(row.bytes for row in found.layers)
    assert found.full_bytes == 2 * 3 * 64 * 2 * 8 * 4096 * 8
    assert found.bytes_ratio == pytest.approx((2 * 4096 + 6 * 512) / (8 * 4096))
    assert budget_of(TWO_SCALE, dtype="float32").bytes == 2 * budget_of(TWO_SCALE).bytes


def test_bytes_are_those_that_a_model_allocates():
    from dsmr.model.config import DSMRConfig
    from dsmr.model.transformer import DSMRModel

    schedule = "explicit(horizons=[33, 7, 0], kv_heads=[2, 1, 4])"
    model = DSMRModel(DSMRConfig(11, schedule, d_model=32, n_heads=4, segment_length=16))
    found = budget_of(schedule, n_heads=4, head_dim=8, dtype="float32", batch=3)
    assert model.new_state(3, aligned=True).nbytes == found.bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_bytes_are_those_of_a_memory_in_any_dtype(dtype):
    found = budget_of("full(layers=1, length=100)", n_heads=2, head_dim=64, dtype=dtype)
    assert KVMemory.empty(1, 2, 100, 64, dtype=getattr(torch, dtype)).nbytes == found.bytes


def test_flops_add_up_and_full_memory_has_ratio_one():
    found = budget_of(TWO_SCALE)
    assert found.flops_per_token == pytest.approx(sum(row.flops_per_token for row in found.layers))
    assert 0 < found.flops_ratio < 1
    full = budget_of("full(layers=3, length=100)")
    assert full.bytes_ratio == full.flops_ratio == 1.0
    none = budget_of("none(layers=3)")
    assert none.bytes == 0
    assert none.bytes_ratio == 1.0


def test_few_kv_heads_save_bytes_but_no_flops():
    wide, narrow = budget_of("full(layers=2, length=64)"), budget_of("fhcr(layers=2, length=64)")
    assert narrow.bytes * 4 == wide.bytes
    assert narrow.bytes_ratio == 0.25
    assert narrow.flops_per_token == wide.flops_per_token


def test_the_table_and_the_json_say_the_same():
    from rich.console import Console

    found = budget_of(MemorySchedule.parse(TWO_SCALE))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(found.table())
    text = capture.get()
    assert "4,096" in text
    assert "0.344" in text
    value = json.loads(json.dumps(found.to_json()))
    assert value["bytes"] == found.bytes
    assert [row["horizon"] for row in value["layers"]] == [4096, 4096] + [512] * 6
    assert value["bytes_ratio"] == pytest.approx(0.34375)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"dtype": "int3"}, "unknown dtype 'int3'"), ({"n_heads": 3}, "3 heads must be a multiple of kv_heads")],
)
def test_what_cannot_be_is_a_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        budget_of("fhcr(layers=2, length=64)", **arguments)


def test_counts_are_readable():
    assert [human_count(count) for count in (7, 1500, 12.6e6, 3e9)] == ["7", "1.5 k", "12.6 M", "3.0 G"]


def test_what_a_layer_keeps_stands_in_the_table_where_it_is_not_the_newest() -> None:
    plain, sampled = (budget_of(f"uniform(layers=2, horizon=64{more})") for more in ("", ", retention=random"))
    assert (sampled.bytes, sampled.flops_per_token) == (plain.bytes, plain.flops_per_token)
    assert [row.retention for row in sampled.layers] == ["random"] * 2
    names = [[str(column.header) for column in found.table().columns] for found in (plain, sampled)]
    assert names[1] == [*names[0], "kept"]
