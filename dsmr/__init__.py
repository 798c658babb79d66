"""Transformers that read whole pieces of music in bounded memory (Depth-Structured Music Recurrence, arXiv 2602.19816).

The front door: what a model needs. Everything else lies in rooms that say what is done in them.
"""

import sys
from typing import TYPE_CHECKING

from dsmr.doors import Moved, door

if TYPE_CHECKING:
    from dsmr.integrations.hosts.replacing import replace_attention as replace_attention
    from dsmr.model.attention import DSMRAttention as DSMRAttention
    from dsmr.model.config import DSMRConfig as DSMRConfig
    from dsmr.model.recurrent import RecurrentAttention as RecurrentAttention
    from dsmr.model.recurrent import stream as stream
    from dsmr.model.schedule import MemorySchedule as MemorySchedule
    from dsmr.model.state import DSMRState as DSMRState
    from dsmr.model.state import MemoryState as MemoryState
    from dsmr.model.transformer import DSMRModel as DSMRModel

__all__ = [
    "DSMRAttention",
    "DSMRConfig",
    "DSMRModel",
    "DSMRState",
    "MemorySchedule",
    "MemoryState",
    "RecurrentAttention",
    "replace_attention",
    "stream",
]

# Asked for one by one, so that `import dsmr` costs nothing beside what is used.
__getattr__ = door(
    __name__,
    {
        "DSMRAttention": "dsmr.model.attention",
        "DSMRConfig": "dsmr.model.config",
        "DSMRModel": "dsmr.model.transformer",
        "DSMRState": "dsmr.model.state",
        "MemorySchedule": "dsmr.model.schedule",
        "MemoryState": "dsmr.model.state",
        "RecurrentAttention": "dsmr.model.recurrent",
        "replace_attention": "dsmr.integrations.hosts.replacing",
        "stream": "dsmr.model.recurrent",
    },
)

_MOVED = {
    "dsmr.attention": "dsmr.model.attention",
    "dsmr.positions": "dsmr.model.positions",
    "dsmr.schedule": "dsmr.model.schedule",
    "dsmr.state": "dsmr.model.state",
    "dsmr.data": "dsmr.corpus (pieces on disk), dsmr.music (tokeniser, vocabulary) and dsmr.composer",
    "dsmr.loader": "dsmr.corpus.streams",
    "dsmr.pianoroll": "dsmr.music.pianoroll",
    "dsmr.sounding": "dsmr.music.sounding",
    "dsmr.musical_progress": "dsmr.music.progress",
    "dsmr.errors": "dsmr.console.errors",
    "dsmr.files": "dsmr.console.files",
    "dsmr.devices": "dsmr.console.devices",
    "dsmr.terminal": "dsmr.console.terminal",
    "dsmr.progress": "dsmr.console.progress",
    "dsmr.stopping": "dsmr.console.stopping",
    "dsmr.plots": "dsmr.console.figures, with the pictures in dsmr.training.figures and dsmr.evaluation.report",
    "dsmr.checkpoint": "dsmr.runs.checkpoint",
    "dsmr.settings": "dsmr.runs.settings",
    "dsmr.sampling": "dsmr.generation.sampling",
    "dsmr.continuation": "dsmr.generation.continuation",
    "dsmr.saved_stream": "dsmr.generation.saved_stream",
    "dsmr.recorder": "dsmr.generation.recorder",
    "dsmr.stepping": "dsmr.generation.stepping",
    "dsmr.ngram": "dsmr.evaluation.trigram",
    "dsmr.play": "dsmr.live.play",
    "dsmr.ports": "dsmr.live.ports",
    "dsmr.performance": "dsmr.live.performance",
    "dsmr.pacing": "dsmr.training.pacing",
    "dsmr.side_by_side": "dsmr.training.side_by_side",
    "dsmr.budget": "dsmr.profiling.budget_table",
    "dsmr.demo_corpus": "dsmr.corpus.etudes",
    "dsmr.demo_figures": "dsmr.demo.figures",
    "dsmr.cli_train": "dsmr.cli.train",
    "dsmr.cli_play": "dsmr.cli.generate and dsmr.cli.play",
    "dsmr.cli_profile": "dsmr.cli.profile",
}
sys.meta_path.append(Moved(_MOVED))
