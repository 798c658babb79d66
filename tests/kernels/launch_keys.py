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

from dsmr_kernels import KVMemory
from dsmr_kernels.backends.triton import append_rotated, bias, decode_attention, launch, training
from dsmr_kernels.backends.triton import decode as _decode
from dsmr_kernels.backends.triton import step as _step
from dsmr_kernels.cases import Case, filled_memory, random_case
from dsmr_kernels.spec import AttentionSpec, Inputs, Needs

KEYS: dict[str, set[str]] = {}
STARTS = {"by Triton": 0, "from the dictionary": 0}


def _key(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialization, options = binder(*args, **kwargs)
    return str((specialization, options))


class _Driver:
    """What is asked before a launch: on which stream."""

    def get_current_stream(self, device: int | None) -> int:
        return 0


class _Compiled:
    """What stands for a compiled kernel: it checks that it is asked to run nothing but what it was compiled for."""

    def __init__(self, kernel: Any, key: str, options: dict[str, Any]) -> None:
        self.kernel, self.key, self.options = kernel, key, options

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*args: Any) -> None:
            assert len(grid) == 3
            assert _key(self.kernel, args, self.options) == self.key, f"{self.kernel.__name__} was compiled for others"
            STARTS["from the dictionary"] += 1

        return run


def _record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> _Compiled:
    key = _key(self, args, kwargs)
    KEYS.setdefault(self.__name__, set()).add(key)
    STARTS["by Triton"] += 1
    names = {parameter.name for parameter in self.params}
    return _Compiled(self, key, {name: value for name, value in kwargs.items() if name not in names})


def _launch(case: Case, slopes: torch.Tensor | None, columns: int = 0, **options: Any) -> None:
    spec = AttentionSpec(**options, visibility="segment", detach_segments=True, scale=0.25, return_lse=True)
    starts = torch.full((case.k.shape[0], case.k.shape[2] + 1), -1, dtype=torch.int32)[:, 1:]
    learned = (torch.rand(4, columns + 1)[:, 1:], torch.zeros(columns + 3).long()) if columns else (None, None)
    inputs = Inputs(case.q, case.k, case.v, case.memory, starts, slopes, None, *learned, spec)
    out, lse = training.forward(inputs)
    training.backward(inputs, out, lse, case.grad, None, Needs(bias=columns > 0))


def count(head_dim: int, biased: bool = False) -> dict[str, int]:
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
                (1, 5, 16, 32)[step % 4] if biased else 0,
                horizon=(0, 1, 16, 17, 1 << 40)[step % 5],
                segment_length=length,
                segment_offset=min(step * 5, (length or 100) - 1),
            )
    return {name: len(keys) for name, keys in KEYS.items()}


def decode() -> dict[str, int]:
    """Keys of the decoding kernels over calls of every kind, aligned and not."""
    KEYS.clear()
    slopes = torch.rand(5)
    for step in range(24):
        batch, kv_heads, group, new = 1 + step % 3, 1 + step % 2, (1, 2, 8)[step % 3], (1, 3, 16)[step % 3]
        dtype, stored = ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.int8))[step // 2 % 3]
        head_dim, heads = (64, 80, 20)[step // 6 % 3], kv_heads * group
        memory = KVMemory.empty(batch, kv_heads, 64 + step, head_dim, dtype=stored)
        q, k, v = (torch.randn(batch, n, new, head_dim + step % 2, dtype=dtype) for n in (heads, kv_heads, kv_heads))
        q, k, v = (x[..., step % 2 :] for x in (q, k, v))  # every other call's rows are not aligned
        angles = torch.randn(2, batch, 1, new, head_dim // 2)
        turned = append_rotated(q, k, v, memory, *((angles[0], angles[1]) if step % 4 < 2 else (None, None)))
        start = step % 5 % 2
        alibi = None if step % 5 < 2 else slopes[start : start + heads] if heads <= 4 else torch.rand(heads)
        decode_attention(turned, memory, None if step % 3 else memory.length.clone(), alibi, None, None, None, 0.25)
    return {name: len(keys) for name, keys in KEYS.items()}


if __name__ == "__main__":
    triton.JITFunction.run = _record
    for module in (training, bias, _decode, _step):
        module.architecture = lambda device: "sm_90"
    launch.on = lambda device: contextlib.nullcontext()
    launch.BY_ADDRESS = False  # an address says nothing of its alignment
    _decode.processors = lambda device: 132
    training.processors = lambda device: 1  # where the grid is small another kernel is compiled
    triton.runtime.driver.set_active(_Driver())
    found = {head_dim: count(head_dim) for head_dim in (16, 20, 40, 64, 80)}
    learned = count(64, biased=True)
    decode()
    again = dict(STARTS)
    decode()
    print(json.dumps({"keys": found, "with a bias": learned, "starts": again, "starts again": STARTS}))
