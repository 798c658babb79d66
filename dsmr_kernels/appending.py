"""Writing new tokens into the tensors of a ring, in place: eagerly, and as an operator that says what it mutates.

On a CPU row by row, stretch by stretch; elsewhere by scattering, without looking at a counter, so that nothing waits
for the device and a captured graph may replay it.
"""

import torch
from torch import Tensor

from dsmr_kernels.quantise import quantise
from dsmr_kernels.ring import along_slots, ring_slices


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
        slots = (position[:, None] + torch.arange(-kept, 0, device=k.device)).remainder(capacity)
        for ring, x in zip(storage, new, strict=True):
            ring.scatter_(2, along_slots(slots, ring), x)
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
