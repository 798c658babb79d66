"""Prints, as JSON, under how many keys Triton would compile each kernel over a sweep of calls: for `test_compile.py`.

A program of its own, since the kernels must be defined without the interpreter. Nothing is compiled or launched: the
key is worked out as `JITFunction.run` does it, for a target that need not be there.
"""

import contextlib
import json
import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dsmr_kernels.backends.autograd import Inputs
from dsmr_kernels.backends.spec import AttentionSpec
from dsmr_kernels.backends.triton import launch
from dsmr_kernels.testing import Case, filled_memory, random_case

KEYS: dict[str, set[str]] = {}


def _record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    binder = create_function_from_signature(self.signature, self.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, options = binder(*args, **kwargs)
    KEYS.setdefault(self.__name__, set()).add(str((specialization, options)))


def _launch(case: Case, slopes: torch.Tensor | None, **options: Any) -> None:
    spec = AttentionSpec(**options, visibility="segment", detach_segments=True, scale=0.25, return_lse=True)
    starts = torch.full((case.k.shape[0], case.k.shape[2] + 1), -1, dtype=torch.int32)[:, 1:]
    call = launch.Call(Inputs(case.q, case.k, case.v, case.memory, starts, slopes, spec))
    out, lse = call.forward()
    call.backward(out, lse, case.grad)


def count(head_dim: int) -> dict[str, int]:
    """Keys of each kernel over calls that differ in what is known at run time only."""
    KEYS.clear()
    slopes = torch.rand(5)
    for step, queries in enumerate([1, 2, 3, 7, 16, 17, 32, 48, 100, 128, 1000, 1024]):
        for tokens in (queries, queries + 1, queries + 16):
            batch, kv_heads = 1 + step % 3, 1 + step % 2
            case = random_case(
                batch=batch, heads=4, kv_heads=kv_heads, queries=queries, tokens=tokens, head_dim=head_dim
            )
            capacity = 1 + 13 * step
            case.memory = filled_memory(batch, kv_heads, capacity, head_dim, [step * 9] * batch)
            length = (None, 1, 16, 1 << 40)[step % 4]
            _launch(
                case,
                slopes[step % 2 : step % 2 + 4],
                horizon=(0, 1, 16, 17, 1 << 40)[step % 5],
                segment_length=length,
                segment_offset=min(step * 5, (length or 100) - 1),
            )
    return {name: len(keys) for name, keys in KEYS.items()}


if __name__ == "__main__":
    triton.JITFunction.run = _record
    launch.architecture = lambda device: "sm_90"
    launch._on = lambda device: contextlib.nullcontext()
    print(json.dumps({head_dim: count(head_dim) for head_dim in (16, 20, 40, 64, 80)}))
