"""From tensors to launches, for all kernels: devices, strides, compiled code. Nothing here waits for the device."""

import contextlib
import functools
import math
import os
import threading
from typing import Any

import torch
import triton
from torch import Tensor

LOG2E = math.log2(math.e)
BY_ADDRESS = True  # a launcher that is handed tensors asks the driver where each of them lies, which takes longer
_AMD = torch.version.hip is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def architecture(device: torch.device) -> str:
    """The name under which `configs` knows a device."""
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


_NOWHERE = contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter pretends to four, so that tests have several splits."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if INTERPRETED:
        return _NOWHERE
    return _NOWHERE if torch.cuda.current_device() == device.index else torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The stream on which Triton launches on a device; in the interpreter a thread is what a stream is on a GPU."""
    if INTERPRETED:
        return threading.get_ident()
    return triton.runtime.driver.active.get_current_stream(device.index)


_hooks = triton.knobs.runtime
_address = Tensor.data_ptr


def hooked() -> bool:
    """Whether somebody, as a profiler, wants to be told of launches."""
    enter, leave = _hooks.launch_enter_hook, _hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


# What a launch asks for -> the kernel that Triton compiled for it, and its constants in their order.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


@functools.cache
def _specialised(kernel: Any, tensors: int) -> tuple[list[int], list[int]]:
    """Which of a kernel's tensors have it compiled anew if they are not aligned, and which of its numbers behind them
    if they are 1 or a multiple of 16."""
    watched = [i for i, p in enumerate(kernel.params) if not (p.is_constexpr or p.do_not_specialize)]
    return [i for i in watched if i < tensors], [i - tensors for i in watched if i >= tensors]


def _straight(compiled: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """What Triton 3.7's launcher for NVIDIA's parts calls, in C, and what it hands over between stream and arguments,
    of a kernel that needs no scratch memory; None of any other.

    In Python it then does nothing but to find that out, at every launch, for as long as the call itself takes.
    """
    run = compiled.run
    if not triton.__version__.startswith("3.7.") or type(run).__name__ != "CudaLauncher":
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    before = compiled.function, run.launch_cooperative_grid, run.launch_pdl, compiled.packed_metadata
    nothing = (None,) * 5  # no metadata for hooks, none of the two hooks, none of the two scratch memories
    return run.launch, (*before, *nothing, run.arg_annotations, run.kernel_signature)


class Launch:
    """A launch of a kernel but for its tensors, of which only the addresses may be others each time.

    At every launch Triton works out from the arguments which compiled kernel they ask for, and that takes several times
    as long as to launch it. Here arguments that can only ask for what was compiled before find it in a dictionary, and
    a launch that is kept finds it in itself. What Triton's own knobs for compiling (debugging, instrumentation) have
    changed since then goes unseen.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        device: torch.device,
        dtypes: tuple[torch.dtype, ...],
        numbers: tuple[float, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self.kernel, self.grid, self.device, self.numbers = kernel, grid, device, numbers
        self.constants, self.options = constants, options
        self.by_address = False  # whether whoever has addresses may call `at`
        self._run: Any = None  # Triton's launcher, called as Triton itself calls it
        self._straight: Any = None  # what that one calls in turn, where it is known to do nothing else
        self._arguments: tuple[Any, ...] = ()  # of it, between stream and addresses
        self._runner: Any = None  # what Triton offers for calling it, which tells hooks, too
        self._loaded: tuple[Any, ...] = ()  # the launcher's arguments between stream and addresses
        self._behind: tuple[Any, ...] = ()  # and those behind the addresses
        if INTERPRETED:
            return
        self._aligned, special = _specialised(kernel, len(dtypes))
        self._key: tuple[Any, ...] | None = None
        if max(numbers) < 1 << 31 and min(numbers) >= -1 << 31:  # what needs more bits is rare, and left to Triton
            values = [(numbers[i] == 1, numbers[i] % 16 == 0) for i in special]
            self._key = (id(kernel), device, dtypes, *constants.values(), *options.values(), *values)

    def __call__(self, *tensors: Tensor) -> None:
        """Launch, with the kernel's tensors in their order, which must be of the dtypes given before."""
        with on(self.device):
            self.start(stream_of(self.device), *tensors)

    def start(self, stream: int, *tensors: Tensor) -> None:
        """The same, where the device is the current one and `stream` is `stream_of` it: asked once for all launches of
        a call."""
        if INTERPRETED:
            self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
            return
        addresses = [*map(_address, tensors)]
        bits = 0
        for i in self._aligned:
            bits |= addresses[i]
        # Left to Triton, too: a tensor that is not aligned, and on AMD's parts one of 2 GiB.
        large = _AMD and any(x.untyped_storage().nbytes() >> 31 for x in tensors)
        known = self._key is not None and not (bits & 15 or large)
        if known and (self._runner is not None or self._find()):
            if self._run is None or hooked():
                self._runner(*(addresses if BY_ADDRESS else tensors), *self._behind)
            else:
                self.at(stream, *addresses)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants, **self.options)
        if known and compiled is not None:
            compiled = (
                compiled.result() if hasattr(compiled, "result") else compiled
            )  # it may compile in the background
            assert self._key is not None
            order = [self.constants[p.name] for p in self.kernel.params if p.is_constexpr]
            _compiled[self._key] = compiled, order

    def at(self, stream: int, *addresses: int) -> None:
        """The same, of what has been found, of tensors that lie at these addresses, multiples of 16, where
        nobody wants to be told of it (`hooked`)."""
        if self._straight is None:
            self._run(*self.grid, stream, *self._loaded, *addresses, *self._behind)
        else:
            self._straight(*self.grid, stream, *self._arguments, (*addresses, *self._behind))

    def _find(self) -> bool:
        """Whether what this launch asks for has been compiled."""
        assert self._key is not None
        if found := _compiled.get(self._key):
            compiled, constants = found
            self._behind = (*self.numbers, *constants)  # first: another thread may be here, too
            self._runner = compiled[self.grid]
            if BY_ADDRESS:  # without hooks, and what would be handed to them
                self._loaded, self._run = (compiled.function, compiled.packed_metadata, *(None,) * 3), compiled.run
                if (straight := _straight(compiled)) is not None:
                    self._arguments, self._straight = straight[1], straight[0]  # in this order, likewise
                self.by_address = not _AMD
        return self._runner is not None


def launch_kernel(
    kernel: Any,
    grid: tuple[int, int, int],
    device: torch.device,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch a kernel, whose arguments are tensors, then numbers, then constants, once."""
    Launch(kernel, grid, device, tuple(x.dtype for x in tensors), numbers, constants, options)(*tensors)


def as_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension: itself, if it has one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_units(shapes: list[tuple[int, ...]], strides: list[tuple[int, ...]]) -> tuple[int, list[int]]:
    """The strides of batch, head and token of tensors of these shapes and strides, in units of as many elements, up to
    16, as divide them all."""
    found = [stride for x in strides for stride in x[:3]]
    unit = math.gcd(16, *found)
    if unit < 16:  # what a dimension of size 1 has for a stride is of no account
        sizes = [size for x in shapes for size in x[:3]]
        found = [stride if size > 1 else 0 for size, stride in zip(sizes, found, strict=True)]
        unit = math.gcd(16, *found)
    return unit, [stride // unit for stride in found]
