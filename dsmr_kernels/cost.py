"""What attention with a memory costs, counted from visibility itself: query-key pairs, operations, bytes.

Every count is exact for a stream that begins with an empty memory and lies in one piece.
"""

import math


def visible_pairs(tokens: int, *, horizon: int, segment_length: int | None, visibility: str = "segment") -> int:
    """(query, key) pairs that the first `tokens` tokens of a piece see, each token seeing itself.

    Raises:
        ValueError: if `tokens` or `horizon` is negative, or `visibility` is unknown.
    """
    if tokens < 0 or horizon < 0:
        raise ValueError(f"tokens and horizon must be >= 0, got {tokens} and {horizon}")
    if visibility == "sliding":
        ramp = min(tokens, horizon)  # the first `horizon` tokens see everything before them
        return tokens + ramp * (ramp - 1) // 2 + (tokens - ramp) * horizon
    if visibility != "segment":
        raise ValueError(f'visibility must be "segment" or "sliding", got {visibility!r}')
    length = segment_length or max(tokens, 1)
    pairs = 0
    for begin in range(0, tokens, length):
        queries = min(length, tokens - begin)
        pairs += queries * min(begin, horizon) + queries * (queries + 1) // 2
    return pairs


def steady_keys(*, horizon: int, segment_length: int, visibility: str = "segment") -> float:
    """Keys that a token sees on average once the memory is full, itself included."""
    return horizon + 1.0 if visibility == "sliding" else horizon + (segment_length + 1) / 2


def attention_flops(pairs: float, *, heads: int, head_dim: int) -> float:
    """Floating-point operations of the two matrix products of a forward pass over `pairs` pairs in each query head."""
    return 4.0 * pairs * heads * head_dim


def memory_bytes(*, batch: int, horizon: int, kv_heads: int, head_dim: int, bytes_per_element: int) -> int:
    """Bytes of one layer's keys and values of `horizon` tokens: what `KVMemory.nbytes` gives for that capacity."""
    return 2 * batch * horizon * kv_heads * head_dim * bytes_per_element


def memory_capacity(horizon: int, segment_length: int | None, visibility: str = "segment") -> int:
    """Slots that a memory needs to serve calls of any size, down to single tokens.

    The segment in progress must stay visible beside its past; a sliding query, once appended, sees itself as well.
    """
    return horizon + 1 if visibility == "sliding" else horizon + (segment_length or 0)


def human_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.{0 if power == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
