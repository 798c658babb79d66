"""Words for messages."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """What to add to "unknown 'word'": the nearest known one, or all of them where none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f": did you mean '{near[0]}'?" if near else f": use one of {', '.join(names)}"


def human_bytes(count: float) -> str:
    """Bytes for a reader: "512 B", "13.4 MiB"."""
    power = 0
    while count >= 1024 and power < 4:
        count, power = count / 1024, power + 1
    return f"{count:.{0 if power == 0 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def one_line(error: Exception) -> str:
    """The first line of an error's message, which PyTorch likes to follow with many more."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
