"""A table of seconds over the tiny corpus, as its TOML has it."""

from pathlib import Path
from typing import Any

import numpy as np
from tiny_corpus import tiny_piece, tiny_vocabulary

from dsmr.corpus.store import Corpus, PieceRecord, write_corpus


def small_corpus(path: Path) -> Corpus:
    """Twelve pieces of 60 to 160 notes: long enough for a reset and for planted returns of a few hundred tokens."""
    rng = np.random.default_rng(0)
    records = []
    for i in range(12):
        notes = int(rng.integers(60, 160))
        tokens = tiny_piece(notes, i)[:-1]
        split = "train" if i < 8 else "validation"
        records.append(PieceRecord(tokens, split, f"piece {i}", notes, notes * 0.3))
    return write_corpus(path, records, tiny_vocabulary(), "small")


def small_table(corpus: Path | str = "corpus", **more: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "data": {"path": str(corpus)},
        "size": {"layers": 2, "n_heads": 2, "head_dim": 8, "length": 64, "short": 8, "n_long": 1, "few_heads": 1},
        "train": {
            "segment_length": 8,
            "steps": 24,
            "batch_size": 3,
            "device": "cpu",
            "dtype": "float32",
            "dropout": 0.1,
            "eval_every": 10,
            "save_every": 5,
            "lr": 1e-2,
        },
        "measure": {"krcu": {"reset": 64, "width": 32, "count": 4}, "retain": [16, 32]},
        "cells": {"two_scale": [0]},
        **more,
    }


def toml(table: dict[str, Any]) -> str:
    """The table as its file has it."""
    lines = [f'name = "{table["name"]}"']
    for section, values in table.items():
        if isinstance(values, dict):
            lines += [f"[{section}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(entry)}" for key, entry in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)
