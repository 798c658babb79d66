"""The plan for machines that are not here: its arithmetic, held against figures that are easy to reckon with."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from known_ceilings import KNOWN

from dsmr.console.errors import UserError
from dsmr.model.config import DSMRConfig
from dsmr.model.schedule import MemorySchedule
from dsmr.model.transformer import DSMRModel
from dsmr.profiling.cost import least_bytes, parameters_of, predict_step
from dsmr.profiling.job import Sizes
from dsmr.profiling.planning import H100, HOST, Links, buckets, gradients, main, parts, plan, sent_by
from dsmr_kernels.costing.cost import Call
from dsmr_kernels.costing.predict import attention_seconds

SCHEDULE = MemorySchedule.parse("two_scale(layers=4, long=256, short=64, n_long=1)")
SIZES = Sizes(d_model=64, heads=2, segment_length=32, vocab_size=100, dtype="bfloat16")
FREE = Links(math.inf, math.inf, 0.0, 0.0, 0.0)
PLAIN = Links(within=100.0, between=10.0, begin_within=0.0, begin_between=0.0, begin_host=1.0)


def planned(nodes: int, batch: int, links: Links, **more):
    asked = {"tokens": 1e6, "epochs": 2.0, "ceilings": KNOWN, "host": replace(KNOWN, operator_seconds=0.0), **more}
    return plan(SIZES, SCHEDULE, nodes=nodes, batch=batch, links=links, **asked)


def test_a_sum_over_gpus_sends_what_the_ring_sends():
    assert PLAIN.all_reduce(400.0, 1, 1) == 0.0
    assert PLAIN.all_reduce(400.0, 4, 1) == pytest.approx(2 * 3 / 4 * 400 / 100)
    assert PLAIN.all_reduce(400.0, 1, 4) == pytest.approx(2 * 3 / 4 * 400 / 10)
    assert PLAIN.all_reduce(400.0, 4, 2) == pytest.approx(6.0 + 2 * 1 / 2 * 100 / 10)  # each GPU has a quarter of it
    begun = replace(PLAIN, begin_within=1.0, begin_between=10.0)
    assert begun.all_reduce(0.0, 2, 8) == 2 * 1.0 + 2 * 3 * 10.0
    assert [PLAIN.meeting(ranks) for ranks in (1, 2, 512)] == [0, 2, 18]


def test_buckets_are_filled_in_order_and_sent_one_after_another():
    mebibyte = 2.0**20
    found = buckets([(mebibyte, 1.0), (20 * mebibyte, 2.0), (10 * mebibyte, 3.0), (mebibyte, 4.0)])
    assert found == [(mebibyte, 1.0), (30 * mebibyte, 3.0), (mebibyte, 4.0)]
    links = replace(PLAIN, between=2 * mebibyte)  # two GPUs alone in their nodes: 2 * 1 / 2 bytes for a byte
    assert sent_by(found, links, 1, 2) == pytest.approx(max(max(1 + 0.5, 3) + 15, 4) + 0.5)
    assert sent_by(found, FREE, 8, 64) == 4.0


def test_gradients_are_those_of_all_parameters_and_end_with_the_backward():
    sizes = replace(SIZES, batch=2)
    step = predict_step(sizes, SCHEDULE, "train", KNOWN)
    found = gradients(step, sizes, SCHEDULE)
    model = DSMRModel(DSMRConfig(100, SCHEDULE, d_model=64, n_heads=2, segment_length=32))
    assert sum(size for size, _ in found) == pytest.approx(4 * parameters_of(sizes, SCHEDULE))
    assert parameters_of(sizes, SCHEDULE) == sum(p.numel() for p in model.parameters())
    assert found[-1][1] == pytest.approx(step.seconds("backward"))
    assert [second for _, second in found] == sorted(second for _, second in found)


def test_without_communication_a_step_takes_what_the_cost_model_says():
    found = planned(2, 32, FREE)
    sizes = replace(SIZES, batch=2)
    step = predict_step(sizes, SCHEDULE, "train", KNOWN)
    assert found.step == found.compute == pytest.approx(sum(map(step.seconds, ("forward", "backward", "step"))))
    assert found.waiting == found.meeting == 0.0
    assert (found.gpus, found.rows_a_gpu, found.share_of_compute) == (16, 2, 1.0)
    assert found.tokens_per_second == pytest.approx(32 * 32 / found.step)
    assert found.steps_an_epoch == math.ceil(1e6 / (32 * 32))
    assert found.hours == pytest.approx(2 * found.steps_an_epoch * found.step / 3600)
    assert planned(4, 64, FREE).tokens_per_second == pytest.approx(2 * found.tokens_per_second)


def test_shards_wait_for_weights_that_computing_does_not_hide():
    """Free links cost nothing; at links that take far longer than computing, nothing but sending is left: the weights
    of each layer twice and its gradients once, what is around the layers there and back."""
    assert planned(2, 16, FREE, parallel="fsdp").step == pytest.approx(planned(2, 16, FREE).step)
    slow = replace(PLAIN, within=math.inf, between=1.0)
    found = planned(2, 16, slow, parallel="fsdp", gpus=1)
    layer, around = parts(SIZES, SCHEDULE)
    assert 4 * layer + around == pytest.approx(4 * parameters_of(SIZES, SCHEDULE))
    assert found.waiting == pytest.approx(slow.gather(3 * 4 * layer + 2 * around, 1, 2), rel=1e-3)
    assert found.sent_bytes == pytest.approx(1.5 * planned(2, 16, slow, gpus=1).sent_bytes)


def test_shards_save_weights_and_no_memories():
    whole, parted = (planned(64, 512, FREE, parallel=way) for way in ("ddp", "fsdp"))
    layer, around = parts(SIZES, SCHEDULE)
    saved = 16 * parameters_of(SIZES, SCHEDULE) * 511 / 512 - 3 * layer - 2 * around
    assert whole.gpu_bytes - parted.gpu_bytes == pytest.approx(saved)
    assert whole.state_bytes == parted.state_bytes
    assert planned(1, 8, FREE, gpus=1, parallel="fsdp").gpu_bytes == planned(1, 8, FREE, gpus=1).gpu_bytes


def test_memory_is_the_models_own_and_the_state_is_that_of_all_rows():
    found = planned(1, 16, FREE)
    assert found.gpu_bytes == least_bytes(replace(SIZES, batch=2), SCHEDULE, "train")
    model = DSMRModel(DSMRConfig(100, SCHEDULE, d_model=64, n_heads=2, segment_length=32))
    assert 2 * found.state_bytes == model.new_state(16, aligned=True).nbytes  # in float32, twice as much
    assert found.fits
    assert not planned(1, 2**22, FREE).fits


def test_slow_links_and_slow_hosts_cost_what_they_cannot_hide():
    fast, slow = planned(2, 32, FREE), planned(2, 32, replace(FREE, between=1e3))
    size = 4 * parameters_of(SIZES, SCHEDULE)
    assert slow.sent_bytes == pytest.approx(2 * 15 / 16 * size)
    assert slow.waiting >= 2 * 1 / 2 * size / 8 / 1e3 - fast.compute
    assert slow.step == pytest.approx(fast.compute + slow.waiting)
    host = replace(HOST, operator_seconds=1.0)
    assert planned(2, 32, FREE, host=host).step == planned(2, 32, FREE, host=host).host > fast.step


def test_the_rates_take_attention_as_long_as_was_measured():
    """benchmarks/results/nvidia-h100-80gb-hbm3.md: milliseconds of the GPU's own time: head_dim, forward, backward."""
    for head_dim, forward, backward in ((128, 1.254, 1.733), (64, 0.752, 1.025)):
        call = Call(1024, 8192, held=8192, segment_length=1024, batch=8, heads=16, kv_heads=16, head_dim=head_dim)
        found = attention_seconds(replace(call, bytes_per_element=2), H100, "bfloat16")
        assert [1e3 * seconds for seconds in found] == pytest.approx([forward, backward], rel=0.05)


def test_what_cannot_be_planned_is_refused_in_a_sentence(capsys):
    with pytest.raises(UserError, match="a batch of 12 rows cannot be dealt evenly to 8 GPUs"):
        planned(1, 12, FREE)
    for options, sentence in (
        (["--hours", "nan"], "hours must be above 0"),
        (["--nodes", "0"], "nodes and batch-size must be at least 1"),
        (["--d-model", "-4"], "d_model"),
        (["--schedule", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(options)
        assert caught.value.code == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.slow  # PyTorch starts
def test_the_command_names_its_assumptions(tmp_path: Path):
    path = tmp_path / "plan.json"
    command = [sys.executable, "-m", "dsmr.profiling.planning", "--hours", "10", "--json", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in ("10 hours of music are 1 M tokens (35 a second)", "NVLink", "400", "all GPUs are equally fast"):
        assert part in said
    written = json.loads(path.read_text())
    assert [(row["nodes"], row["batch"]) for row in written["plans"]] == [(1, 512), (64, 512), (1, 4096), (64, 4096)]
    assert len(written["assumptions"]) == 6
