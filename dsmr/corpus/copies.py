"""Which pieces play the same notes, whatever they are called: copies must not lie in different splits.

A piece is known by its runs of eight notes, as intervals, so that another tempo, other velocities, another key or a few
changed notes do not hide a copy; two performances of one composition are often found, too. Two pieces that have more
than half of all their runs in common are taken for copies (Broder, "On the resemblance and containment of documents",
1997; found by the smallest of 64 hashes of the runs).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsmr.music.vocabulary import Vocabulary

RUN = 8  # notes
HASHES, ROWS = 64, 3  # pieces are compared where they share `ROWS` hashes in a row: 99.98 % of those alike to 70 %
ALIKE = 0.5
CHORD = 0.035  # seconds between notes that count as struck together, and so have no order
_MULTIPLIERS = np.random.default_rng(1997).integers(0, 2**32, HASHES, dtype=np.uint32) | np.uint32(1)

Fingerprint = npt.NDArray[np.uint32]


def fingerprint(tokens: npt.NDArray[np.uint16], vocabulary: Vocabulary) -> Fingerprint:
    """What a piece is known by: 64 numbers, of which copies share most."""
    is_note = vocabulary.is_note[tokens]
    pitch = vocabulary.pitch[tokens[is_note]]
    tick = vocabulary.tick_clock(tokens)[is_note]
    chord = np.cumsum(np.diff(tick, prepend=tick[:1]) > CHORD * vocabulary.ticks_per_second)
    pitch = pitch[np.lexsort((pitch, chord))]
    if len(pitch) < RUN:  # too short for intervals to tell anything: the notes themselves
        runs = np.array([int.from_bytes(bytes(pitch.tolist()), "big")], dtype=np.uint64)
    else:
        steps = (np.diff(pitch) + 128).astype(np.uint64)
        runs = np.zeros(len(pitch) - RUN + 1, dtype=np.uint64)
        for i in range(RUN - 1):
            runs = runs << np.uint64(8) | steps[i : i + len(runs)]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64: near runs, far numbers
        runs = (runs ^ runs >> np.uint64(shift)) * np.uint64(factor)
    mixed = (runs ^ runs >> np.uint64(31)).astype(np.uint32)
    return np.array([(mixed * factor).min() for factor in _MULTIPLIERS], dtype=np.uint32)


def groups_of(prints: Sequence[Fingerprint]) -> list[int]:
    """For each piece the number of the first piece that it is a copy of, itself if it is none of an earlier one."""
    first = list(range(len(prints)))

    def root(piece: int) -> int:
        while first[piece] != piece:
            piece = first[piece]
        return piece

    for start in range(0, HASHES - ROWS + 1, ROWS):
        met: dict[bytes, list[int]] = {}
        for piece, known in enumerate(prints):
            others = met.setdefault(known[start : start + ROWS].tobytes(), [])
            if all(root(other) != root(piece) for other in others):
                for other in others:
                    if root(other) != root(piece) and float((prints[other] == known).mean()) > ALIKE:
                        one, two = sorted((root(other), root(piece)))
                        first[two] = one
            if all(root(other) != root(piece) for other in others):
                others.append(piece)
    return [root(piece) for piece in range(len(prints))]
