"""Notes to tokens and back, and what they look like: tokenisers, vocabularies, grammar, augmentation, piano rolls, what
sounds at a moment. May import `console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "Vocabulary": "dsmr.music.vocabulary",
    },
)
