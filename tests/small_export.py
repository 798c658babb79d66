"""Small models over a vocabulary of 28 tokens, and exports of them."""

from pathlib import Path
from typing import Any

import torch
from tiny_corpus import tiny_vocabulary

from dsmr.exported.model import ExportedModel
from dsmr.model.config import DSMRConfig
from dsmr.model.transformer import DSMRModel

SEGMENT = 8


def small_model(**changes: Any) -> DSMRModel:
    """Three layers of different horizons, with weights large enough that logits tell tokens apart."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": tiny_vocabulary().size,
        "schedule": "explicit(horizons=[13, 5, 0])",
        "d_model": 32,
        "n_heads": 4,
        "segment_length": SEGMENT,
        "init_std": 0.15,
    }
    return DSMRModel(DSMRConfig(**(settings | changes))).eval()


def small_run(folder: Path, **changes: Any) -> DSMRModel:
    """A run directory with such a model, which is returned."""
    model = small_model(**changes)
    model.save_pretrained(folder)
    tiny_vocabulary().save(folder / "tokenizer.json")
    return model


def exported(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> tuple[DSMRModel, ExportedModel]:
    """A small model and its export, made in `folder`."""
    from dsmr.export.write import export_run

    model = small_run(folder / "run", **(changes or {}))
    export_run(folder / "run", folder / "export", **options)
    return model, ExportedModel.load(folder / "export")
