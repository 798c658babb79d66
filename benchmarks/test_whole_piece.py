"""What does a piece of n segments cost in one call, and what in n calls one after another?

pytest benchmarks/test_whole_piece.py --benchmark-only --benchmark-group-by=group
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.parts.contenders import Oracle, Shape, forward, forward_backward, ours, recorded
from benchmarks.parts.rows import DEVICE, Row, name_of, quick, reported, timed
from benchmarks.test_attention import DTYPES, call_of, predicted, work_of
from dsmr_kernels import KVMemory
from dsmr_kernels.cases import Case
from dsmr_kernels.dispatch import choose

SEGMENT = {  # one segment, and how many of them
    ("cpu", True): (Shape(1, 4, 4, 64, 256, 64), 8),
    ("cpu", False): (Shape(1, 8, 8, 256, 1024, 64), 16),
    ("cuda", True): (Shape(1, 8, 8, 256, 1024, 64), 8),
    ("cuda", False): (Shape(1, 8, 8, 1024, 2048, 64), 32),
}[DEVICE.type, quick()]
Results = dict[str, Tensor]


class AtOnce:
    """Ours: all segments in one call, then one append."""

    def __init__(self, case: Case) -> None:
        assert case.memory is not None
        self.case, self.memory = case, case.memory
        self.ring = case.memory.clone()

    def _append(self) -> None:
        self.ring.append(self.case.k, self.case.v)

    def forward(self) -> Results:
        out = forward(ours, self.case)()
        self._append()
        return {"out": out}

    def forward_backward(self) -> Results:
        gradients = forward_backward(ours, self.case)()
        self._append()
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


class InTurn:
    """A call for each segment, the memory carried from one to the next; by ours, or by whoever overrides `attend`."""

    def __init__(self, case: Case) -> None:
        assert case.memory is not None
        self.case, self.memory, self.length = case, case.memory, case.options["segment_length"]
        self.ring = case.memory.clone()

    def start(self) -> None:
        """Go back to the memory that the case begins with."""
        self.ring.k.copy_(self.memory.k)
        self.ring.v.copy_(self.memory.v)
        counters = (x.clone() for x in (self.memory.length, self.memory.position))
        self.carried = KVMemory(self.ring.k, self.ring.v, *counters)

    def attend(self, part: Case) -> Tensor:
        return ours(replace(part, memory=self.carried))

    def remember(self, part: Case) -> None:
        self.carried.append(part.k, part.v)

    def _parts(self, case: Case) -> list[Case]:
        options = {"horizon": case.options["horizon"]}
        cut = [x.split(self.length, 2) for x in (case.q, case.k, case.v, case.grad)]
        return [Case(q, k, v, None, grad, options) for q, k, v, grad in zip(*cut, strict=True)]

    @torch.no_grad()
    def forward(self) -> Results:
        self.start()
        outputs = []
        for part in self._parts(self.case):
            outputs.append(self.attend(part))
            self.remember(part)
        return {"out": torch.cat(outputs, 2)}

    def forward_backward(self) -> Results:
        self.start()
        gradients = []
        for part in self._parts(self.case):
            leaves = recorded(part)
            gradients.append(torch.autograd.grad(self.attend(leaves), (leaves.q, leaves.k, leaves.v), part.grad))
            self.remember(part)
        return dict(zip(("dq", "dk", "dv"), (torch.cat(x, 2) for x in zip(*gradients, strict=True)), strict=True))


class ConcatenatedInTurn(InTurn):
    """`scaled_dot_product_attention` with a mask over concatenated tensors, from which the memory is cut."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.first = self.memory.ordered()[:2]
        past = self.first[0].shape[2]
        self.seen = torch.ones(self.length, past + self.length, dtype=torch.bool, device=case.q.device).tril(past)

    def start(self) -> None:
        self.past = self.first

    def attend(self, part: Case) -> Tensor:
        k, v = (torch.cat([past, new], 2) for past, new in zip(self.past, (part.k, part.v), strict=True))
        self.both = (k, v)
        return F.scaled_dot_product_attention(part.q, k, v, attn_mask=self.seen)

    def remember(self, part: Case) -> None:
        k, v = (x[:, :, self.length :].detach() for x in self.both)
        self.past = (k, v)


class MaskedAtOnce(AtOnce):
    """`scaled_dot_product_attention` over the whole piece with the mask of segment visibility. Its gradients are those
    of ordinary attention, not of the recurrence: only its output can be compared."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        past_k, past_v, _ = self.memory.ordered()
        self.past = (past_k, past_v)
        memory, length = past_k.shape[2], case.options["segment_length"]
        query = torch.arange(case.q.shape[2], device=case.q.device)[:, None]
        key = torch.arange(-memory, case.q.shape[2], device=case.q.device)
        self.seen = (key <= query) & (key >= query // length * length - memory)

    @torch.no_grad()
    def forward(self) -> Results:
        k, v = (torch.cat([past, x], 2) for past, x in zip(self.past, (self.case.k, self.case.v), strict=True))
        return {"out": F.scaled_dot_product_attention(self.case.q, k, v, attn_mask=self.seen)}


CONTENDERS: dict[str, Callable[[Case], AtOnce | InTurn]] = {
    "ours, one call": AtOnce,
    "ours, a call a segment": InTurn,
    "SDPA, boolean mask, a call a segment": ConcatenatedInTurn,
    "SDPA, boolean mask, one call": MaskedAtOnce,
}
PAIRS = [
    (direction, name)
    for direction in ("forward", "forward + backward")
    for name in CONTENDERS
    if direction == "forward" or CONTENDERS[name] is not MaskedAtOnce
]


@pytest.mark.parametrize(("direction", "contender"), PAIRS, ids=lambda said: said)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_whole_piece(benchmark: Any, dtype: torch.dtype, direction: str, contender: str) -> None:
    one, segments = SEGMENT
    piece = replace(one, queries=segments * one.queries)
    case = piece.case(dtype, device=DEVICE)
    case.options["segment_length"] = one.queries
    own = contender.startswith("ours")
    backend = choose(case.q, None).__name__.rsplit(".", 1)[-1]
    call = replace(call_of(piece, dtype), segment_length=one.queries)
    row = Row(
        question=f"whole piece, {direction}",
        case=f"{name_of(dtype)}: {segments} segments, each {one}",
        contender=contender,
        ours=own,
        shape=str(one),
        dtype=dtype,
        backend=backend if own else contender,
        work=work_of(call, direction, "split" if backend == "triton" else "fused"),
        predicted=predicted(call, direction, dtype) if contender == "ours, one call" else None,
        tokens=piece.batch * piece.queries,
    )
    with reported(benchmark, row):
        made = CONTENDERS[contender](case)
        found = made.forward() | (made.forward_backward() if "backward" in direction else {})
        # What a token sees, and the gradient that it takes, do not depend on later segments: the first few tell.
        Oracle(case, min(segments, 3) * one.queries).hold(contender, found)
        timed(benchmark, row, made.forward_backward if "backward" in direction else made.forward)
