"""Which split a piece belongs to: it follows from its name alone, and copies go where their original goes."""

import hashlib
from collections.abc import Sequence

import numpy as np

from dsmr.console.errors import UserError
from dsmr.corpus.layout import SPLITS


def assign_splits(
    pieces: Sequence[tuple[str, str | None]], fractions: Sequence[float], groups: Sequence[int] | None = None
) -> list[str]:
    """The split of each (source, split or None): given ones stay, the others follow from a hash of the source.

    `groups` tells which pieces are copies of one another (equal numbers): they go together, by the shortest of their
    names, so that "piece (1).mid" comes to "piece.mid". If none would be for training, or of two or more none for
    validation, the piece next to the border is moved, its copies with it.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not 0.999 < sum(fractions) < 1.001:
        raise UserError(f"the fractions of train, validation and test must add up to 1, got {tuple(fractions)}")
    borders = np.cumsum(fractions)[:2]
    together: dict[int, list[int]] = {}
    for i, (_, given) in enumerate(pieces):
        if given is None:
            together.setdefault(i if groups is None else groups[i], []).append(i)
    draws = {}
    splits = [given or "" for _, given in pieces]
    for group, members in together.items():
        leader = min((pieces[i][0] for i in members), key=lambda source: (len(source), source))
        draws[group] = _draw(leader)
        for i in members:
            splits[i] = SPLITS[int(np.searchsorted(borders, draws[group], side="right"))]

    def move(group: int, split: str) -> None:
        for i in together[group]:
            splits[i] = split

    free = sorted(together, key=draws.__getitem__)
    if free and "train" not in splits:
        move(free[0], "train")
    if len(free) > 1 and "validation" not in splits:
        of_split = {split: [group for group in free if splits[together[group][0]] == split] for split in SPLITS}
        others = any(split == "train" for _, split in pieces)
        donor = "train" if len(of_split["train"]) > (0 if others else 1) else "test"
        if of_split[donor]:
            move(of_split[donor][-1], "validation")
    return splits


def _draw(source: str) -> float:
    """A number from 0 to 1 that follows from a name."""
    return int.from_bytes(hashlib.sha256(source.encode("utf-8", "surrogateescape")).digest()[:7], "big") / 2**56
