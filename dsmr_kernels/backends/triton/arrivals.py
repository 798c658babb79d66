"""Which of several programs of a launch is the last: counters on the device, which are zero whenever no kernel runs.

A program that has written its part adds one to a counter. The one that finds all the others counted reads every part,
in an order of its own choosing, and sets the counter back: what would be a second launch is the end of the first.

Two launches that may run at once must not share counters. Hence

- an eager launch takes those of its stream, where one launch begins after another has ended. They are zeroed once, by
  the stream that uses them;
- a launch that is captured into a graph cannot, since the graph will run on any stream, beside others. It takes
  counters that nobody else ever gets, from a reserve of the device that eager calls have zeroed before, and that is
  never freed: a graph keeps addresses. A graph never runs beside itself. Nothing is allocated in the graph's pool, and
  nothing is added to the graph. (`torch.cuda.graph` waits for the device as it begins: the reserve is zero by then.)
- where a device has no reserve yet, or it is used up, a captured launch has counters in the graph's own pool, which the
  graph zeroes at every replay: right as well, for one small launch more;
- in the interpreter a thread is what a stream is on a GPU.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsmr_kernels.backends.triton import launch as _launching

MOST_COUNTERS = 1024  # counters of one launch
RESERVE = 1 << 16  # counters: 256 KiB
_LINE = 32  # counters of 128 bytes, which no two launches share


@triton.jit
def arrives_last(Counter, expected):
    """Whether this program is the last of those `expected` at a counter; if so, the counter is zero again.

    What the others wrote before they came here may be read then, by all threads: each program's barrier comes before
    its one atomic addition, which releases and acquires, and another one comes with what the addition returns.
    """
    tl.debug_barrier()
    last = tl.atomic_add(Counter, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(Counter, 0)
    return last


class _Device:
    """The counters of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._of_streams: dict[int, Tensor] = {}
        self._reserves: list[Tensor] = []  # the last of them is in use
        self._taken = 0 if device.type == "cpu" else RESERVE  # there are no graphs on a CPU

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self._device)

    def of_stream(self, stream: int, keep: bool) -> Tensor:
        """Those of a stream, which must be the current one; if it has none yet and may not `keep` them, others."""
        found = self._of_streams.get(stream)
        if found is None and not keep:
            return self._zeros(MOST_COUNTERS)
        if found is None or (keep and self._taken + MOST_COUNTERS > RESERVE):
            with self._lock:
                found = self._of_streams.setdefault(stream, self._zeros(MOST_COUNTERS) if found is None else found)
                if self._taken + MOST_COUNTERS > RESERVE:
                    self._reserves.append(self._zeros(RESERVE))
                    self._taken = 0
        return found

    def of_graph(self, count: int) -> Tensor:
        """Some for a launch that is being captured."""
        count = -(-count // _LINE) * _LINE
        with self._lock:
            if self._taken + count > RESERVE:
                return self._zeros(count)
            self._taken += count
            return self._reserves[-1][self._taken - count : self._taken]

    def forget(self, stream: int) -> None:
        """Give up those of a stream, where a launch has failed and may have left others than zeros."""
        self._of_streams.pop(stream, None)


_devices: dict[torch.device, _Device] = {}


def counters(device: torch.device, count: int, keep: bool, stream: int | None = None) -> Tensor:
    """At least `count` counters, up to `MOST_COUNTERS`, for the next launch on `device`, which must be the current one.

    Args:
        stream: its current one, if that is known.
        keep: whether what is allocated may be kept. Within an operator that a compiler calls it may not: it may be
            warming up a graph, and takes whatever is alive in the graph's pool afterwards for an error.
    """
    found = _devices.get(device)
    if found is None:
        found = _devices.setdefault(device, _Device(device))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return found.of_graph(count)
    return found.of_stream(_launching.stream_of(device) if stream is None else stream, keep)


def launch_counting(launch: _launching.Launch, count: int, keep: bool, *tensors: Tensor) -> None:
    """Launch a kernel whose last tensor is `count` counters; `keep`: see `counters`."""
    device = launch.device
    with _launching.on(device):
        stream = _launching.stream_of(device)
        counted = counters(device, count, keep, stream)
        try:
            launch.start(stream, *tensors, counted)
        except BaseException:  # it may have ended half-way, in the interpreter, and left others than zeros
            _devices[device].forget(stream)
            raise
