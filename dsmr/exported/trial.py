"""What this machine's runtime must show before an export is played: that it computes what PyTorch computed, and that
its attention sees what it should, whatever version it is.

Two trials, of a few tokens. Some are read from the beginning, a chunk and then single ones, and the logits held against
those that PyTorch gave when the model was exported. Then, far into a piece and into a segment, with memories of zeros:
the value in a slot that is not to be seen may be anything and nothing changes; that of the oldest that is to be seen,
in each layer, does change the logits. No numbers need be known for that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dsmr.console.errors import UserError
from dsmr.exported.about import About
from dsmr.exported.reading import Logits, read_all, reader_of
from dsmr.exported.state import Stream

# How far logits may lie from PyTorch's, of the largest: rounding, or eight bits of a weight some layers deep.
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "int8": 0.25}
SOMETHING = 100  # fits eight bits
KEYS = (0, SOMETHING, -SOMETHING)  # whatever the query is like, with one of them the slot has weight

Places = list[slice]
"""Of each layer, slots of its memory."""


def try_out(session: Any, about: About) -> None:
    """`UserError`, a sentence to be put behind the graph's name, where the runtime fails a trial; else nothing."""
    _try_known(session, about)
    if not about.portable:  # where what is seen is what is handed over, see `Stream.crop`
        _try_seeing(session, about)


def _try_known(session: Any, about: About) -> None:
    tokens, expected = np.array(about.trial[0], np.int64), np.array(about.trial[1], np.float32)
    stream = Stream(about)
    reader = reader_of(session, stream)
    half = max(1, len(tokens) - 2)  # a chunk, then single tokens
    logits = [read_all(reader, stream, part) for part in (tokens[:half], *tokens[half:, None])][-1]
    worst = float(np.abs(logits[: len(expected)] - expected).max())
    allowed = max(TOLERANCE[about.weights], TOLERANCE[about.memory]) * float(np.abs(expected).max() + 1)
    if not worst <= allowed:
        raise UserError(
            f"gives other numbers here than PyTorch gave when it was exported ({worst:.3g} apart, at most "
            f"{allowed:.3g} is right)"
        )


def _try_seeing(session: Any, about: About) -> None:
    stream = Stream(about)
    reader = reader_of(session, stream)
    offset = (about.segment_length - 1) // 2
    position = max(about.horizons) + 2 * about.segment_length + offset

    everywhere = range(about.layers)
    held = [about.held(layer, position, offset) for layer in everywhere]

    def put(key: int, value: int, layers: range, places: Places) -> None:
        for layer in layers:
            for array, number in zip(stream.memories[layer], (key, value), strict=True):
                array[:, :, places[layer]] = number

    def logits(key: int, value: int, layers: range, places: Places) -> Logits:
        """After one token, with these in some slots and zeros in the others, as it is left."""
        put(key, value, layers, places)
        stream.position, stream.offset, stream.recent = position, offset, np.zeros_like(stream.recent)
        found = reader(np.zeros(1, np.int64)).copy()
        put(0, 0, layers, places)
        # The token's own slot; all of them where segments are of one token, and so the memories have moved.
        put(0, 0, everywhere, [slice(count, count + 1) if stream.offset else slice(None) for count in held])
        return found

    def seen(layers: range, places: Places) -> bool:
        """Whether what lies in these slots makes a difference."""
        return any(not np.array_equal(logits(key, SOMETHING, layers, places), empty) for key in KEYS)

    empty = logits(0, 0, range(0), [])
    sliding = about.visibility == "sliding"
    first = [count - about.horizons[layer] if sliding else 0 for layer, count in enumerate(held)]
    for blind in ([slice(0, slot) for slot in first], [slice(count + 1, None) for count in held]):
        if seen(everywhere, blind):
            raise UserError("sees more of its memory here than it should")
    oldest, newest = ([slice(slot, slot + 1) for slot in slots] for slots in (first, [count - 1 for count in held]))
    for layer in everywhere:
        alone = range(layer, layer + 1)
        # A layer that makes nothing of what it reads does not see its newest slot either.
        if first[layer] < held[layer] and not seen(alone, oldest) and seen(alone, newest):
            raise UserError(f"sees less of its memory here than it should, in layer {layer}")
