"""One row of a profile, measured in a process of its own: `python -m dsmr.profiling.row`, a job in, a result out.

A fresh process is what makes peak memory true, and keeps a row that runs out of memory from taking the others along.
Correctness goes first: the attention that the model will use is compared with the oracle before anything is timed, and
three steps of decoding with the model's own pass.
Standard input is a `Job` as JSON, standard output the result as JSON.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmr.console.devices import autocast
from dsmr.console.files import atomic_path
from dsmr.console.heap import give_back_freed_memory, keep_freed_memory
from dsmr.console.terminal import out_of_memory
from dsmr.generation.sampling import Sampling
from dsmr.generation.stepping import Stepper, stepper
from dsmr.model.schedule import MemorySchedule
from dsmr.model.state import DSMRState
from dsmr.model.transformer import DSMRModel
from dsmr.profiling.job import Job, Sizes
from dsmr.profiling.record import Parts, Recorder
from dsmr_kernels.cases import Case, random_case
from dsmr_kernels.costing.timing import Timing, seconds_of, synchronize
from dsmr_kernels.dispatch import choose
from dsmr_kernels.testing import assert_agrees_with_oracle
from dsmr_kernels.tolerance import error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# --- Correctness --------------------------------------------------------------------------------------------------


def check_attention(sizes: Sizes, schedule: MemorySchedule) -> int:
    """Hold every kind of layer of the model, cut small, against the oracle by the rule of `dsmr_kernels.tolerance`.

    Returns the number of cases; `AssertionError` with the figures if one is outside the tolerance.
    """
    device, dtype = torch.device(sizes.device), DTYPES[sizes.dtype]
    kinds = {
        (min(horizon, 48), sizes.heads // heads)
        for horizon, heads in zip(schedule.horizons, schedule.heads(sizes.heads), strict=True)
    }
    for horizon, group in sorted(kinds):
        cut = random_case(
            heads=2 * group,
            kv_heads=2,
            queries=40,
            head_dim=sizes.head_dim,
            capacity=max(horizon, 1),
            seen=[3 * horizon, horizon // 2],
            dtype=dtype,
            horizon=horizon,
            segment_length=24,
            visibility=sizes.visibility,
        )
        q, k, v, grad = (x.to(device) for x in (cut.q, cut.k, cut.v, cut.grad))
        case = Case(q, k, v, cut.memory.to(device) if cut.memory else None, grad, cut.options)
        assert_agrees_with_oracle(case, choose(q, None).__name__.rsplit(".", 1)[-1])
    return len(kinds)


def check_step(model: DSMRModel, sizes: Sizes) -> None:
    """Hold three steps behind the middle position against the model's own pass; `AssertionError` if they differ."""
    position = sorted(sizes.positions)[len(sizes.positions) // 2]
    tokens = torch.arange(3, device="cpu") % sizes.vocab_size
    torch.manual_seed(1)
    state = filled_state(model, sizes, 1, position, aligned=False)
    whole = model(tokens[None].to(sizes.device), state).logits[0].float().cpu()
    torch.manual_seed(1)
    step = stepper(model, filled_state(model, sizes, 1, position, aligned=False), sizes.dtype)
    stepped = torch.cat([step(token[None]).clone() for token in tokens])
    found, allowed = error(stepped, whole), (1e-4 if sizes.dtype == "float32" else 0.05) * float(whole.abs().max())
    assert found <= allowed, f"steps are {found:.2g} from the model's own pass, more than {allowed:.2g}"


# --- Memory -------------------------------------------------------------------------------------------------------


def resident_bytes(name: str) -> int:
    """ "VmRSS", what is resident now, or "VmHWM", the most that ever was, in bytes; 0 where /proc does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{name}:"):
                return 1024 * int(line.split()[1])
    return 0


class Peak:
    """The most memory that the work inside took beyond what was there before: on CUDA by the allocator's counters, on a
    CPU by the resident size of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        gc.collect()
        give_back_freed_memory()  # else the work would find it here, and seem to take less
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError):  # Linux: begin to count anew
                Path("/proc/self/clear_refs").write_text("5")
            self.before = resident_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        synchronize(self.device)
        cuda = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if cuda else resident_bytes("VmHWM")
        self.bytes = max(most - self.before, 0)


# --- Steps --------------------------------------------------------------------------------------------------------


def filled_state(model: DSMRModel, sizes: Sizes, batch: int, seen: int, aligned: bool) -> DSMRState:
    """A state whose streams have seen `seen` tokens, with random keys and values: attention's time does not depend on
    what they are."""
    state = model.new_state(batch, device=sizes.device, dtype=DTYPES[sizes.dtype], aligned=aligned)
    for memory in state.memories:
        if not seen:
            continue
        shape = (batch, memory.kv_heads, min(seen, max(memory.capacity, 1)), memory.head_dim)
        k, v = (torch.randn(shape, device=sizes.device).to(memory.k.dtype) for _ in range(2))
        memory.append(k, v)
        memory.position = torch.full_like(memory.position, seen)
    state.offset = seen % sizes.segment_length
    return state


class Steps:
    """A model and what `train` does with it, a step at a time, apart so that each can be timed."""

    def __init__(self, job: Job) -> None:
        self.sizes, self.train = job.sizes, job.kind == "train"
        self.schedule = MemorySchedule.parse(job.schedule)
        torch.manual_seed(0)
        self.device = torch.device(self.sizes.device)
        self.model = DSMRModel(self.sizes.config(self.schedule)).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        batch, tokens = (self.sizes.batch, self.sizes.segment_length) if self.train else (1, self.sizes.piece_tokens)
        self.tokens, self.targets = (
            torch.randint(self.sizes.vocab_size, (batch, tokens), device=self.device) for _ in range(2)
        )
        longest = max(self.schedule.horizons)
        seen = -(-longest // self.sizes.segment_length) * self.sizes.segment_length if self.train else 0
        self.state = filled_state(self.model, self.sizes, batch, seen, aligned=True)
        self.recorder = Recorder(self.model, self.device)
        self.loss: Tensor | None = None

    def forward(self) -> None:
        """Of a training step; a whole piece begins with empty memories."""
        if not self.train:
            self.state.reset()
        with autocast(self.device, DTYPES[self.sizes.dtype]):
            self.loss = self.model(self.tokens, self.state, targets=self.targets).loss

    def backward(self) -> None:
        assert self.loss is not None
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.backward()
        self.loss = None

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def __call__(self) -> None:
        self.forward()
        self.backward()
        self.update()

    def recorded(self) -> Parts:
        """One step, split into its parts."""
        recorder = self.recorder
        recorder.start()
        self.forward()
        recorder.mark("forward", -1, "end")
        self.backward()
        recorder.mark("backward", -1, "end")
        self.update()
        recorder.mark("step", -1, "end")
        synchronize(self.device)
        parts = recorder.parts()
        marks = recorder.marks
        parts["step", -1, "optimizer"] = recorder.clock.between(marks["backward", -1, "end"], marks["step", -1, "end"])
        return parts


def measure_step(job: Job) -> dict[str, Any]:
    """A training step or a whole-piece call: seconds by part and in all, bytes kept and at the peak."""
    sizes = job.sizes
    peak = Peak(torch.device(sizes.device))
    with peak:
        steps = Steps(job)
        steps()
        steps()
    with steps.recorder.recording(), steps.recorder.counting():
        steps.forward()
    saved = dict(steps.recorder.saved)
    steps.backward()
    rounds: list[Parts] = []
    with steps.recorder.recording():
        steps.recorded()  # the hooks' first use
        seconds_of(
            lambda: rounds.append(steps.recorded()), steps.device, rounds=sizes.rounds, warmup=0, limit=sizes.seconds
        )
    if job.trace is not None:
        write_trace(steps, job.trace)
    directions = ("forward", "backward", "step")
    sums = {name: [sum(s for key, s in parts.items() if key[0] == name) for parts in rounds] for name in directions}
    all_of_it = [sum(parts.values()) for parts in rounds]
    return {
        "tokens": steps.tokens.numel(),
        "parameters": sum(p.numel() for p in steps.model.parameters()),
        "kv_bytes": [memory.nbytes for memory in steps.state.memories],
        "activation_bytes": [saved.get(layer, 0) for layer in range(-1, len(steps.model.blocks))],
        "peak_bytes": peak.bytes,
        "timings": {name: vars(Timing.of(values)) for name, values in {**sums, "all": all_of_it}.items()},
        "parts": [
            {"direction": key[0], "layer": key[1], "part": key[2], "seconds": _median(parts[key] for parts in rounds)}
            for key in rounds[0]
        ],
    }


def _median(values: Any) -> float:
    return Timing.of(list(values)).median


def write_trace(steps: Steps, path: str) -> None:
    """Two steps under `torch.profiler`, for chrome://tracing or ui.perfetto.dev."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if steps.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(2):
            steps()
    with atomic_path(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


def measure_decode(job: Job) -> dict[str, Any]:
    """One token at a time, drawn as a stream draws it (`dsmr.generation.stepping`), at several positions of a piece."""
    sizes = job.sizes
    schedule = MemorySchedule.parse(job.schedule)
    torch.manual_seed(0)
    device = torch.device(sizes.device)
    peak = Peak(device)
    rows = []
    with torch.no_grad():
        check_step(DSMRModel(sizes.config(schedule)).to(device).eval(), sizes)
    with peak, torch.no_grad():
        model = DSMRModel(sizes.config(schedule)).to(device).eval()
        token, noise, sampling = (
            torch.zeros(1, dtype=torch.int64, device="cpu"),
            torch.rand(1, device="cpu"),
            Sampling(),
        )
        for position in sizes.positions:
            state = filled_state(model, sizes, 1, position, aligned=False)
            step = stepper(model, state, sizes.dtype)

            def one(step: Stepper = step) -> None:
                step.next(token, sampling, None, noise)

            seconds = seconds_of(one, device, rounds=10 * sizes.rounds, warmup=5, limit=sizes.seconds / 2)
            rows.append({"position": position, "timing": vars(Timing.of(seconds))})
            held = [memory.nbytes for memory in state.memories]
            del one, step, state  # the next position has its own: a player has one
    return {
        "tokens": 1,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kv_bytes": held,
        "peak_bytes": peak.bytes,
        "positions": rows,
    }


def measure(job: Job) -> dict[str, Any]:
    """The whole row: correctness, then time and memory."""
    if job.sizes.device == "cpu":
        torch.set_num_threads(job.sizes.threads)
        if job.kind == "train":
            keep_freed_memory()  # as `train` does
    checked = check_attention(job.sizes, MemorySchedule.parse(job.schedule))
    measured = measure_decode(job) if job.kind == "decode" else measure_step(job)
    return {"checked": checked, **measured}


def main() -> int:
    """Read the job, write the result; a failure that the parent should report is a result too."""
    job = Job.from_json(json.load(sys.stdin))
    try:
        result = measure(job)
    except (RuntimeError, MemoryError, ValueError, AssertionError) as error:
        if isinstance(error, MemoryError) or out_of_memory(error):
            result = {"error": "out of memory"}
        elif isinstance(error, AssertionError):
            result = {"error": f"not timed, because it is wrong: {error}"}
        else:
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
