"""Pieces on disk and streams of them: MIDI folders, MAESTRO or composed pieces into one file of tokens, and batches of
whole pieces read side by side. May import `composer`, `music` and `console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "Corpus": "dsmr.corpus.store",
    },
)
