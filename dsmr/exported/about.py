"""What an exported model is: the contents of its `export.json`, checked where they are read.

A folder holds `model.onnx` (the graph with its weights), `tokenizer.json` (what the tokens mean), and `export.json`,
which is written last and sealed: shape, precision, the sum of the graph's file, and what PyTorch made of a few tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.files import describe, read_json
from dsmr.console.schema import Natural, Real, check

KIND, FORMAT = "dsmr export", 1
MANIFEST, GRAPH, TOKENIZER = "export.json", "model.onnx", "tokenizer.json"
FILES = (GRAPH, TOKENIZER, MANIFEST)
WEIGHTS = ("float32", "int8")
MEMORIES = ("float32", "float16", "int8")
VISIBILITIES = ("segment", "sliding")

SHAPE = {
    "kind": str,
    "format": Natural,
    "vocab_size": Natural,
    "head_dim": Natural,
    "segment_length": Natural,
    "visibility": str,
    "recall": Natural,
    "horizons": [Natural],
    "kv_heads": [Natural],
    "weights": str,
    "memory": str,
    "portable": bool,
    "fingerprint": str,
    "tokenizer_hash": str,
    "made_with": dict,
    "file": {"bytes": Natural, "sha256": str},
    "trial": {"tokens": [Natural], "logits": [Real]},
}
"""What an `export.json` holds (see `dsmr.console.schema`), besides what is there for a reader: model and sampling."""


@dataclass(frozen=True)
class About:
    """An exported model's shape and precision.

    Attributes:
        horizons, kv_heads: of each layer, the lowest first.
        weights: "float32" or "int8"; memory: "float32", "float16" or "int8", of keys and values.
        portable: the graph has operators of the ONNX standard only, and its memories grow by concatenation; otherwise
            they are written in place.
        fingerprint: of the model that it was made of (`dsmr.generation.saved_stream.fingerprint`).
        trial: tokens, and the first of the logits that PyTorch gave after them.
    """

    vocab_size: int
    head_dim: int
    segment_length: int
    visibility: str
    recall: int
    horizons: tuple[int, ...]
    kv_heads: tuple[int, ...]
    weights: str
    memory: str
    portable: bool
    fingerprint: str
    tokenizer_hash: str
    made_with: dict[str, str]
    trial: tuple[tuple[int, ...], tuple[float, ...]] = ((), ())

    @property
    def layers(self) -> int:
        return len(self.horizons)

    def capacity(self, layer: int) -> int:
        """Slots of a layer's memory where it is written in place: its horizon and the segment in progress."""
        return self.horizons[layer] + self.segment_length

    def held(self, layer: int, position: int, offset: int) -> int:
        """Tokens in a layer's memory, `position` tokens into the piece and `offset` into the segment."""
        return min(position, self.horizons[layer] + offset)

    def to_json(self, file: dict[str, Any], **beside: Any) -> dict[str, Any]:
        """As `export.json` holds it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tokens, logits = fields.pop("trial")
        trial = {"tokens": list(tokens), "logits": list(logits)}
        return {"kind": KIND, "format": FORMAT, **fields, "file": file, "trial": trial, **beside}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> About:
        """Read the `export.json` of a folder and check the file that it describes against it.

        Raises `UserError` in one sentence that names the file, for one that is missing, damaged or not ours.
        """
        path = Path(folder) / MANIFEST
        value = read_json(path)
        if not isinstance(value, dict) or value.get("kind") != KIND:
            raise UserError(f"{path} does not describe an exported model")
        if value.get("format") != FORMAT:
            raise UserError(f"{path} is an export of format {value.get('format')}, this version of dsmr reads {FORMAT}")
        check(value, SHAPE, path)
        named = {field.name for field in dataclasses.fields(cls)}
        fields: dict[str, Any] = {}
        for name in named & set(value):
            fields[name] = tuple(value[name]) if isinstance(value[name], list) else value[name]
        fields["trial"] = (tuple(value["trial"]["tokens"]), tuple(value["trial"]["logits"]))
        about = cls(**fields)
        about._check(path)
        check_file(Path(folder) / GRAPH, value["file"])
        return about

    def _check(self, path: Path) -> None:
        for name, value, known in (
            ("visibility", self.visibility, VISIBILITIES),
            ("weights", self.weights, WEIGHTS),
            ("memory", self.memory, MEMORIES),
        ):
            if value not in known:
                raise UserError(f"{path} is damaged: its {name} is {value!r}, expected one of {', '.join(known)}")
        least = {"vocab_size": self.vocab_size, "head_dim": self.head_dim, "segment_length": self.segment_length}
        for name, number in least.items():
            if number < 1:
                raise UserError(f"{path} is damaged: its {name} is 0")
        if not self.layers or len(self.kv_heads) != self.layers or min(self.kv_heads) < 1:
            raise UserError(f"{path} is damaged: it has {self.layers} horizons and {len(self.kv_heads)} KV heads")
        tokens, logits = self.trial
        if not tokens or max(tokens) >= self.vocab_size or not 1 <= len(logits) <= self.vocab_size:
            raise UserError(f"{path} is damaged: its trial is not of this model")


def sum_of(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as `export.json` holds them."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def check_file(path: Path, expected: dict[str, Any]) -> None:
    """`UserError` unless the file is the one whose `sum_of` was written down."""
    try:
        found = sum_of(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {describe(error)}") from error
    if found != {"bytes": expected["bytes"], "sha256": expected["sha256"]}:
        raise UserError(f"{path} is damaged, or of another export: its bytes are not those that were written (SHA-256)")


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(folder) / MANIFEST).is_file()
