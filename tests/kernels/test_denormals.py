"""Numbers below the least normal one count as zero in attention on a CPU and in training, and nowhere behind them."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import tiny_corpus

from dsmr.runs.settings import TrainConfig
from dsmr.training import loop
from dsmr_kernels import KVMemory, memory_attention
from dsmr_kernels.backends.sdpa import workers
from dsmr_kernels.backends.sdpa.workers import in_parallel, without_denormals
from dsmr_kernels.denormals import WithoutDenormals

SUPPORTED = torch.set_flush_denormal(False)
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="this processor always counts them")
LEAST = torch.finfo(torch.float32).tiny


def counts() -> bool:
    """Whether this thread counts a number below the least normal one."""
    return float(torch.tensor([LEAST]) * 0.5) != 0.0


def test_a_thread_goes_back_to_what_it_did() -> None:
    assert counts()
    with WithoutDenormals():
        assert not counts()
        with WithoutDenormals():
            assert not counts()
        assert not counts()
    assert counts()
    torch.set_flush_denormal(True)
    try:
        with WithoutDenormals():
            assert not counts()
        assert not counts()  # the caller's own setting stays
    finally:
        torch.set_flush_denormal(False)


def test_it_ends_where_something_fails() -> None:
    with pytest.raises(ZeroDivisionError), without_denormals():
        raise ZeroDivisionError
    assert counts()


@pytest.mark.skipif(workers._region() is None, reason="PyTorch's threads cannot be asked here")
def test_all_of_pytorchs_threads_do_and_go_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.full((1 << 20,), LEAST)  # both threads multiply
        assert int((large * 0.5).count_nonzero()) == large.numel()
        with without_denormals():
            assert int((large * 0.5).count_nonzero()) == 0
        assert int((large * 0.5).count_nonzero()) == large.numel()
        seen: list[bool] = []
        in_parallel(lambda _: seen.append(counts()), range(16))
        assert seen == [False] * 16
        assert int((large * 0.5).count_nonzero()) == large.numel()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(workers._region() is None, reason="PyTorch's threads cannot be asked here")
def test_a_thread_that_is_no_longer_asked_goes_back_too() -> None:
    """And works again later."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.full((1 << 20,), LEAST)
        with without_denormals():
            torch.set_num_threads(1)
        torch.set_num_threads(2)
        assert int((large * 0.5).count_nonzero()) == large.numel()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(workers._region() is None, reason="PyTorch's threads cannot be asked here")
@pytest.mark.parametrize("how", ["attention", "training"])
def test_threads_that_are_made_within_do_not_keep_it(how: str) -> None:
    """In a process of its own, which has none until then; 96 queries are too few for a region, not for operators."""
    program = f"""if True:
        import torch
        from dsmr_kernels import memory_attention
        from dsmr_kernels.backends.sdpa.workers import without_denormals
        torch.set_num_threads(2)
        large = torch.empty(1 << 20)
        if {how!r} == "attention":
            q = torch.randn(4, 8, 96, 64, requires_grad=True)
            memory_attention(q, q, q, horizon=0, backend="sdpa").sum().backward()
        else:
            with without_denormals():
                large.fill_(1.0)
        large.fill_({LEAST})
        print(int((large * 0.5).count_nonzero()))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_short_call_in_a_forked_process_asks_no_threads() -> None:
    """They are gone there, and who asks them waits for ever."""
    program = """if True:
        import os, torch
        from dsmr_kernels import memory_attention
        torch.set_num_threads(2)
        torch.ones(1 << 22).add_(1)
        child = os.fork()
        if child == 0:
            q = torch.randn(1, 1, 4, 8)
            memory_attention(q, q, q, horizon=0, backend="sdpa")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=30)


@pytest.mark.parametrize("queries", [3, 200])
@pytest.mark.parametrize("seen", [0, 8])
def test_what_a_sharp_model_hardly_sees_has_no_gradient(queries: int, seen: int) -> None:
    """One key holds nearly all weight; of the others it is e**-90, below the least number but not below the least
    denormal one: no gradient reaches their values, and the time of one that is not zero is not taken."""
    torch.manual_seed(0)
    dim = 16
    q = torch.zeros(1, 1, queries, dim)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, queries, dim)
    k[:, :, 0, 0] = 90.0
    v = torch.randn(1, 1, queries, dim, requires_grad=True)
    memory = KVMemory.empty(1, 1, 8, dim) if seen else None
    if memory is not None:
        memory.append(torch.zeros(1, 1, seen, dim), torch.randn(1, 1, seen, dim))
    out = memory_attention(q, k, v, memory, horizon=8, scale=1.0, backend="sdpa")
    assert isinstance(out, torch.Tensor)
    out.sum().backward()
    assert v.grad is not None
    assert float(v.grad[0, 0, 0].min()) == pytest.approx(queries)
    assert math.exp(-90) < LEAST
    assert int(v.grad[0, 0, 1:].count_nonzero()) == 0
    assert counts()


def test_a_training_counts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    step = loop._Training._train_step

    def watched(training: Any) -> None:
        found.append(counts())
        step(training)

    monkeypatch.setattr(loop._Training, "_train_step", watched)
    corpus = tiny_corpus(tmp_path / "corpus")
    config = TrainConfig(
        data=str(tmp_path / "corpus"),
        out=str(tmp_path / "run"),
        schedule="uniform(layers=1, horizon=8)",
        d_model=16,
        n_heads=2,
        segment_length=8,
        batch_size=2,
        steps=2,
        device="cpu",
        dtype="float32",
    )
    loop.train(config, corpus=corpus)
    assert found == [False, False]
    assert counts()
