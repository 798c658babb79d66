"""Words for messages."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """What to add to "unknown 'word'": the nearest known one, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else f": use one of {', '.join(names)}"
