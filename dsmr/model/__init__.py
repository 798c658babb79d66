"""The paper's figure: a memory schedule, attention with a memory of its own horizon, the Transformer around it, and the
state that a stream carries. Knows nothing of music; may import `console` and `dsmr_kernels`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "DSMRAttention": "dsmr.model.attention",
        "Block": "dsmr.model.transformer",
        "DSMRConfig": "dsmr.model.config",
        "DSMRModel": "dsmr.model.transformer",
        "DSMROutput": "dsmr.model.transformer",
        "DSMRState": "dsmr.model.state",
        "MemorySchedule": "dsmr.model.schedule",
        "MemoryState": "dsmr.model.state",
        "RecurrentAttention": "dsmr.model.recurrent",
        "stream": "dsmr.model.recurrent",
    },
)
