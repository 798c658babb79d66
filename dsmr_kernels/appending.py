"""Writing new tokens into the tensors of a ring, in place: eagerly, and as an operator that says what it mutates.

On a CPU row by row, stretch by stretch; elsewhere by scattering, without looking at a counter, so that nothing waits
for the device and a captured graph may replay it.
"""

import torch
from torch import Tensor

from dsmr_kernels.holding import INFERENCE, may_look
from dsmr_kernels.quantise import quantise
from dsmr_kernels.ring import Ring, along_slots, ring_slices


def check_new(memory: Ring, k: Tensor, v: Tensor, piece_start: Tensor | None, counts: Tensor | None) -> None:
    """The arguments of `KVMemory.append`; raises `ValueError` or `TypeError` where they do not fit."""
    tokens = k.shape[2] if k.dim() == 4 else -1
    for name, tensor, dim in (("k", k, memory.head_dim), ("v", v, memory.v_head_dim)):
        if tuple(tensor.shape) != (memory.batch, memory.kv_heads, tokens, dim):
            raise ValueError(
                f"{name} must have shape (batch, kv_heads, S, head_dim) = ({memory.batch}, {memory.kv_heads}, S, "
                f"{dim}), S the same for k and v, to fit this memory; got {tuple(tensor.shape)}"
            )
        if memory.k_scale is not None:
            if not tensor.dtype.is_floating_point:
                raise TypeError(f"{name} must be of a floating dtype, to be stored in int8, got {tensor.dtype}")
        elif tensor.dtype != memory.k.dtype:
            raise TypeError(f"{name} must have the memory's dtype {memory.k.dtype}, got {tensor.dtype}")
    if not torch.compiler.is_compiling() and memory.k.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"this memory {INFERENCE}")
    if piece_start is not None:
        if tuple(piece_start.shape) != (memory.batch, tokens) or piece_start.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"piece_start must be int32 of shape (batch, S) = ({memory.batch}, {tokens}), got "
                f"{piece_start.dtype} of shape {tuple(piece_start.shape)}"
            )
        if tokens and may_look(piece_start) and bool((piece_start[:, -1] >= tokens).any()):
            raise ValueError(f"piece_start must lie before the end of the call, got {piece_start[:, -1].tolist()}")
    if counts is None:
        return
    if counts.dtype != torch.int64 or tuple(counts.shape) != (memory.batch,):
        raise ValueError(
            f"counts must be int64 of shape (batch,) = ({memory.batch},), got {counts.dtype} of shape "
            f"{tuple(counts.shape)}"
        )
    if may_look(counts) and bool(((counts < 0) | (counts > tokens)).any()):
        raise ValueError(f"counts must lie between 0 and the {tokens} tokens of the call, got {counts.tolist()}")


def append(
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    length: Tensor,
    position: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    piece_start: Tensor | None,
    counts: Tensor | None,
) -> None:
    """Append to the tensors of a memory, in place. Tokens of an earlier piece land in slots that are not held, which
    does no harm and needs no mask."""
    tokens, capacity = new_k.shape[2], k.shape[2]
    taken: int | Tensor = tokens if counts is None else counts
    if piece_start is None:
        position.add_(taken)
        length.copy_((length + taken).clamp_(max=capacity))
    else:
        last = piece_start[:, -1:] if counts is None else piece_start.gather(1, (counts - 1).clamp(min=0)[:, None])
        start = last[:, 0].to(torch.int64)
        fresh = start >= 0 if counts is None else (start >= 0) & (counts > 0)
        length.copy_(torch.where(fresh, taken - start, length + taken).clamp_(max=capacity))
        position.copy_(torch.where(fresh, taken - start, position + taken))
    kept = min(tokens, capacity)
    if kept == 0:
        return
    storage = [k, v]
    if k_scale is not None and v_scale is not None:
        storage += [k_scale, v_scale]
    on_host = k.device.type == "cpu" and not torch.compiler.is_compiling()
    if counts is None:
        new_k, new_v = new_k[:, :, tokens - kept :], new_v[:, :, tokens - kept :]
    new = [new_k, new_v]
    if k_scale is not None:
        (key, key_scale), (value, value_scale) = quantise(new_k), quantise(new_v)
        new = [key, value, key_scale, value_scale]
    if on_host:
        _row_by_row(storage, new, position.tolist(), [kept] * len(k) if counts is None else counts.tolist())
    elif counts is None:
        _scattered(storage, new, position)
    else:
        _each_its_own(storage, new, position, counts, kept)


def _row_by_row(storage: list[Tensor], new: list[Tensor], positions: list[int], counts: list[int]) -> None:
    """Row by row, or all at once where they are alike, stretch by stretch of the ring."""
    capacity = storage[0].shape[2]
    alike = len(set(zip(positions, counts, strict=True))) == 1
    for row in range(1 if alike else len(positions)):
        position, count = positions[row], counts[row]
        rows = slice(None) if alike else slice(row, row + 1)
        kept = min(count, capacity)
        done = count - kept
        for start, stop in ring_slices(position, capacity, -kept, kept):
            source = slice(done, done + stop - start)
            for ring, x in zip(storage, new, strict=True):
                ring[rows, :, start:stop] = x[rows, :, source]
            done += stop - start


def _scattered(storage: list[Tensor], new: list[Tensor], position: Tensor) -> None:
    """All of the new tokens, no more than there are slots, without looking at where each row stands."""
    slots = (position[:, None] + torch.arange(-new[0].shape[2], 0, device=position.device)).remainder(
        storage[0].shape[2]
    )
    for ring, x in zip(storage, new, strict=True):
        ring.scatter_(2, along_slots(slots, ring), x)


def _each_its_own(storage: list[Tensor], new: list[Tensor], position: Tensor, counts: Tensor, kept: int) -> None:
    """Each row its own number of tokens, without looking: the slots beyond them are written with what they hold."""
    capacity, tokens = storage[0].shape[2], new[0].shape[2]
    source = (counts - kept).clamp(min=0)[:, None] + torch.arange(kept, device=counts.device)  # [B, kept], of the new
    slots = (position[:, None] - counts[:, None] + source).remainder(capacity)
    valid = source < counts[:, None]
    for ring, x in zip(storage, new, strict=True):
        index = along_slots(slots, ring)
        fresh = x.gather(2, along_slots(source.clamp(max=tokens - 1), x))
        ring.scatter_(2, index, torch.where(along_slots(valid, ring), fresh, ring.gather(2, index)))


append_operator = torch.library.custom_op(
    "dsmr_kernels::append", append, mutates_args=("k", "v", "k_scale", "v_scale", "length", "position")
)


@append_operator.register_fake
def _(*arguments: Tensor) -> None:
    return None
