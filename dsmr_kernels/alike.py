"""Calls alike: what follows from shapes, strides, dtypes, devices and options alone is found out by the first of them.

A step of training makes the same calls again and again, on other tensors. That they are rightly made, which backend
serves them and what it launches is the same each time, and takes longer to find out than to launch: here the first call
of a kind leaves it for the next ones, under a key of everything that it follows from. What follows from anything else
(values, who needs a memory, the environment) is looked at in every call and has no place here. No tensor is kept.

Of the calls of a training step, which a backend has prepared, even the key takes long to put together: they are known
again by what `torch.compile` guards its graphs with, which looks at all tensors of a call in one step; where PyTorch
has no such thing, by their key.
"""

from typing import Any

import torch
from torch import Tensor

from dsmr_kernels.ring import Ring
from dsmr_kernels.spec import Alike

guards_of: Any
try:
    from torch._C._dynamo.guards import TensorGuards as guards_of
except ImportError:
    guards_of = None

_MOST = 4096  # kinds of calls; beyond, all are found out anew
_known: dict[tuple[Any, ...], Alike] = {}
_FEW = 4  # kinds of calls with the same device, options and shapes: by strides, by who learns, by autocast
# Device, options and shapes -> kinds, each with what says whether tensors are as theirs.
_again: dict[tuple[Any, ...], list[tuple[Any, Alike]]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)  # a subclass may be anything, sizes without a number included


def _of_memory(memory: Ring) -> tuple[Any, ...]:
    k, v, length, position = memory.k, memory.v, memory.length, memory.position
    k_scale, v_scale = memory.k_scale, memory.v_scale
    scales: tuple[Any, ...] = k_scale is None, v_scale is None
    if k_scale is not None and v_scale is not None:
        scales = k_scale.dtype, k_scale.shape, k_scale.stride(), v_scale.dtype, v_scale.shape, v_scale.stride()
    return (
        type(memory), memory.mark is None, k.is_inference() and not torch.is_inference_mode_enabled(),
        k.dtype, k.device, k.shape, k.stride(), v.dtype, v.device, v.shape, v.stride(),
        length.dtype, length.device, length.shape, length.stride(),
        position.dtype, position.device, position.shape, position.stride(), scales,
    )  # fmt: skip


def attention_key(q: Any, k: Any, v: Any, memory: Any, *options: Any) -> tuple[Any, ...] | None:
    """The key of a `memory_attention`; None if it has none, whatever is the matter: then all is looked at anew.

    `options`: what else a kind of call follows from. Of equal ones of different types, as 1 and True, one may be wrong.
    """
    if type(q) not in _PLAIN:
        return None
    try:
        return (
            q.dtype, q.device, q.shape, q.stride(), k.dtype, k.device, k.shape, k.stride(),
            v.dtype, v.device, v.shape, v.stride(), None if memory is None else _of_memory(memory),
            *options, *map(type, options),
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensor, or none that lies in strides
        return None


def decoding_key(q: Any, memory: Any, *options: Any) -> tuple[Any, ...] | None:
    """The same of a `decode_attention`."""
    if type(q) not in _PLAIN or not isinstance(memory, Ring):
        return None
    try:
        return (q.dtype, q.device, q.shape, q.stride(), _of_memory(memory), *options, *map(type, options))
    except (AttributeError, RuntimeError):
        return None


def found(key: tuple[Any, ...] | None) -> Alike | None:
    """What calls of this key left."""
    if key is None:
        return None
    try:
        return _known.get(key)
    except TypeError:  # something among the options that is no option
        return None


def keep(key: tuple[Any, ...], kind: Alike) -> Alike | None:
    """Leave it for the next call of this key, and return it; None if it cannot be left.

    A tensor among the options is hashed by where it is, not by what it says: no later call could be known by it.
    """
    try:
        hash(key)
    except TypeError:
        return None
    if any(isinstance(x, Tensor) for x in key):
        return None
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = kind
    return kind


def recall(q: Any, k: Any, v: Any, memory: Any, *options: Any) -> Alike | None:
    """What `learn_again` was told of a call like this one."""
    try:
        kinds = _again.get((q.device, q.shape, type(memory), *options))
        if kinds is not None:
            if memory is None:
                tensors: tuple[Any, ...] = q, k, v
            elif memory.mark is None and memory.k_scale is None and memory.v_scale is None:
                tensors = q, k, v, memory.k, memory.v, memory.length, memory.position
            else:
                return None
            for are_alike, kind in kinds:
                if are_alike(*tensors):
                    return kind
    except (AttributeError, RuntimeError, TypeError):  # whatever is the matter: it is said by who looks closely
        pass
    return None


def learn_again(kind: Alike, q: Tensor, k: Tensor, v: Tensor, memory: Ring | None, *options: Any) -> None:
    """Have `recall` know calls like this one, which is of a kind that was kept.

    It then knows tensors by type, dtype, device, shape, strides, by whether they require a gradient, and by what else
    PyTorch would dispatch them by: none that a transform has wrapped, an inference tensor or one under autocast passes
    for one that is none. A call in which a tensor is there twice is known by its key alone.
    """
    if guards_of is None or (memory is not None and (memory.mark is not None or memory.storage()[2:])):
        return
    tensors: tuple[Tensor, ...] = q, k, v
    if memory is not None:
        tensors += memory.k, memory.v, memory.length, memory.position
    if any(type(x) not in _PLAIN for x in tensors) or len({*map(id, tensors)}) < len(tensors):
        return
    sizes, strides = [list(x.shape) for x in tensors], [list(x.stride()) for x in tensors]
    are_alike = guards_of(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if len(_again) >= _MOST:
        _again.clear()
    kinds = _again.setdefault((q.device, q.shape, type(memory), *options), [])
    if len(kinds) >= _FEW:
        kinds.clear()
    kinds.append((are_alike, kind))


def forget() -> None:
    """As in a process that begins."""
    _known.clear()
    _again.clear()
