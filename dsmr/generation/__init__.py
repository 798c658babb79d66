"""Playing on: a prompt, then a token at a time in bounded memory, recorded as MIDI, kept for another day. `stepping` is
the pass of one token in PyTorch. May import `runs`, `model`, `exported`, `music` and `console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "Limits": "dsmr.music.progress",
        "Player": "dsmr.generation.player",
        "Sampling": "dsmr.generation.drawing",
        "stream": "dsmr.generation.player",
    },
)
