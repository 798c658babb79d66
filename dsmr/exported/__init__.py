"""A model that was exported (`dsmr.export`): its files, its memories, and how it takes a token, with ONNX Runtime and
numpy. Nothing here imports PyTorch. May import `music` and `console`.
"""

from dsmr.doors import door

__getattr__ = door(
    __name__,
    {
        "ExportedModel": "dsmr.exported.model",
    },
)
