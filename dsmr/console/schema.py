"""What a file of ours must hold, checked where it is read: a sentence that names file and field, never a traceback.

A shape is written as the data is: `{"name": str, "files": Each({"bytes": Natural})}`. A record may hold fields that its
shape does not name; a field named with a question mark may be missing.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmr.console.errors import UserError
from dsmr.console.shown import shown

Natural = "a whole number of at least 0"
Real = "a finite number"
Amount = "a finite number of at least 0"
Number = "a number"  # or one that is not: what was not measured
_NAMES = {str: "text", dict: "a record", list: "a list", bool: "true or false", int: "a whole number"}


@dataclass(frozen=True)
class Each:
    """A record of any fields, each of one shape."""

    shape: Any


@dataclass(frozen=True)
class Maybe:
    """Something of one shape, or nothing (null)."""

    shape: Any


def check(value: Any, shape: Any, where: object, field: str = "") -> Any:
    """`value`, if it has this shape; else `UserError`: "`where` is damaged: its `field` is …, expected …"."""
    if isinstance(shape, Each):
        for name, part in check(value, dict, where, field).items():
            check(part, shape.shape, where, _joined(field, name))
    elif isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, where, field)
    elif isinstance(shape, Mapping):
        check(value, dict, where, field)
        for name, part in shape.items():
            key = name.removesuffix("?")
            if key in value:
                check(value[key], part, where, _joined(field, key))
            elif key == name:
                raise UserError(f"{where} is damaged: it lacks {_joined(field, key)}")
    elif isinstance(shape, list):
        for place, part in enumerate(check(value, list, where, field)):
            check(part, shape[0], where, f"{field}[{place}]")
    elif not _is(value, shape):
        what = f"its {field}" if field else "it"
        raise UserError(f"{where} is damaged: {what} is {_brief(value)}, expected {_NAMES.get(shape, shape)}")
    return value


def check_fields(values: Any, kind: type, where: object, field: str = "") -> Any:
    """`values`, if they are a record whose fields have the types of the dataclass `kind`'s; unknown ones are passed.

    Whole numbers that stand for real ones become those, in place: JSON's are of any size, a tensor's are not.
    """
    hints = typing.get_type_hints(kind)
    named = {one.name for one in dataclasses.fields(kind)}
    for name, value in check(values, dict, where, field).items():
        if name in named and not _fits(value, hints[name]):
            wanted = str(getattr(hints[name], "__name__", hints[name])).replace("NoneType", "None")
            raise UserError(f"{where} is damaged: its {_joined(field, name)} is {_brief(value)}, expected {wanted}")
        if name in named and type(value) is int and hints[name] in (float, float | None):
            values[name] = float(value)
    return values


def _joined(field: str, name: str) -> str:
    return f"{field}.{shown(name)}" if field else shown(name)


def _is(value: Any, shape: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if shape is Natural:
        return number and isinstance(value, int) and 0 <= value < 2**63
    if shape is Number and isinstance(value, float):
        return True
    if shape in (Real, Number, Amount):
        return number and abs(value) < 2**1000 and math.isfinite(value) and (shape is not Amount or value >= 0)
    return shape is Any or (isinstance(value, shape) and (shape is bool or not isinstance(value, bool)))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON may stand for an annotated one."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, parts[0]) for one in value)
    if hint is float:
        return _is(value, Real)
    if hint is int:
        return _is(value, int) and abs(value) < 2**63
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    return True  # a class of ours says itself what it is made of


def _brief(value: Any) -> str:
    text = "nothing" if value is None else shown(repr(value))
    return text if len(text) <= 40 else f"{text[:40]}…"
