"""A table of cells (model × seed) as a person writes it: a TOML file, read and checked before any work.

    name = "tiny"                       # of the results
    [data]                              # either a prepared corpus or composed pieces
    path = "data/maestro"
    [size]                              # what all models share: the fields of `presets.Size`
    [train]                             # fields of `TrainConfig`, but those that the cells decide
    [measure]                           # how all are measured: the fields of `Measure`
    [models.two_scale-recall]           # models of your own: a preset or a schedule, and other fields of `TrainConfig`
    preset = "two_scale"
    recall = 3
    [cells]                             # presets or models, and the seeds of each
    full = [0, 1, 2]
    two_scale-recall = [0]

Unknown keys are refused with the nearest known one.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from dsmr.console.devices import DTYPES
from dsmr.console.errors import UserError
from dsmr.console.files import describe
from dsmr.console.words import nearest
from dsmr.corpus.layout import SPLITS
from dsmr.evaluation.memory_use import Bins
from dsmr.experiments.presets import KNOWN, Preset, Size, check, preset
from dsmr.experiments.rows import setting_that_differs
from dsmr.model.schedule import MemorySchedule
from dsmr.runs.settings import TrainConfig

DECIDED = ("data", "out", "schedule", "seed", "d_model", "n_heads")
"""Fields of `TrainConfig` that a table's size and cells decide."""
KINDS: dict[Any, tuple[str, Any]] = {
    int: ("a whole number", int),
    int | None: ("a whole number", int),
    float: ("a number", (int, float)),
    float | None: ("a number", (int, float)),
    bool: ("true or false", bool),
    str: ("a text", str),
}
"""What a field of each kind takes, in words."""
T = TypeVar("T")


@dataclass(frozen=True)
class Composed:
    """A corpus of the built-in composer, made where the results go; `etudes` is their share of training tokens."""

    pieces: int = 100
    minutes: float = 5.0
    seed: int = 0
    etudes: float = 0.0
    etude_tokens: int = 240


@dataclass(frozen=True)
class Probe:
    """Planted returns to measure at: how far back, in tokens, and the seed of the planting."""

    nearest: int = 1000
    farthest: int = 16000
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """How every model is measured: on whole pieces of `split`, about `tokens` tokens of them (None: all)."""

    split: str = "validation"
    tokens: int | None = None
    batch_size: int = 4
    dtype: str = "float32"
    krcu: Bins | None = None
    retain: tuple[int, ...] = ()
    returns: Probe | None = None


@dataclass(frozen=True)
class Model:
    """What a row of the table is trained as."""

    name: str
    preset: Preset | None
    schedule: MemorySchedule
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name if self.preset is None or self.preset.name != self.name else self.preset.title


@dataclass(frozen=True)
class Cell:
    """One model with one seed."""

    model: Model
    seed: int

    @property
    def key(self) -> str:
        """Its name among files."""
        return f"{self.model.name}-s{self.seed}"


@dataclass(frozen=True)
class Table:
    """A table as it was written, every part of it known to be possible; `parse(written)` gives it again."""

    name: str
    about: str
    data: str | None
    composed: Composed | None
    size: Size
    train: dict[str, Any]
    measure: Measure
    cells: tuple[Cell, ...]
    written: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read and check a table; `UserError` in one sentence for what cannot be."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the table {path}: {describe(error)}") from error
        except ValueError as error:
            raise UserError(f"{path} is not a TOML file: {error}") from error
        try:
            return cls.parse(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path} is not a TOML file: {error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "Table":
        """A table of its parsed TOML."""
        _known(values, ("name", "about", "data", "size", "train", "measure", "models", "cells"), "the table")
        name, about = values.get("name"), values.get("about", "")
        if not isinstance(name, str) or not name or "/" in name:
            raise UserError(f"the table needs a name that can be a file's, but it is {name!r}")
        _of_kind(about, str, "about")
        data = dict(_section(values, "data"))
        _known(data, ("path", "composed"), "[data]")
        if len(data) != 1:
            raise UserError("[data] needs either the path of a corpus or what shall be composed")
        if "path" in data:
            _of_kind(data["path"], str, "[data] path")
        size = _make(Size, _section(values, "size"), "[size]")
        train = dict(_section(values, "train"))
        _known(train, _trainable(), "[train]")
        _check_kinds(train, TrainConfig, "[train]")
        models = _models(values, size)
        table = cls(
            name,
            about,
            data.get("path"),
            None if "composed" not in data else _make(Composed, data["composed"], "[data] composed"),
            size,
            train,
            _measure(_section(values, "measure")),
            tuple(_cells(values, models)),
            dict(values),
        )
        for cell in table.cells:
            check(cell.model.schedule, size)
            table.config(cell, "corpus", "run").model_config(3)
        return table

    def only(self, names: Sequence[str]) -> "Table":
        """The same with some of its cells, each named by its key, or all of a model by the model's name."""
        known = [*dict.fromkeys(cell.model.name for cell in self.cells), *(cell.key for cell in self.cells)]
        for name in names:
            if name not in known:
                raise UserError(f"the table {self.name} has no cell and no model '{name}'{nearest(name, known)}")
        return replace(self, cells=tuple(c for c in self.cells if c.key in names or c.model.name in names))

    def without(self, rows: Iterable[Mapping[str, Any]]) -> "Table":
        """The same without the cells that have `rows`, finished elsewhere; `UserError` for rows of another table."""
        cells = {cell.key: cell for cell in self.cells}
        for row in rows:
            key = f"{row['model']}-s{row['seed']}"
            if row["table"] != self.name:
                raise UserError(f"the row of {key} is of the table {row['table']}, not of {self.name}")
            cell = cells.pop(key, None)
            if cell is None:
                continue
            steps = self.config(cell, "", "").steps  # else so many as an hour or an epoch had
            for name, value in (
                ("schedule", str(cell.model.schedule)),
                ("settings", cell.model.settings),
                ("kv_bytes", self.size.bytes(cell.model.schedule)),  # which the number of heads and their width decide
                ("steps", row.get("steps") if steps is None else steps),
            ):
                if row.get(name) != value:
                    raise UserError(f"the row of {key} has the {name} {row.get(name)}, but the table has {value}")
            if changed := setting_that_differs(row.get("train", self.train), self.train):
                setting, theirs, ours = changed
                raise UserError(f"the row of {key} was trained with {setting} = {theirs}, but the table has {ours}")
        return replace(self, cells=tuple(cells.values()))

    def config(self, cell: Cell, data: str, out: str) -> TrainConfig:
        """What a cell is trained with; `UserError` for settings that cannot be."""
        settings: dict[str, Any] = {"threads": 1, "save_minutes": 1.0, **self.train, **cell.model.settings}
        if "betas" in settings:
            settings["betas"] = tuple(settings["betas"])
        return TrainConfig(
            data=data,
            out=out,
            schedule=str(cell.model.schedule),
            d_model=self.size.n_heads * self.size.head_dim,
            n_heads=self.size.n_heads,
            seed=cell.seed,
            **settings,
        )

    def settings(self) -> dict[str, Any]:
        """All but the cells, as JSON has it: what must stay the same while a folder of results grows."""
        return {
            "name": self.name,
            "data": self.data,
            "composed": None if self.composed is None else asdict(self.composed),
            "size": asdict(self.size),
            "train": self.train,
            "measure": {**asdict(self.measure), "retain": list(self.measure.retain)},
        }


def _trainable() -> list[str]:
    return [entry.name for entry in fields(TrainConfig) if entry.name not in DECIDED]


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name, {})
    if not isinstance(section, Mapping):
        raise UserError(f"[{name}] must be a section, but it is {section!r}")
    return section


def _known(values: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            raise UserError(f"{where} has the unknown key '{key}'{nearest(key, known)}")


def _of_kind(value: Any, kind: Any, where: str) -> None:
    """`UserError` for a value that a field of this kind cannot take."""
    if kind == tuple[float, float]:
        pair = isinstance(value, list | tuple) and len(value) == 2
        if not pair or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in value):
            raise UserError(f"{where} must be two numbers, but it is {value!r}")
    elif kind in KINDS:
        words, types = KINDS[kind]
        if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{where} must be {words}, but it is {value!r}")


def _check_kinds(values: Mapping[str, Any], kind: Any, where: str) -> None:
    """`UserError` for the first value that the field of its name, of a dataclass, cannot take."""
    for entry in fields(kind):
        if values.get(entry.name) is not None:
            _of_kind(values[entry.name], entry.type, f"{where} {entry.name}")


def _make(kind: type[T], values: Any, where: str) -> T:
    """A dataclass of a section's values, each of the kind that its field has."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a section, but it is {values!r}")
    _known(values, [entry.name for entry in fields(kind)], where)  # type: ignore[arg-type]
    _check_kinds(values, kind, where)
    try:
        return kind(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _measure(values: Mapping[str, Any]) -> Measure:
    given = dict(values)
    for name, kind in (("krcu", Bins), ("returns", Probe)):
        if name in given:
            given[name] = _make(kind, given[name], f"[measure] {name}")
    retain = given.get("retain", [])
    if not isinstance(retain, list) or not all(type(k) is int and k > 0 for k in retain):
        raise UserError(f"[measure] retain must be a list of numbers of tokens, but it is {retain!r}")
    measure = _make(Measure, {**given, "retain": tuple(retain)}, "[measure]")
    if measure.split not in SPLITS:
        raise UserError(f"[measure] has the unknown split '{measure.split}'{nearest(measure.split, SPLITS)}")
    if measure.dtype not in DTYPES:
        raise UserError(f"[measure] has the unknown dtype '{measure.dtype}'{nearest(measure.dtype, DTYPES)}")
    if measure.batch_size < 1 or (
        measure.tokens is not None and not (isinstance(measure.tokens, int) and measure.tokens > 0)
    ):
        raise UserError("[measure] batch_size and tokens must be at least 1")
    return measure


def _models(values: Mapping[str, Any], size: Size) -> dict[str, Model]:
    """The presets and the table's own models, by name."""
    models = {name: Model(name, found, found.schedule(size), dict(found.settings)) for name, found in KNOWN.items()}
    for name, given in _section(values, "models").items():
        where = f"[models.{name}]"
        if not isinstance(given, Mapping):
            raise UserError(f"{where} must be a section, but it is {given!r}")
        if name in models or "/" in name or not name:
            raise UserError(f"{where} needs a name of its own, which can be a file's")
        own = dict(given)
        _known(own, ("preset", "schedule", *_trainable()), where)
        _check_kinds(own, TrainConfig, where)  # which has a schedule too
        if ("preset" in own) == ("schedule" in own):
            raise UserError(f"{where} needs either a preset or a schedule")
        if "schedule" in own:
            try:
                schedule = MemorySchedule.parse(own.pop("schedule"))
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            if schedule.layers != size.layers:
                raise UserError(f"{where} has {schedule.layers} layers, but the size of the table has {size.layers}")
            models[name] = Model(name, None, schedule, own)
        else:
            _of_kind(own["preset"], str, f"{where} preset")
            found = preset(own.pop("preset"))
            models[name] = Model(name, found, found.schedule(size), {**found.settings, **own})
    return models


def _cells(values: Mapping[str, Any], models: Mapping[str, Model]) -> Iterable[Cell]:
    """The first seed of every model before the second of any: a table cut short is whole for some seeds."""
    given = _section(values, "cells")
    if not given:
        raise UserError("[cells] names no cell: write such as full = [0, 1, 2]")
    for name, seeds in given.items():
        if name not in models:
            raise UserError(f"[cells] has the unknown preset '{name}'{nearest(name, models)}")
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise UserError(f"[cells] {name} needs a list of seeds such as [0, 1, 2], but it is {seeds!r}")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"[cells] {name} names a seed twice: {seeds}")
    for turn in range(max(map(len, given.values()))):
        for name, seeds in given.items():
            if turn < len(seeds):
                yield Cell(models[name], seeds[turn])
