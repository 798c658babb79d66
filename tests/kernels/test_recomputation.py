"""Activation checkpointing over memories: what is computed again reads what was read at first, or is refused."""

import pytest
import torch
from small_memories import a_memory, attend, every, heads, new, reentrant, strided
from torch.utils.checkpoint import checkpoint

from dsmr_kernels import KVMemory
from dsmr_kernels.backends.reference import first_computation


@pytest.mark.slow
@every
@reentrant
def test_a_checkpointed_call_on_a_snapshot_has_the_gradients_of_one_that_is_not(backend: str, reentrant: bool) -> None:
    q, memory = heads(2, 4, 5, 16), a_memory()
    grads = []
    for again in (False, True):
        leaf, ring = q.clone().requires_grad_(), memory.clone()
        past = ring.snapshot()
        out = checkpoint(attend, past, leaf, backend, use_reentrant=reentrant) if again else attend(past, leaf, backend)
        for _ in range(3):
            ring.append(heads(2, 2, 5, 16), heads(2, 2, 5, 16))
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@every
@reentrant
def test_a_checkpointed_call_on_a_memory_that_moved_is_refused(backend: str, reentrant: bool) -> None:
    q, memory = heads(2, 4, 5, 16).requires_grad_(), a_memory()
    out = checkpoint(attend, memory, q, backend, use_reentrant=reentrant)
    memory.append(heads(2, 2, 5, 16), heads(2, 2, 5, 16))
    with pytest.raises(RuntimeError, match=r"give the checkpointed call memory\.snapshot\(\)"):
        out.sum().backward()


@reentrant
def test_a_memory_that_nothing_was_written_to_may_be_read_again(reentrant: bool) -> None:
    memory, q = KVMemory.empty(2, 2, 6, 16), heads(2, 4, 5, 16).requires_grad_()
    checkpoint(attend, memory, q, None, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, torch.autograd.grad(attend(None, q).sum(), q)[0])

    def with_one_of_its_own(q: torch.Tensor) -> torch.Tensor:
        own = KVMemory.empty(2, 2, 6, 16)
        first = attend(own, q)
        own.append(q[:, :2].detach(), q[:, 2:].detach())
        return first + attend(own, q)

    q.grad = None
    checkpoint(with_one_of_its_own, q, use_reentrant=reentrant).sum().backward()
    assert torch.equal(q.grad, torch.autograd.grad(with_one_of_its_own(q).sum(), q)[0])


READS = {
    "without gradients": lambda memory, q: attend(memory, q.detach()),
    "with gradients": lambda memory, q: attend(memory, q),
    "a snapshot": lambda memory, q: memory.snapshot(),
    "nothing": lambda memory, q: None,
}


@pytest.mark.slow
@every
@reentrant
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("laid_out", ["as it is", "strided"])
def test_no_read_of_the_new_contents_hides_that_a_memory_moved(
    backend: str, reentrant: bool, read: str, laid_out: str
) -> None:
    memory, q = a_memory(), heads(2, 4, 5, 16).requires_grad_()
    if laid_out == "strided":
        memory = KVMemory(strided(memory.k), strided(memory.v), memory.length, memory.position)
        memory.append(*new(2, 1, 2))
    out = checkpoint(attend, memory, q, backend, use_reentrant=reentrant)
    memory.append(*new(2, 5, 2))
    kept = READS[read](memory, q)
    with pytest.raises(RuntimeError, match="may have moved on since"):
        out.sum().backward()
    del kept


@pytest.mark.parametrize("write", ["append", "reset", "crop"])
def test_no_write_is_done_twice(write: str) -> None:
    memory = a_memory()
    writes = {
        "append": lambda: memory.append(*new(2, 1, 2)),
        "reset": lambda: memory.reset(torch.tensor([True, False])),
        "crop": lambda: memory.crop(1),
    }
    q = heads(2, 4, 5, 16).requires_grad_()
    out = checkpoint(lambda q: (writes[write](), q.exp())[1], q, use_reentrant=True)
    once = [x.clone() for x in memory.tensors().values()]
    with pytest.raises(RuntimeError, match="may have moved on since"):
        out.sum().backward()
    assert all(torch.equal(x, y) for x, y in zip(once, memory.tensors().values(), strict=True))


@reentrant
def test_streaming_without_gradients_before_does_not_hide_a_memory_that_moved(reentrant: bool) -> None:
    memory, q = a_memory(), heads(2, 4, 5, 16).requires_grad_()
    with torch.no_grad():
        for _ in range(3):
            attend(memory, q)
            memory.append(heads(2, 2, 5, 16), heads(2, 2, 5, 16))
    out = checkpoint(attend, memory, q, None, use_reentrant=reentrant)
    memory.append(heads(2, 2, 5, 16), heads(2, 2, 5, 16))
    with pytest.raises(RuntimeError, match=r"may have moved on since"):
        out.sum().backward()


def test_an_append_inside_a_backward_is_refused() -> None:
    memory = a_memory()

    def attend_and_append(q: torch.Tensor) -> torch.Tensor:
        out = attend(memory.snapshot(), q)
        memory.append(q[:, :2].detach(), q[:, 2:].detach())
        return out

    for within in (attend_and_append, lambda q: (memory.append(q[:, :2].detach(), q[:, 2:].detach()), q.exp())[1]):
        out = checkpoint(within, heads(2, 4, 5, 16).requires_grad_(), use_reentrant=False)
        held = memory.k.clone()
        with pytest.raises(RuntimeError, match=r"may have moved on since"):
            out.sum().backward()
        assert torch.equal(memory.k, held)


def test_what_a_compiled_call_has_written_is_of_no_backward_whatever_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compiled code cannot ask for the number; the first of a process have small ones."""
    memory = KVMemory.empty(2, 2, 6, 16)
    with monkeypatch.context() as compiling, torch.no_grad():
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        memory.unshare()
    memory.check_read()
    for number in range(4):
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda number=number: number)
        with pytest.raises(RuntimeError, match="may have moved on since"):
            memory.check_read()


@every
def test_a_backward_may_run_twice_while_nothing_is_appended(backend: str) -> None:
    memory, q = a_memory(), heads(2, 4, 5, 16).requires_grad_()
    out = attend(memory, q, backend)
    once, again = (torch.autograd.grad(out.sum(), q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)
    memory.append(*new(2, 5, 2))  # in place: the backward has run
    if backend != "reference":  # which keeps copies
        with pytest.raises(RuntimeError, match="written to in place before the call's backward"):
            torch.autograd.grad(out.sum(), q)


def test_a_compiled_call_of_the_reference_knows_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    q = heads(2, 4, 5, 16)
    assert torch.equal(first_computation(q), q)
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: 3)
    with pytest.raises(RuntimeError, match="may have moved on since"):
        first_computation(q)
