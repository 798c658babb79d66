"""How well a model predicts whole pieces, beside a trigram if asked, and what it remembers of them. May import `runs`,
`model`, `corpus`, `music` and `console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "EvaluationReport": "dsmr.evaluation.report",
        "evaluate": "dsmr.evaluation.losses",
        "evaluate_run": "dsmr.evaluation.losses",
        "memory_use": "dsmr.evaluation.memory_use",
        "piece_losses": "dsmr.evaluation.losses",
    },
)
