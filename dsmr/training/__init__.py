"""The loop, its pace, and several runs side by side. May import `evaluation`, `runs`, `model`, `corpus`, `music` and
`console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "TrainResult": "dsmr.training.loop",
        "train": "dsmr.training.loop",
    },
)
