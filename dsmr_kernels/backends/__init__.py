"""The arithmetic of attention, once in every way: `reference` as the definitions say it, `sdpa` in fast PyTorch,
`triton` in fused kernels, and `autograd`, the node that the fast ones share.

Backends take their arguments as checked. They may import the contract (`memory`, `visibility`, `spec`, `rotary`,
`quantise`) and what lies in their own room, but neither each other nor the dispatcher.
"""

_MOVED = ("choose", "available_backends", "NAMES")


def __getattr__(name: str) -> object:
    if name in _MOVED:
        raise ImportError(f"dsmr_kernels.backends.{name} is now dsmr_kernels.dispatch.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
